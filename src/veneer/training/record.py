"""What a run has found, and leaves behind: evaluation, the record, pictures, the adapter."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..control import Control, FreezingSchedule, LayerStatistics, picture_of_schedule, picture_of_statistics
from .controls import rate_groups
from .prepare import Prepared, overview
from .recipe import Recipe


@torch.no_grad()
def evaluate(trainer: Any, recipe: Recipe) -> dict[str, float]:
    """Perplexity and loss of a language model, or accuracy of a classifier, over the held-out rows, exact on any number of processes."""
    if trainer.eval_dataset is None:
        return {}
    model = trainer.model
    training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in trainer.get_eval_dataloader():
        batch = trainer._prepare_inputs(batch)
        if recipe.task != "causal-lm":
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            counts = batch["labels"] != -100
            sums += torch.tensor([float(((logits.argmax(-1) == batch["labels"]) & counts).sum()), int(counts.sum())], dtype=torch.float64)
        elif trainer.headless is not None:
            total, count = trainer.headless(model, batch)
            sums += torch.tensor([float(total), count], dtype=torch.float64)
        else:
            count = int((batch["labels"][:, 1:] != -100).sum())
            loss = float(model(**batch).loss)  # the mean of none is no number
            sums += torch.tensor([loss * count if count else 0.0, count], dtype=torch.float64)
    sums = trainer.accelerator.reduce(sums.to(trainer.args.device), "sum").cpu()
    model.train(training)
    mean = float(sums[0] / sums[1].clamp_min(1))
    return {"accuracy": mean} if recipe.task != "causal-lm" else {"loss": mean, "perplexity": math.exp(min(mean, 700))}


def finish(prepared: Prepared, recipe: Recipe, record: dict[str, Any], steering: Sequence[Control] = ()) -> None:
    """Write the adapter, the tokenizer's files, the pictures and, last, the record."""
    out = Path(recipe.out)
    prepared.model.save_pretrained(out)
    freezing = next((c for c in steering if isinstance(c, FreezingSchedule)), None)
    if recipe.rates or freezing is not None:
        _picture_schedule(record, recipe, prepared, freezing, out / "schedule.png")
    for control in steering:
        if isinstance(control, LayerStatistics) and control.records:
            picture_of_statistics(out / "statistics.png", control)
    prepared.tokenizer.save_pretrained(out)
    _picture(record["losses"], record.get("before", {}), record.get("after", {}), out / "loss.png")
    beside = out / ".run.json"
    beside.write_text(json.dumps(record, indent=2), encoding="utf-8")
    os.replace(beside, out / "run.json")


def _picture_schedule(record: dict[str, Any], recipe: Recipe, prepared: Prepared, freezing: FreezingSchedule | None, path: Path) -> None:
    """Each group's rate times what the schedule makes of it at each step."""
    import transformers

    steps = record["plan"]["steps"]
    one = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = transformers.get_scheduler(recipe.schedule, one, round(steps * recipe.warmup), steps)
    curve = []
    for _ in range(steps):
        curve.append(one.param_groups[0]["lr"])
        one.step()
        scheduler.step()
    picture_of_schedule(path, rate_groups(recipe, prepared.model), steps, lambda s: curve[s], freezing)


def new_record(prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    """The machine-readable account of a run, as far as it is known before it starts."""
    import transformers

    from .._version import __version__

    return {
        "veneer": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "recipe": dataclasses.asdict(recipe),
        "plan": overview(prepared, recipe),
        **({"labels": prepared.labels} if prepared.labels else {}),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "losses": [],
    }


def peak_memory() -> int:
    """The most memory this process has held, in bytes: on the accelerator if there is one, else on the host."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def _picture(losses: Sequence[dict[str, float]], before: dict[str, float], after: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([x["step"] for x in losses], [x["loss"] for x in losses], color="#2a6f97", label="training loss")
    for value, name, color in ((before.get("loss"), "held out, before", "#999999"), (after.get("loss"), "held out, after", "#c1121f")):
        if value is not None:
            axes.axhline(value, linestyle="--", color=color, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
