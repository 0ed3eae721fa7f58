"""How far several processes are from one, by layout and method: `python -m benchmarks.layouts` prints the table of docs/distributed.md, measured here.

Each cell: the greatest difference of a loss over 20 steps / of a number in the saved adapter. It runs what the tests run (tests/distributed/worker.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METHODS = "lora,dora,adalora,ia3,oft,vera,prompt,saved,tied,pissa"
RUNS = [
    ("ddp", 2),
    ("fsdp2", 2),
    ("fsdp1", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("zero2", 4),
    ("zero3", 4),
    ("tp", 2),
    ("tp_plan", 2),
    ("hsdp", 4),
]


def measured(layout: str, processes: int, methods: str) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(ROOT / "tests" / "distributed" / "worker.py"), "--layout", layout, "--methods", methods, "--out", out]
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        subprocess.run(command, env=env, check=True, capture_output=True)
        found: dict[str, dict[str, Any]] = json.loads(Path(out, f"{layout}.json").read_text())
        return found


def cell(r: dict[str, Any]) -> str:
    if "error" in r:
        return "refused" if r["error"].startswith("ConfigError") else r["error"].split(":")[0]
    return f"{r['losses']:.0e} / {r['adapter']:.0e}".replace("e-0", "e-").replace("0e+00", "0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", default=",".join(layout for layout, _ in RUNS))
    parser.add_argument("--methods", default=METHODS)
    args = parser.parse_args()
    methods = args.methods.split(",")
    print("| layout | processes | " + " | ".join(methods) + " |")
    print("|---|---|" + "---|" * len(methods))
    for layout, processes in RUNS:
        if layout in args.layouts.split(",") and (layout[:4] != "zero" or find_spec("deepspeed") is not None):
            # what is refused in the middle of a step stays in the process: last
            found = measured(layout, processes, ",".join(sorted(methods, key="adalora".__eq__)))
            print(f"| {layout} | {processes} | " + " | ".join(cell(found[m]) for m in methods) + " |", flush=True)


if __name__ == "__main__":
    main()
