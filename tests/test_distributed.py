"""Several gloo processes against one: the losses, the adapter that is saved, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).parent / "distributed" / "worker.py"
METHODS = "lora,dora,ia3,oft,vera,prompt,saved,tied,pissa"


def launch(layout: str, processes: int, methods: str, out: Path) -> dict[str, dict[str, Any]]:
    pytest.importorskip("transformers")
    src = Path(__file__).resolve().parents[1] / "src"
    env = {**os.environ, "PYTHONPATH": str(src), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(WORKER)]
    done = subprocess.run(
        [*command, "--layout", layout, "--methods", methods, "--out", str(out)], capture_output=True, text=True, timeout=240, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, dict[str, Any]] = json.loads((out / f"{layout}.json").read_text())
    return results


def check(results: dict[str, dict[str, Any]]) -> None:
    for method, r in results.items():
        assert "error" not in r, (method, r)
        assert r["keys"], method
        assert r["losses"] < 1e-5, (method, r)
        assert r["adapter"] < 1e-4, (method, r)  # 20 AdamW steps blow roundings up


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_processes_train_and_save_what_one_does(layout: str, tmp_path: Path) -> None:
    check(launch(layout, 2, "lora,dora", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "tp"])
def test_every_method_on_layouts_that_keep_gradients_by_tensor(layout: str, tmp_path: Path) -> None:
    check(launch(layout, 2, METHODS + ",adalora", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp1", "zero2"])
def test_layouts_with_flat_gradients_train_all_but_schedules_which_are_refused(layout: str, tmp_path: Path) -> None:
    if layout == "zero2" and find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    results = launch(layout, 2, METHODS + ",adalora", tmp_path)
    assert "flat pieces" in results.pop("adalora")["error"]
    check(results)
