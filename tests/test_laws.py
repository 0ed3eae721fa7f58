"""Every law over every method there is, on every site it claims, and over further options of LoRA."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
import veneer.ops
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


def _lowrank(name: str, /, **members: object) -> type[Method]:
    """A method with two factors, of which some things are otherwise."""
    from veneer import Change, Leaf
    from veneer.method import Targeted
    from veneer.ops import LowRank

    def leaves(self: object, site: Any) -> dict[str, Leaf]:
        return {"own_A": Leaf((2, site.n_in), torch.nn.init.normal_), "own_B": Leaf((site.n_out, 2), torch.nn.init.zeros_)}

    def change(self: object, p: Any, site: object) -> Change:
        return Change(add=LowRank(p.own_B, p.own_A))

    bases: Any = members.pop("bases", (Targeted,))
    members = {"prefix": "own_", "leaves": leaves, "change": change, "__module__": __name__, **members}
    return dataclasses.dataclass(types.new_class(name, bases, {"peft_type": name}, lambda space: space.update(members)))  # type: ignore[return-value]


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.method import METHODS

    known = dict(METHODS)
    yield  # type: ignore[misc]
    METHODS.clear()
    METHODS.update(known)


def _leaf(fields: dict[str, Any], first: str = "own_A", second: str = "own_B", **more: Any) -> Any:
    from veneer import Leaf

    def leaves(self: object, site: Any) -> dict[str, Any]:
        a = Leaf((2, site.n_in), **{"init": torch.nn.init.normal_, **fields})
        return {first: a, second: Leaf((site.n_out, 2), torch.nn.init.zeros_, **more)}

    return leaves


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"leaves": lambda s, site: {"own_A": (2, 3)}}, "is a tuple, not a veneer.Leaf"),
        ({"leaves": _leaf({"container": "own"}, container="own")}, "would be kept where 'own_A' is"),
        ({"leaves": _leaf({}, "base_layer")}, "cannot be kept as 'base_layer'"),
        ({"leaves": _leaf({}, "weight")}, "cannot be kept as 'weight'"),
        ({"leaves": _leaf({"init": lambda t: torch.randn(t.shape)})}, "fill the one it gets in place"),
        ({"leaves": _leaf({"trainable": False, "saved": False})}, "such as from a seed"),
        ({"leaves": _leaf({}, "own_a")}, "asks for 'own_A'.*Did you mean 'own_a'"),
        (
            {"leaves": lambda s, site: {**_leaf({})(s, site), "own_c": veneer.Leaf((1,), torch.nn.init.zeros_)}},
            "no gradient reached.*own_c",
        ),
        ({"change": lambda s, p, site: veneer.ops.LowRank(p.own_B, p.own_A)}, "gives a LowRank, not a veneer.Change"),
        ({"change": lambda s, p, site: veneer.Change(add=p.own_B @ p.own_A)}, "gives a Parameter|gives a Tensor as `add`"),
        (
            {"change": lambda s, p, site: veneer.Change(left=veneer.ops.LowRank(p.own_B, p.own_A))},
            r"`left` is \(8, 12\).*has to be \(8, 8\)",
        ),
        ({"change": lambda s, p, site: veneer.Change(add=veneer.ops.Between(p.own_B, p.own_A, lambda h, x: h.tanh()))}, "in `unmergeable`"),
        ({"exceptions": {"merging": "?"}}, "`exceptions` names 'merging', which is no law"),
    ],
)
def test_what_is_wrong_with_a_method_of_ones_own_is_said(members: dict[str, Any], said: str) -> None:
    with pytest.raises(AssertionError, match=f"(?s){said}"):
        check_method(_lowrank("WRONG", **members), sites=["linear"], dtypes=(torch.float32,))


@pytest.mark.usefixtures("own")
def test_a_method_of_ones_own_is_checked_when_it_is_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _lowrank("RIGHT")
    monkeypatch.setitem(globals(), "RIGHT", right)  # where pickle looks for it
    assert check_method(right, sites=["linear"], dtypes=(torch.float32,))
    _lowrank("RIGHT")  # again, as in a notebook
    with pytest.raises(veneer.ConfigError, match="taken by another method"):
        _lowrank("RIGHT", __qualname__="Other")
    for name in ("LORA", "lora", "PROMPT_TUNING"):
        with pytest.raises(veneer.ConfigError, match="taken by another method"):
            _lowrank(name)
    with pytest.raises(veneer.ConfigError, match="Did you mean 'linear'"):
        _lowrank("KINDS", kinds=frozenset({"linaer"}))
    with pytest.raises(veneer.ConfigError, match="'sum' or 'chain', got 'add'"):
        _lowrank("STACKING", stacking="add")
    with pytest.raises(veneer.ConfigError, match="no `prefix`"):
        _lowrank("PREFIX", prefix="")


@pytest.mark.usefixtures("own")
def test_files_of_a_method_of_ones_own(tmp_path: Path) -> None:
    """A name in small letters is found again; what no file could say is refused; a file of a method that is not there says what to do."""
    from veneer.method import METHODS, Targeted

    small = _lowrank("small")
    small(target_modules=["0"]).save_pretrained(tmp_path)
    assert type(veneer.PeftConfig.from_pretrained(tmp_path)) is small
    del METHODS["small"]
    with pytest.raises(veneer.ConfigError, match="import the file that defines it"):
        veneer.PeftConfig.from_pretrained(tmp_path)

    class Bare(Targeted, peft_type="BARE"):
        prefix = "bare_"
        r: int = 4

    with pytest.raises(veneer.ConfigError, match=r"`r` is no field.*@dataclass"):
        Bare()
    with pytest.raises(veneer.ConfigError, match=r"no peft_type.*peft_type='NAMELESS'"):
        type("NamelessConfig", (Targeted,), {"prefix": "n_"})()
