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

from .golden.bases import CASES, call, rebuild

INDEX: dict[str, Any] = {c["case"]: c for c in json.loads((CASES / "INDEX.json").read_text())["cases"]}
WRONG = "do not take this merge as the reference"  # PEFT's own merge differs from its unmerged output

# methods that are there; the rest of the golden set waits for theirs
METHODS = {
    "BEFT", "C3A", "CARTRIDGE", "CPT", "DELORA", "FOURIERFT", "HIRA", "HRA", "IA3", "LOHA", "LORA", "MULTITASK_PROMPT_TUNING",
    "OFT", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VERA",
}  # fmt: skip
VARIANTS = ("lora_alora", "lora_arrow", "lora_bdlora", "lora_kasa", "lora_monteclora", "lora_velora")
NAMES = [n for n, c in INDEX.items() if c["peft_type"] in METHODS and n not in VARIANTS and n != "lora_corda"]


def _case(name: str) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor], float]:
    folder = CASES / name
    return (
        folder,
        json.loads((folder / "case.json").read_text()),
        load_file(folder / "io.safetensors"),
        INDEX[name].get("suggested_atol") or 1e-4,
    )


def _load(folder: Path, case: dict[str, Any]) -> Any:
    first, *rest = case["adapters"]
    model = veneer.PeftModel.from_pretrained(rebuild(folder), folder / case["adapters"][first], adapter_name=first)
    for name in rest:
        model.load_adapter(folder / case["adapters"][name], name)
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


@pytest.mark.parametrize("name", NAMES)
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
    old = json.loads((folder / case["adapters"][first] / "adapter_config.json").read_text())
    new = json.loads(((tmp_path if first == "default" else tmp_path / first) / "adapter_config.json").read_text())
    common = {k for k in old if k in new and k not in ("auto_mapping", "target_modules", "feedforward_modules", "base_model_name_or_path")}
    assert {k: old[k] for k in common} == {k: new[k] for k in common}
    assert not [k for k, v in old.items() if k not in new and v not in (None, False, "none")]


def test_corda_without_its_start_is_refused() -> None:
    """PEFT's file of a CorDA adapter lacks the base it was trained on, and PEFT cannot load it either."""
    folder, case, _, _ = _case("lora_corda")
    with pytest.raises(LoadError, match="adapter_init"):
        _load(folder, case)
