"""QLoRA: SmolLM2-135M-Instruct in NF4, and in bfloat16 beside it, fine-tuned on Python's documentation with `veneer train`. Quality and memory.

The memory of a training step is counted, not read off the process: a file of weights that is mapped into memory and allocators that keep what was
freed would blur it. `--quantize int8 torchao-int4 ...` runs other storages.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import assets
import torch
from run import topics
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from veneer.bases import codec_for

ROOT = Path(__file__).resolve().parents[2]


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made under it: `most` at a time. Those of the model, and views of them, are none."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        layers = [m for m in model.modules() if not codec_for(m).plain]
        held = [*model.parameters(), *model.buffers(), *(t for m in layers for t in codec_for(m).packed(m).values())]
        self.known = {t.untyped_storage()._cdata for t in held}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            storage = t.untyped_storage() if type(t) is torch.Tensor else None
            if storage is not None and storage._cdata not in self.known:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


def given(storage: str | None, steps: int, out: Path) -> dict[str, Any]:
    """The options of one run."""
    train_file, held_out = topics(assets.CACHE / "topics")
    return {
        "model": str(assets.smollm2()), "data": str(train_file), "eval-data": str(held_out), "out": str(out), "method": "lora", "steps": steps,
        "batch-size": 8, "length": 64, "learning-rate": 2e-3, "schedule": "cosine", "dtype": "bfloat16", **({"quantize": storage} if storage else {}),
    }  # fmt: skip


def step_memory(options: dict[str, Any]) -> tuple[float, float]:
    """(MiB of the weights as they are stored, MiB of everything else that a training step holds at its peak)."""
    from veneer.training.loss import HeadlessLoss
    from veneer.training.prepare import overview, prepare
    from veneer.training.recipe import Recipe

    recipe = Recipe(**{k.replace("-", "_"): v for k, v in options.items()}, method_fields={"r": 8})
    prepared = prepare(recipe)
    model, loss = prepared.model.train(), HeadlessLoss.of(prepared.model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    rows = {k: torch.tensor([r[k] for r in prepared.train[:8]]) for k in ("input_ids", "labels")}
    assert loss is not None
    with Alive(model) as counted:
        total, _ = loss(model, rows)
        total.backward()
        optimizer.step()
    return overview(prepared, recipe)["memory"]["weights"] / 2**20, counted.most / 2**20


def main() -> None:
    """Train each, then a table of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quantize", nargs="*", default=["nf4"], help="storages, as of veneer train")
    parser.add_argument("--steps", type=int, default=40)
    asked = parser.parse_args()
    print(f"{'stored in':16}{'perplexity':>16}{'weights MiB':>14}{'step MiB':>10}{'both MiB':>10}")
    for storage in (None, *asked.quantize):
        out = ROOT / "runs" / "qlora" / (storage or "bfloat16")
        options = given(storage, asked.steps, out)
        if not (out / "run.json").exists():
            words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
            subprocess.run([sys.executable, "-m", "veneer", "train", *words, "--r", "8"], check=True)
        record = json.loads((out / "run.json").read_text(encoding="utf-8"))
        weights, step = step_memory({**options, "out": str(out / "measured")})
        quality = f"{record['before']['perplexity']:.1f} -> {record['after']['perplexity']:.1f}"
        print(f"{storage or 'bfloat16':16}{quality:>16}{weights:>14.0f}{step:>10.0f}{weights + step:>10.0f}", flush=True)


if __name__ == "__main__":
    main()
