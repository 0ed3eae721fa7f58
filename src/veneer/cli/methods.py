"""`veneer methods`: what there is."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, such as LORA; all if not given.")] = None,
    layer: Annotated[str, typer.Option(help="Outputs x inputs of the linear layer that numbers are given for.")] = "4096x4096",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of the docs.")] = False,
) -> None:
    """List every method: what it does, how many numbers it trains, where it acts, whether it merges."""
    from .. import catalogue
    from ..errors import PeftError

    try:
        n_out, n_in = (int(n) for n in layer.lower().split("x"))
        if min(n_out, n_in) < 1:
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"--layer is two numbers such as 4096x4096, got {layer!r}.") from None
    if markdown:
        typer.echo(catalogue.markdown(n_out, n_in), nl=False)
        return
    try:
        entries = catalogue.catalogue(n_out, n_in) if name is None else [catalogue.entry(name, n_out, n_in)]
    except PeftError as e:
        typer.echo(str(e), err=True)
        raise typer.Exit(2) from None
    _show(entries, layer)


def _show(entries: list[Any], layer: str) -> None:
    from rich.table import Table

    from .say import on_stdout

    if len(entries) == 1:
        (e,) = entries
        lines = [f"{e.name}  ({e.config})", e.formula, f"sites: {', '.join(e.sites)}"]
        lines += [f"numbers on {layer}: {e.numbers:,}"] if e.numbers is not None else []
        lines += [f"merges: {_said(e.merge)};  rows of one batch: {_said(e.rows)};  to LoRA: {_said(e.to_lora)}"]
        lines += [f"{text}: {address}" for text, address in e.papers]
        on_stdout().print("\n".join(lines), highlight=False)
        return
    table = Table("method", "what it does", f"numbers\n{layer}", "sites", "merges", "to LoRA")
    for e in entries:
        numbers = "–" if e.numbers is None else f"{e.numbers:,}"
        table.add_row(
            e.name, e.formula, numbers, ", ".join(e.sites), "yes" if e.merge is True else "no", "yes" if e.to_lora is True else "no"
        )
    on_stdout().print(table)


def _said(value: bool | str) -> str:
    return "yes" if value is True else "no" if value is False else f"no, {value}"
