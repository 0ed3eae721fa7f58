"""`python -m veneer.compat script.py …` and `python -m veneer.compat -m package …`: run a program to which veneer is PEFT."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from . import install

_USAGE = "python -m veneer.compat script.py [arguments], or python -m veneer.compat -m module [arguments]"


def main() -> None:
    """Run the program that the command line names, with the arguments that follow it."""
    install()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        print(f"usage: {_USAGE}")
        sys.exit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    script = Path(arguments[0])
    if not script.exists():
        sys.exit(f"There is no file {str(script)!r}. Usage: {_USAGE}")
    sys.argv = arguments
    sys.path.insert(0, str(script.resolve().parent))  # as for `python script.py`
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
