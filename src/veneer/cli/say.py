"""How commands speak. What they say is text that means nothing but itself: brackets are no markup."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, redirect_stdout
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.panel import Panel


def on_stdout() -> Console:
    return Console(markup=False)


def on_stderr(quiet: bool = False) -> Console:
    return Console(stderr=True, markup=False, quiet=quiet)


def aside() -> AbstractContextManager[Any]:
    """A block in which whatever is printed goes to stderr: libraries say things when they are imported, and what a command finds stands on stdout alone."""
    return redirect_stdout(sys.stderr)


def refuse(command: str, why: object, console: Console | None = None) -> NoReturn:
    """Say what was wrong with the input, and end with code 2."""
    (console or on_stderr()).print(Panel(str(why), title=f"veneer {command}", border_style="red"))
    raise typer.Exit(2) from None
