"""What commands find stands on stdout alone, whatever libraries print meanwhile; what is wrong with the input is one message."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

import veneer
from veneer.cli import main
from veneer.errors import PeftError
from veneer.testing.laws import move


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


def test_damaged_files_and_places_that_are_taken_are_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from .words import save_word_llama

    save_word_llama(tmp_path / "model")
    adapter = tmp_path / "adapter"
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = veneer.get_peft_model(net, veneer.LoraConfig(r=2, target_modules=["q_proj"]))
    move(model)
    model.save_pretrained(adapter)
    (tmp_path / "junk.safetensors").write_bytes(b"\x01" * 100)
    for name, text in (("list", "[1]"), ("cut", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(text)
        (tmp_path / name / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    capsys.readouterr()  # what saving the model has said
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    for words, message in {
        ("merge", "model", "list", "out"): "has to hold a table",
        ("merge", "model", "cut", "out"): "is not JSON",
        ("convert", "junk.safetensors", "out", "--to", "peft"): "It is damaged",
        ("convert", "adapter", "adapter", "--to", "mlx"): "holds an adapter already",
        ("convert", "adapter", "list", "--to", "peft"): "holds an adapter already",
        ("methods", "--layer", "0x4"): "two numbers",
        ("suggest", "--model", "model", "--batches", "0"): "--batches is 1 or more",
    }.items():
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["veneer", *words])
        with pytest.raises(SystemExit) as done:
            main.main()
        told = capsys.readouterr()
        assert (done.value.code, told.out) == (2, ""), words
        assert message in " ".join(told.err.split()), (words, told.err)
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    assert json.loads(before["adapter_config.json"])["peft_type"] == "LORA"
