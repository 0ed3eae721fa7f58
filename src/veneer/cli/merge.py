"""`veneer merge`: an adapter into a model's files."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import PeftError
from .say import aside


def merge(
    base: Annotated[str, typer.Argument(help="The model's folder, of safetensors files.")],
    adapter: Annotated[str, typer.Argument(help="The adapter's folder.")],
    out: Annotated[str, typer.Argument(help="A new folder for the merged model.")],
    any_base: Annotated[bool, typer.Option("--any-base", help="Merge into another base than the one the adapter remembers.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer.")] = False,
) -> None:
    """Merge an adapter into a model's files, weight by weight, without loading the model."""
    from ..filemerge import merge_files

    try:
        with aside():
            report = merge_files(base, adapter, out, check_base=not any_base)
    except PeftError as e:
        typer.echo(str(e), err=True)
        raise typer.Exit(2) from None
    if layers:
        typer.echo(str(report))
    worst = report.worst
    lost = (
        f"; most is lost to rounding in {worst} ({report.layers[worst].error:.1e} of its change, {report.layers[worst].verdict})"
        if worst
        else ""
    )
    typer.echo(f"{len(report.layers)} layers merged into {out}{lost}.")
