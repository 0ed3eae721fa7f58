"""Adapters that PEFT 0.21.2 wrote: the same outputs, merged too, and the same file on saving again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from veneer.errors import LoadError
from veneer.method import load_methods

from .golden.bases import CASES, call, rebuild

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not bring the start values"
)  # LoRA-GA: the bases here are those that PEFT has changed

INDEX: dict[str, Any] = {c["case"]: c for c in json.loads((CASES / "INDEX.json").read_text())["cases"]}
WRONG = "do not take this merge as the reference"  # PEFT's own merge differs from its unmerged output

# methods that are there; the rest of the golden set waits for theirs
METHODS = set(load_methods())
ROUTERS = ("lora_arrow", "xlora")  # their experts are files of their own
NAMES = [n for n, c in INDEX.items() if c["peft_type"] in METHODS and n != "lora_corda"]


def _case(name: str) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor], float]:
    folder = CASES / name
    return (
        folder,
        json.loads((folder / "case.json").read_text()),
        load_file(folder / "io.safetensors"),
        INDEX[name].get("suggested_atol") or 1e-4,
    )


def _load(folder: Path, case: dict[str, Any]) -> Any:
    if folder.name in ROUTERS:
        return _load_router(folder, case)
    first, *rest = case["adapters"]
    model = veneer.PeftModel.from_pretrained(rebuild(folder), folder / case["adapters"][first], adapter_name=first)
    for name in rest:
        model.load_adapter(folder / case["adapters"][name], name)
    return model.eval()


def _load_router(folder: Path, case: dict[str, Any]) -> Any:
    how = case["outputs"]["output.adapted"]
    if isinstance(how, dict):
        how = how["create_arrow_model"]
        paths = [str(folder / p) for p in how["task_specific"]]
        return veneer.create_arrow_model(rebuild(folder), paths, veneer.ArrowConfig(**how["arrow_config"])).eval()
    with pytest.warns(veneer.PeftWarning, match=r"layers\.0\.weight"):
        model = veneer.PeftModel.from_pretrained(rebuild(folder), folder / case["adapters"]["default"])
    parameters = dict(model.named_parameters())
    for key, value in load_file(folder / "io.safetensors").items():  # what PEFT has left out of the file
        if key.startswith("weights."):
            (name,) = (n for n in parameters if n.endswith(key.removeprefix("weights.")))
            parameters[name].data.copy_(value)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_output(name: str) -> None:
    folder, case, io, atol = _case(name)
    torch.testing.assert_close(call(_load(folder, case), case, io), io["output.adapted"], atol=atol, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_disabled_is_the_base(name: str) -> None:
    folder, case, io, atol = _case(name)
    model = _load(folder, case)
    with model.disable_adapter():
        torch.testing.assert_close(call(model, case, io), io["output.base"], atol=atol, rtol=0)


@pytest.mark.parametrize("name", [n for n in NAMES if INDEX[n]["merge"] == "ok"])
def test_merged(name: str) -> None:
    folder, case, io, atol = _case(name)
    wrong = any(WRONG in note for note in case["notes"])
    expected = io["output.adapted" if wrong or "output.merged" not in io else "output.merged"]
    torch.testing.assert_close(call(_load(folder, case).merge_and_unload(), case, io), expected, atol=10 * atol, rtol=0)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ROUTERS])
def test_saved_again(name: str, tmp_path: Path) -> None:
    folder, case, _, _ = _case(name)
    first = next(iter(case["adapters"]))
    _load(folder, case).save_pretrained(tmp_path)
    want = load_file(folder / case["adapters"][first] / "adapter_model.safetensors")
    got = load_file((tmp_path if first == "default" else tmp_path / first) / "adapter_model.safetensors")
    assert set(got) == set(want)
    for key in want:
        assert got[key].dtype == want[key].dtype
        assert torch.equal(got[key], want[key]), key
    _same_config(folder / case["adapters"][first], tmp_path if first == "default" else tmp_path / first)


def _same_config(theirs: Path, ours: Path) -> None:
    old, new = (json.loads((f / "adapter_config.json").read_text()) for f in (theirs, ours))
    common = {k for k in old if k in new and k not in ("auto_mapping", "target_modules", "feedforward_modules", "base_model_name_or_path")}
    assert {k: old[k] for k in common} == {k: new[k] for k in common}
    assert not [k for k, v in old.items() if k not in new and v not in (None, False, "none")]


@pytest.mark.parametrize(("name", "router"), [("lora_arrow", "arrow_router"), ("xlora", "default")])
def test_routers_saved_again(name: str, router: str, tmp_path: Path) -> None:
    """The router's config, its tensors (those of Arrow's are drawn anew, and say nothing) and the experts bit for bit; loaded again, the same output."""
    folder, case, io, atol = _case(name)
    model = _load(folder, case)
    model.save_pretrained(tmp_path)
    ours = tmp_path if router == "default" else tmp_path / router
    want, got = (load_file(f / "adapter_model.safetensors") for f in (folder / case["adapters"][router], ours))
    if name == "xlora":  # PEFT's file is not whole
        assert set(got) == {f"base_model.internal_xlora_classifier.layers.{k}.{n}" for k in (0, 3) for n in ("weight", "bias")}
        assert all(torch.equal(got[k], want[k]) for k in want)
    else:
        assert {k: t.shape for k, t in got.items()} == {k: t.shape for k, t in want.items()}
    _same_config(folder / case["adapters"][router], ours)
    for i, path in enumerate(p for n, p in sorted(case["adapters"].items()) if n != router):
        want, got = (
            load_file(f / "adapter_model.safetensors")
            for f in (folder / path, tmp_path / (f"task_{i}" if name == "lora_arrow" else str(i)))
        )
        assert set(got) == set(want) and all(torch.equal(got[k], want[k]) for k in want)
    again = veneer.PeftModel.from_pretrained(rebuild(folder), ours, adapter_name=router).eval()
    torch.testing.assert_close(call(again, case, io), io["output.adapted"], atol=atol, rtol=0)


def test_corda_without_its_start_is_refused() -> None:
    """PEFT's file of a CorDA adapter lacks the base it was trained on, and PEFT cannot load it either."""
    folder, case, _, _ = _case("lora_corda")
    with pytest.raises(LoadError, match="adapter_init"):
        _load(folder, case)
