"""What commands find stands on stdout alone, whatever libraries print meanwhile."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("typer")

from veneer.cli import main
from veneer.errors import PeftError


@pytest.mark.parametrize(
    ("module", "function", "words"),
    [
        ("veneer.cli.suggest", "run", ["suggest", "--model", "m"]),
        ("veneer.cli.plan", "run", ["plan", "--model", "m", "--json"]),
        ("veneer.planning.inspection", "inspect_adapter", ["inspect", "a", "--json"]),
        ("veneer.filemerge", "merge_files", ["merge", "a", "b", "c"]),
        ("veneer.formats", "convert", ["convert", "a", "b", "--to", "peft"]),
        ("veneer.formats", "check", ["check", "a"]),
    ],
)
def test_what_libraries_print_goes_to_stderr(
    module: str, function: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def loud(*args: Any, **kwargs: Any) -> Any:
        print("Setting ds_accelerator to cpu")
        raise PeftError("nothing there")

    __import__(module)
    monkeypatch.setattr(sys.modules[module], function, loud)
    monkeypatch.setattr("sys.argv", ["veneer", *words])
    with pytest.raises(SystemExit) as done:
        main.main()
    told = capsys.readouterr()
    assert (done.value.code, told.out) == (2, "")
    assert "Setting ds_accelerator" in told.err and "nothing there" in told.err
