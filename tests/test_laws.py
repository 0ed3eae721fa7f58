"""Every law over every method there is, on every site it claims, and over further options of LoRA."""

from __future__ import annotations

import pytest
import torch

import veneer
from veneer.method import Method, load_methods
from veneer.testing import LAWS, Case, Exempt, cases, check_method, examples, hold
from veneer.variants import BdLoraConfig, KasaConfig, VeloraConfig

BOTH = (torch.float32, torch.bfloat16)
METHODS = [m for m in load_methods().values() if issubclass(m, Method)]


def _lora(sites: list[str], **fields: object) -> tuple[Method, list[str], tuple[torch.dtype, ...]]:
    return veneer.LoraConfig(r=4, lora_alpha=8, **fields), sites, BOTH[:1]  # type: ignore[arg-type]


# what the methods' own examples leave out
OPTIONS = [
    _lora(["linear", "embedding", "conv2d"], use_rslora=True),
    _lora(["linear", "conv2d", "conv1d_transformers"], lora_dropout=0.3),
    _lora(["linear", "conv2d", "attention"], lora_bias=True),
    _lora(["linear"], use_dora=True, init_lora_weights="pissa"),
    *[_lora(["linear", "embedding", "parameter_2d"], init_lora_weights=k) for k in ("pissa", "olora", "orthogonal")],
    *[_lora(["linear", "conv1d_transformers"], init_lora_weights=k) for k in ("gaussian", "mica", False)],
    _lora(["linear"], use_bdlora=BdLoraConfig(["site"], None, 2)),
    _lora(["linear"], velora_config=VeloraConfig(num_groups=3, init_type="random")),
    _lora(["linear"], kasa_config=KasaConfig(), lora_dropout=0.3),
]
CASES = [
    *[(str(i), case) for m in METHODS for i, config in enumerate(examples(m)) for case in cases([config], dtypes=BOTH)],
    *[(f"option{i}", case) for i, (config, sites, dtypes) in enumerate(OPTIONS) for case in cases([config], sites, dtypes)],
]
SLOW = {"compiles_whole"}


def _params() -> list[object]:
    out = []
    for i, case in CASES:
        for name in LAWS:
            slow = name in SLOW and not (
                case.dtype == torch.float32 and case.site in ("linear", "embedding", "conv2d", "attention", "parameter_3d", "module_nested")
            )
            out.append(pytest.param(name, case, id=f"{name}-{i}-{case}", marks=[pytest.mark.slow] if slow else []))
    return out


@pytest.mark.parametrize(("law", "case"), _params())
def test_law(law: str, case: Case) -> None:
    try:
        if not hold(law, case):
            assert case.config.exceptions[law]  # with its reason
    except Exempt as e:
        assert str(e)  # a law says why it does not speak


def test_every_method_takes_a_site() -> None:
    """No method is exempt from everything."""
    for m in METHODS:
        assert any(not case.refused for config in examples(m) for case in cases([config])), m


def test_check_method_finds_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit is no rubber stamp: a change that disagrees with its own weight is caught."""
    from veneer.ops import LowRank

    monkeypatch.setattr(LowRank, "dense", lambda self: (self.up @ self.down) * self.scale * 1.5)
    with pytest.raises(AssertionError, match=r"changed_weight|merged"):
        check_method(veneer.LoraConfig(r=4), sites=["linear"], dtypes=(torch.float32,))


def test_check_method_is_strict_about_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(veneer.IA3Config, "exceptions", {"unmerging_is_exact": "for the test"})
    with pytest.raises(AssertionError, match="declared not to"):
        check_method(veneer.IA3Config, sites=["linear"], dtypes=(torch.float32,))
