"""The `veneer` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; a missing package is named with the command that installs it."""
    try:
        import typer

        from .merge import merge
        from .methods import methods
        from .train import train
    except ImportError as e:
        print(f'veneer: the command line needs {e.name!r}: pip install "veneer[train]"', file=sys.stderr)
        raise SystemExit(2) from None
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Parameter-efficient fine-tuning.")
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)
    app.command()(methods)
    app.command()(merge)

    @app.callback()
    def _root() -> None:
        """Parameter-efficient fine-tuning of PyTorch models."""

    @app.command()
    def version() -> None:
        """Print the version."""
        from .._version import __version__

        print(__version__)

    app()
