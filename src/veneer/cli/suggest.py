"""`veneer suggest`: a configuration for a model, data and a memory, with its reasons, as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.panel import Panel

from ..errors import ConfigError, PeftError
from .say import aside, on_stderr, refuse

_ROWS = 4  # of a batch of the rank search


def suggest(
    model: Annotated[str, typer.Option(help="The model: a folder or a name on the Hub.")],
    data: Annotated[str | None, typer.Option(help="As for `veneer train`: then ranks are dealt out by layer.")] = None,
    memory: Annotated[str, typer.Option(help="Of the device: 24GB, 16GiB ...")] = "24GB",
    parameters: Annotated[int | None, typer.Option(help="How many may train.")] = None,
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    search: Annotated[str, typer.Option(help="gradient or eva.")] = "gradient",
    batches: Annotated[int, typer.Option(help="How many batches of four rows the search looks at.")] = 2,
    task: Annotated[str, typer.Option(help="causal-lm or sequence-classification.")] = "causal-lm",
    dtype: Annotated[str, typer.Option(help="Of the frozen weights.")] = "auto",
    out: Annotated[str | None, typer.Option(help="Write the recipe into this YAML file.")] = None,
) -> None:
    """Propose method, targets, rank per layer, learning rate and batch, with reasons, predicted memory and time."""
    try:
        if out is not None and (Path(out).is_dir() or not Path(out).absolute().parent.is_dir()):
            raise ConfigError(f"--out {out!r} is no file in a folder that is there.")
        if out is not None and Path(out).exists():
            raise ConfigError(f"--out {out!r} is there already, and is not overwritten. Give another name.")
        if batches < 1:
            raise ConfigError(f"--batches is 1 or more, got {batches}.")
        with aside():
            found, recipe = run(model, data, memory, parameters, length, search, batches, task, dtype)
    except PeftError as e:
        refuse("suggest", e)
    import yaml

    on_stderr().print(Panel(str(found), title="why", border_style="green"))
    text = yaml.safe_dump(recipe, sort_keys=False)
    typer.echo(text, nl=False)
    if out is not None:
        try:
            Path(out).write_text(text, encoding="utf-8")
        except OSError as e:
            refuse("suggest", f"The recipe could not be written: {e}")


def run(
    model: str,
    data: str | None,
    memory: str,
    parameters: int | None,
    length: int,
    search: str,
    batches: int,
    task: str,
    dtype: str,
) -> tuple[Any, dict[str, Any]]:
    """(the suggestion, a recipe for `veneer train`)."""
    import warnings

    warnings.filterwarnings("ignore", module="transformers")
    from ..planning.suggest import suggest as propose
    from ..training.forecast import hollow_model
    from ..training.prepare import read_model
    from ..training.recipe import TASKS, Recipe

    recipe = Recipe(model=model, data=data or "", task=task, dtype=dtype, length=length)
    recipe.check(("model",))
    given: dict[str, Any] = {"memory": memory, "parameters": parameters, "length": length, "batches": batches, "task_type": TASKS[task]}
    if data is None:
        found = propose(hollow_model(recipe), search=search, **given)  # type: ignore[arg-type]
    else:
        loaded, rows = read_model(recipe, _ROWS * batches)
        found = propose(loaded, rows(_ROWS), search=search, **given)  # type: ignore[arg-type]
    return found, {"model": model, **({"data": data} if data else {}), "task": task, **found.recipe()}
