"""`veneer merge`: an adapter put into a model's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    base: Annotated[Path, typer.Argument(help="The folder of the model: safetensors files, one or several with an index.")],
    adapter: Annotated[str, typer.Argument(help="The folder of the adapter, or its name on the Hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist, or be empty.")],
) -> None:
    """Merge an adapter into a model from file to file, without building the model: one weight at a time is in memory."""
    from ..errors import PeftError
    from ..offline import merge_files

    try:
        changed = merge_files(base, adapter, out)
    except PeftError as e:
        typer.echo(str(e), err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{len(changed)} tensors merged; the model is in {out}")
