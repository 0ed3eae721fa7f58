"""What a run that goes on has to be told of the one before it: whether it is the same, how far it came, what it lost on the way."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .controls import STATISTICS
from .prepare import Prepared
from .processes import is_first, processes
from .recipe import Recipe

STARTED = "started.json"  # in a checkpoint: what its run was started with
# may change from one start of a run to the next; where model and data lie is no matter, what they are is compared by itself
_FREE = (
    "model",
    "data",
    "eval_data",
    "out",
    "steps",
    "epochs",
    "save_every",
    "statistics",
    "gradient_checkpointing",
    "resume",
    "resume_anyway",
)


def started(prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    """What the steps of a run hang on, each by its name."""
    found = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in (*_FREE, "method_fields")}
    found |= {f"method_fields.{k.replace('-', '_')}": v for k, v in recipe.method_fields.items()}
    told: dict[str, Any] = json.loads(
        json.dumps({**found, "processes": processes(), "rows": len(prepared.train), "data": prepared.digest}, default=str)
    )
    return told


def check_resumed(prepared: Prepared, recipe: Recipe, checkpoint: str) -> None:
    """Raise ConfigError if the run that the checkpoint is of was started with other data or settings; a checkpoint that does not tell goes unasked."""
    try:
        then = json.loads((Path(checkpoint) / STARTED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(then, dict) or not {"rows", "data"} <= then.keys():
        return
    now = started(prepared, recipe)
    changed = [k for k in sorted({*then, *now}) if k not in ("rows", "data") and then.get(k) != now.get(k)]
    said = [f"{k} was {then.get(k)!r} and is {now.get(k)!r}" for k in changed]
    if then["data"] != now["data"]:
        many = (
            f"{then['rows']:,} and are {now['rows']:,}"
            if then["rows"] != now["rows"]
            else f"as many ({now['rows']:,}), with other contents"
        )
        said.append(f"the training rows were {many}")
    if said and not recipe.resume_anyway:
        raise ConfigError(
            f"--resume: the run in {recipe.out!r} was started otherwise: {'; '.join(said)}. It would not be the run it was. Give what it was started with, "
            "start anew in another --out, or go on all the same with --resume-anyway (the learning rate and weight decay then stay those of the checkpoint)."
        )


def ended(recipe: Recipe) -> int:
    """The step at which a run in `out` came to its end, and left all that it leaves; 0 if none did. One that went on later need not have."""
    try:
        found = json.loads((Path(recipe.out) / "run.json").read_text(encoding="utf-8"))
        return int(found["plan"]["steps"]) if (Path(recipe.out) / "adapter_config.json").is_file() else 0
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def losses_of(checkpoint: str) -> list[dict[str, Any]]:
    """The losses of the steps up to a checkpoint."""
    told = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8")).get("log_history", [])
    return [{k: x.get(k) for k in ("step", "loss", "learning_rate")} for x in told if "loss" in x]


def forget_after(recipe: Recipe, step: int) -> None:
    """Take out of the statistics in `out` what was measured after a step, which a run that goes on from there measures again."""
    file = Path(recipe.out) / STATISTICS
    if not is_first() or not recipe.statistics or not file.is_file():
        return

    def before(line: str) -> bool:
        try:
            return int(json.loads(line)["step"]) <= step
        except ValueError:  # cut off
            return False

    kept = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if before(line)]
    beside = file.with_name(f".{file.name}")
    beside.write_text("".join(kept), encoding="utf-8")
    os.replace(beside, file)
