"""`veneer inspect`: what it says of good adapters, and of every kind of damage."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from veneer.errors import ConfigError, LoadError
from veneer.planning import inspect_adapter


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.conv = nn.Conv1d(4, 6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(self.up(self.table(ids)).tanh())  # type: ignore[no-any-return]


def _saved(folder: Path, config: Any, trained: bool = True) -> Any:
    model = veneer.get_peft_model(Net(), config)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad and trained:
            p.data += 0.1 * torch.randn_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"down": 2}, "alpha_pattern": {"down": 10}},
        {"r": 4, "use_rslora": True},
        {"r": 4, "init_lora_weights": "pissa"},
    ],
)
def test_spectra_from_the_file_are_those_of_the_model(tmp_path: Path, fields: dict[str, Any]) -> None:
    targets = ["up", "down"] if "init_lora_weights" in fields else ["up", "down", "table", "conv"]
    model = _saved(tmp_path, veneer.LoraConfig(target_modules=targets, **fields))
    found = inspect_adapter(tmp_path)
    assert found.ok and found.method == "LORA" and set(found.layers) == set(targets)
    assert found.parameters == sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    for name, view in found.layers.items():
        layer = model.base_model.model.get_submodule(name)
        d = layer.get_delta_weight("default").detach().double().flatten(1)
        s = torch.linalg.svdvals(d)
        assert view.rank == layer.attached["default"].config.r
        torch.testing.assert_close(
            torch.tensor(view.singular[: len(s)], dtype=torch.float64), s[: len(view.singular)], atol=1e-6, rtol=1e-5
        )
        assert view.delta == pytest.approx(float(d.norm()), rel=1e-5)
        assert view.norms.keys() == view.tensors.keys()
    if "rank_pattern" in fields:
        assert found.ranks == {2: 1, 4: 3} and found.config["rank_pattern"] == {"down": 2}


@pytest.mark.parametrize("config", [
    veneer.LoHaConfig(r=2, target_modules=["up", "down"]), veneer.OFTConfig(r=0, oft_block_size=4, target_modules=["up"]),
    veneer.LoraConfig(r=2, use_dora=True, target_modules=["up"]), veneer.VeraConfig(r=4, target_modules=["up"]),
])  # fmt: skip
def test_with_the_base_model_every_method_has_spectra(tmp_path: Path, config: Any) -> None:
    model = _saved(tmp_path, config)
    found = inspect_adapter(tmp_path, Net())
    assert found.ok, found.problems
    for name, view in ((n, v) for n, v in found.layers.items() if n in ("up", "down")):
        d = model.base_model.model.get_submodule(name).get_delta_weight("default").detach().double()
        s = torch.linalg.svdvals(d)
        torch.testing.assert_close(torch.tensor(view.singular, dtype=torch.float64), s[: len(view.singular)], atol=2e-6, rtol=1e-4)


def _spoil(folder: Path, how: str) -> None:
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, fields = load_file(file), json.loads(config.read_text())
    first = "base_model.model.up.lora_A.weight"
    if how == "nan":
        tensors[first][0, 0] = float("nan")
    elif how == "half":
        del tensors[first]
    elif how == "shape":
        tensors[first] = torch.zeros(3, 12)
    elif how == "named":
        tensors = {k.replace("lora_A.", "lora_A.default."): t for k, t in tensors.items()}
    elif how == "rank":
        fields["r"] = 7
    elif how == "method":
        fields["peft_type"] = "LORAA"
    elif how == "field":
        fields["lora_alhpa"] = 3
    elif how == "value":
        fields["lora_dropout"] = 3
    elif how == "alpha":
        fields["lora_alpha"] = "x"
    elif how == "target":
        fields["target_modules"] = ["up", "down", "upp"]
    elif how == "json":
        config.write_text("{", encoding="utf-8")
        return
    elif how == "gone":
        config.unlink()
        return
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-40])
        return
    elif how == "empty":
        tensors = {}
    elif how == "zero":
        tensors = {k: t * ("lora_A" in k) for k, t in tensors.items()}
    elif how == "thin":
        tensors = {k: t.clone() for k, t in tensors.items()}
        for k in tensors:
            if "lora_B" in k:
                tensors[k][:, 1:] = 0
    save_file(tensors, file)
    config.write_text(json.dumps(fields), encoding="utf-8")


@pytest.mark.parametrize(
    ("how", "text", "fatal"),
    [
        ("nan", "not finite", True), ("half", "no 'lora_A.weight'", True), ("shape", "no factors of one rank", True),
        ("named", "hold an adapter's name", True), ("rank", "the config says rank 7, and the tensors have 4", True),
        ("method", "'LORA'", True), ("field", "Did you mean 'lora_alpha'", False), ("value", "lora_dropout", True),
        ("alpha", "`lora_alpha` should be a number", True),
        ("target", "Did you mean 'up'", False), ("json", "not JSON", True), ("gone", "There is no adapter_config.json", True),
        ("cut", "adapter_model.safetensors", True), ("empty", "adapter_model.safetensors holds no tensors", True),
        ("zero", "the adapter does nothing", True), ("thin", "effective rank of 1.0 of 4", False),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(tmp_path: Path, how: str, text: str, fatal: bool) -> None:
    _saved(tmp_path, veneer.LoraConfig(r=4, target_modules=["up", "down"]))
    assert not inspect_adapter(tmp_path).problems
    _spoil(tmp_path, how)
    found = inspect_adapter(tmp_path)
    assert any(text in p.text and p.fatal is fatal for p in found.problems), found.problems
    assert found.ok is not fatal


def test_files_of_any_kind_and_what_is_not_there(tmp_path: Path) -> None:
    _saved(tmp_path, veneer.LoraConfig(r=4, target_modules=["up", "down"]))
    file = inspect_adapter(tmp_path / "adapter_model.safetensors")
    assert file.ok and file.ranks == {4: 2}
    alone = tmp_path / "alone"
    alone.mkdir()
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), alone / "a.bin")
    found = inspect_adapter(alone / "a.bin")
    assert found.ok and found.ranks == {4: 2} and found.method == "?" and "no adapter_config.json" in found.problems[0].text
    save_file({k: t.to(torch.float8_e4m3fn) for k, t in load_file(tmp_path / "adapter_model.safetensors").items()}, alone / "b.safetensors")
    assert inspect_adapter(alone / "b.safetensors").ranks == {4: 2}
    with pytest.raises(ConfigError, match="could not be drawn"):
        found.picture(tmp_path / "nowhere" / "x.png")
    with pytest.raises(LoadError, match="Did you mean 'alone'"):
        inspect_adapter(tmp_path / "alnoe")


def test_the_command_shows_it_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("matplotlib")
    from veneer.cli import main

    _saved(tmp_path, veneer.LoraConfig(r=4, target_modules=["up", "down"]))
    monkeypatch.setenv("COLUMNS", "300")

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["veneer", "inspect", *words])
        with pytest.raises(SystemExit) as done:
            main.main()
        told = capsys.readouterr()
        return int(done.value.code or 0), told.out + told.err

    code, shown = run(str(tmp_path), "--picture", str(tmp_path / "p.png"))
    assert code == 0 and "LORA" in shown and "4 on 2 layers" in shown and "█" in shown
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    code, shown = run(str(tmp_path), "--json")
    assert json.loads(shown)["ranks"] == {"4": 2}
    _spoil(tmp_path, "nan")
    code, shown = run(str(tmp_path))
    assert code == 2 and "not finite" in shown
    code, shown = run(str(tmp_path / "nothing"))
    assert code == 2 and "There is no adapter" in shown
