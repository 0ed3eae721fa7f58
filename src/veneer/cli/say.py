"""How commands speak. What they say is text that means nothing but itself: brackets are no markup."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console
from rich.panel import Panel


def on_stdout() -> Console:
    return Console(markup=False)


def on_stderr(quiet: bool = False) -> Console:
    return Console(stderr=True, markup=False, quiet=quiet)


def refuse(command: str, why: object, console: Console | None = None) -> NoReturn:
    """Say what was wrong with the input, and end with code 2."""
    (console or on_stderr()).print(Panel(str(why), title=f"veneer {command}", border_style="red"))
    raise typer.Exit(2) from None
