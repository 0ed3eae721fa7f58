"""Which modules and parameters a config hits."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.config import PeftConfig
from veneer.engine import defaults
from veneer.engine.select import Coverage, Selection, match, minimal_targets, places, select, suffixes
from veneer.errors import ConfigError, NoMatchingPeftModuleError, PeftWarning
from veneer.method import by_pattern


@dataclass
class Config(PeftConfig):
    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    rank_pattern: Any = field(default_factory=dict)
    alpha_pattern: Any = field(default_factory=dict)
    target_parameters: Any = None
    prefix: ClassVar[str] = "lora_"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.peft_type or "LORA"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.v_proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 1)


class Toy(nn.Module):
    """Layers below `model.layers`, a second stack at the top, and heads."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(4, 2)
        self.emb = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([Block()])


class ModelConfig:
    def __init__(self, model_type: str) -> None:
        self.model_type = model_type


SUPPORTED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.MultiheadAttention)


def pick(model: nn.Module, *, state_dict: Any = None, strict: bool = True, supports: Any = None, **fields: Any) -> Selection:
    config = Config(**fields)
    before_config, before = repr(config), [n for n, _ in model.named_modules()]
    try:
        return select(
            model,
            config,
            supports=supports or (lambda m: isinstance(m, SUPPORTED)),
            state_dict=state_dict,
            strict=strict,
        )
    finally:
        assert repr(config) == before_config
        assert [n for n, _ in model.named_modules()] == before


def hits(model: nn.Module, **kwargs: Any) -> list[str]:
    return list(pick(model, **kwargs).modules)


class Adapted(nn.Module):
    """What `select` may know of an adapted layer."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})

    def adapter_slots(self, adapter: str) -> Iterator[Any]:
        return iter(())


class Saved(nn.Module):
    """What `select` may know of a module with trained copies."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": nn.Linear(4, 2)})

    def adapter_slots(self, adapter: str) -> Iterator[Any]:
        return iter(())


class Tokens(nn.Module):
    """What `select` may know of an embedding with trained rows."""

    def __init__(self, token_adapter: Adapted) -> None:
        super().__init__()
        self.token_adapter = token_adapter

    def adapter_slots(self, adapter: str) -> Iterator[Any]:
        return iter(())


# ---------------------------------------------------------------- names


def test_suffixes_and_match() -> None:
    assert list(suffixes("a.b.c")) == ["a.b.c", "b.c", "c"]
    names = ["a.proj", "a.q_proj", "proj", "b.a.proj"]
    assert match(names, ["proj"]) == ["a.proj", "proj", "b.a.proj"]
    assert match(names, ["a.proj"]) == ["a.proj", "b.a.proj"]
    assert match(names, r"a\..*") == ["a.proj", "a.q_proj"]
    assert match(names, "proj") == ["proj"]
    assert match(names, []) == []


def test_by_pattern_takes_the_first_key_that_fits() -> None:
    assert by_pattern({"q": 3, "layers.0.q": 5}, "model.layers.0.q", 8) == 3
    assert by_pattern({"layers.0.q": 5, "q": 3}, "model.layers.0.q", 8) == 5
    assert by_pattern({"q|v": 4}, "a.v", 8) == 4
    assert by_pattern({"^layers.0.q": 4}, "model.layers.0.q", 8) == 8
    assert by_pattern({"q": 4}, "a.xq", 8) == 8
    assert by_pattern({}, "a.q", 8) == by_pattern(None, "a.q", 8) == 8


@pytest.mark.parametrize(
    ("hit", "others", "expected"),
    [
        (["a.b.q", "a.c.q", "x.y"], ["foo.lin", "b.z", "d.q"], ["b.q", "c.q", "y"]),
        (["a.b.q", "q"], ["foo.lin", "b.z"], ["q"]),
        (["m.0.q", "m.1.q", "m.0.v", "m.1.v"], ["m", "m.0", "m.1", "o.q"], ["0.q", "1.q", "v"]),
        (["lin"], ["foo.lin"], ["lin"]),
        ([], ["a"], []),
    ],
)
def test_minimal_targets(hit: list[str], others: list[str], expected: list[str]) -> None:
    assert minimal_targets(hit, others) == expected


def test_minimal_targets_hit_all_and_nothing_else() -> None:
    names = [n for n, _ in Toy().named_modules() if n]
    for step in range(2, 6):
        chosen = names[::step]
        others = [n for n in names if n not in chosen]
        ends = minimal_targets(chosen, others)
        ambiguous = [n for n in chosen if any(o.endswith("." + n) for o in others)]
        if not ambiguous:
            assert match(names, ends) == chosen


# ---------------------------------------------------------------- target_modules


ALL_Q = ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.2.q_proj", "layers.0.q_proj"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj"]}, ALL_Q),
        ({"target_modules": ["0.q_proj", "head"]}, ["model.layers.0.q_proj", "head", "layers.0.q_proj"]),
        ({"target_modules": r".*layers\.[01]\.q_proj"}, [ALL_Q[0], ALL_Q[1], ALL_Q[3]]),
        ({"target_modules": ["q_proj"], "exclude_modules": ["layers.0.q_proj"]}, [ALL_Q[1], ALL_Q[2]]),
        ({"target_modules": ["q_proj"], "exclude_modules": r"model.*"}, [ALL_Q[3]]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, [ALL_Q[1]]),
        # without a pattern two names have to stand before the number: the stack at the top does not count
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, [ALL_Q[0], ALL_Q[2]]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, [ALL_Q[0], ALL_Q[3]]),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
            [ALL_Q[0], ALL_Q[3]],
        ),
        # a whole name counts whatever the layers
        (
            {"target_modules": ["q_proj", "head", "model.layers.2.v_proj"], "layers_to_transform": [0]},
            [ALL_Q[0], "model.layers.2.v_proj", "head"],
        ),
        ({"target_modules": "dummy-target-modules"}, []),
    ],
    ids=str,
)
def test_targets(fields: dict[str, Any], expected: list[str]) -> None:
    selection = pick(Toy(), **fields)
    assert list(selection.modules) == expected
    spec = fields["target_modules"]
    assert selection.resolved_targets == (spec if isinstance(spec, str) else set(spec))


def test_modules_are_those_of_the_model() -> None:
    model = Toy()
    selection = pick(model, target_modules=["head", "emb"])
    assert selection.modules == {"head": model.head, "emb": model.emb}
    assert selection.names == {"head": "head", "emb": "emb"}


def test_every_entry_has_to_match() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=r"'qproj' matches no module.*Did you mean 'q_proj'\?.*'v_proj'"):
        pick(Toy(), target_modules=["v_proj", "qproj"])
    with pytest.raises(NoMatchingPeftModuleError, match=r"'layers.0.qproj' matches.*'layers.0.q_proj'"):
        pick(Toy(), target_modules=["v_proj", "layers.0.qproj"])
    with pytest.raises(NoMatchingPeftModuleError, match="Target modules 'zzz' not found in the base model"):
        pick(Toy(), target_modules=["zzz"])
    with pytest.raises(NoMatchingPeftModuleError, match=r"'zzz' matches no module"):
        pick(Toy(), target_modules=["zzz"], target_parameters=["head.weight"])
    with pytest.raises(NoMatchingPeftModuleError, match=r"'z.*' matches no module"):
        pick(Toy(), target_modules="z.*", target_parameters=["head.weight"])


def test_a_str_that_matches_nothing_explains_itself() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=r"whole name; for the ends of names, give a list: \['q_proj'\]"):
        pick(Toy(), target_modules="q_proj")


def test_when_reading_an_adapter_unmatched_entries_are_allowed() -> None:
    for lenient in ({"strict": False}, {"inference_mode": True}):
        selection = pick(Toy(), target_modules=["v_proj", "zzz"], modules_to_save=["gone"], rank_pattern={"no": 3}, **lenient)
        assert len(selection.modules) == 4 and selection.unmatched == ["gone", "zzz"]
        assert selection.resolved_targets == {"v_proj", "zzz"}
        with pytest.raises(NoMatchingPeftModuleError, match="not found"):
            pick(Toy(), target_modules=["zzz"], **lenient)


def test_the_reasons_for_hitting_nothing_differ() -> None:
    with pytest.raises(
        NoMatchingPeftModuleError,
        match=r"all that the targets hit is left out \(head: excluded by exclude_modules\)\. C",
    ):
        pick(Toy(), target_modules=["head"], exclude_modules=["head"])
    with pytest.raises(NoMatchingPeftModuleError, match=r"head: trained whole \(modules_to_save\)"):
        pick(Toy(), target_modules=["head"], modules_to_save=["head"])
    with pytest.raises(NoMatchingPeftModuleError, match=r"head: excluded.*'zzz' matches nothing"):
        pick(Toy(), target_modules=["head", "zzz"], exclude_modules=["head"])
    with pytest.raises(NoMatchingPeftModuleError, match=r"Only the layers \[9\] count.*two names have to stand before"):
        pick(Toy(), target_modules=["q_proj"], layers_to_transform=[9])
    with pytest.raises(NoMatchingPeftModuleError, match="No `target_modules` passed but also no `target_parameters`"):
        pick(Toy(), target_modules=[])
    with pytest.raises(NoMatchingPeftModuleError, match=r"put it into an nn\.Sequential"):
        pick(nn.Linear(2, 2), target_modules="all-linear")


def test_layers_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"no layers \[7\].*It has the layers 0 to 2"):
        pick(Toy(), target_modules=["q_proj"], layers_to_transform=[0, 7])
    assert hits(Toy(), target_modules=["q_proj"], layers_to_transform=[0, 7], strict=False) == [ALL_Q[0]]
    with pytest.raises(NoMatchingPeftModuleError, match=r"'0.v_proj' is in none of the layers 1.*whole name"):
        pick(Toy(), target_modules=["q_proj", "0.v_proj"], layers_to_transform=1)


def test_an_entry_that_is_wholly_excluded_is_no_mistake() -> None:
    selection = pick(Toy(), target_modules=["q_proj", "head"], exclude_modules=["head"])
    assert list(selection.modules) == ALL_Q
    assert selection.skipped == {"head": "excluded by exclude_modules"}
    assert selection.coverage["head"] == Coverage(0, 0, 0)


@pytest.mark.parametrize("spec", [["nope"], ["head", "nope"], "nope"])
def test_an_exclusion_that_excludes_nothing_warns(spec: Any) -> None:
    with pytest.warns(PeftWarning, match="'nope' matches no module"):
        assert hits(Toy(), target_modules=["q_proj"], exclude_modules=spec) == ALL_Q


def test_unsupported_targets_are_named() -> None:
    for spec in (["q_proj", "norm"], r".*(q_proj|norm)"):
        with pytest.raises(ConfigError, match=r"Target module 'model.layers.0.norm' \(LayerNorm\) is not supported"):
            pick(Toy(), target_modules=spec)
    with pytest.raises(ConfigError, match=r"'model' \(Module\) is not supported.*in it there are 'conv', 'q_proj', 'v_proj'"):
        pick(Toy(), target_modules=["model"])
    assert "model.layers.0.norm" not in hits(Toy(), target_modules=["q_proj", "norm"], exclude_modules=["norm"])


def test_coverage_counts_layers() -> None:
    model = Toy(4)
    del model.model.layers[2].v_proj
    cover = pick(model, target_modules=["q_proj", "v_proj", "head", "layers.0.conv"]).coverage
    assert cover["q_proj"] == Coverage(5, 5, 5)
    assert cover["v_proj"] == Coverage(4, 4, 5)
    assert cover["head"] == Coverage(1, 0, 0)
    assert cover["layers.0.conv"] == Coverage(2, 2, 5)
    assert pick(model, target_modules=r"model.*v_proj").coverage == {"v_proj": Coverage(3, 3, 4)}
    assert pick(model, target_modules="all-linear").coverage["v_proj"] == Coverage(4, 4, 5)


# ---------------------------------------------------------------- all-linear


def test_all_linear() -> None:
    selection = pick(Toy(1), target_modules="All-Linear")
    expected = ["model.layers.0.q_proj", "model.layers.0.v_proj", "head", "layers.0.q_proj", "layers.0.v_proj"]
    assert list(selection.modules) == expected
    # `layers.0.q_proj` is the end of `model.layers.0.q_proj`, but both are hit
    assert selection.resolved_targets == set(expected)


def test_all_linear_lists_what_it_cannot_adapt() -> None:
    model = Toy(1)
    model.head = nn.LazyLinear(2)
    selection = pick(
        model,
        target_modules="all-linear",
        supports=lambda m: isinstance(m, nn.Linear) and not isinstance(m, nn.LazyLinear),
    )
    assert "head" not in selection.modules and "LazyLinear" in selection.skipped["head"]
    assert "head" not in selection.resolved_targets  # type: ignore[operator]


def test_all_linear_is_written_so_that_it_hits_the_same_again() -> None:
    # an unsupported `a.lin` ends like the adapted `lin`: no list of names can tell them apart
    model = nn.ModuleDict({"lin": nn.Linear(2, 2), "a": nn.ModuleDict({"lin": nn.LazyLinear(2)}), "b": nn.Linear(2, 2)})
    supports = lambda m: isinstance(m, nn.Linear) and not isinstance(m, nn.LazyLinear)
    selection = pick(model, target_modules="all-linear", supports=supports)
    assert isinstance(selection.resolved_targets, str)
    assert list(pick(model, target_modules=selection.resolved_targets, supports=supports).modules) == ["lin", "b"]


def test_long_lists_become_short_ends_of_names() -> None:
    model = Toy(12)
    every = pick(model, target_modules="all-linear")
    assert len(every.modules) == 27 and every.resolved_targets == {"q_proj", "v_proj", "head"}
    some = [n for n in every.modules if n not in ("layers.0.q_proj", "model.layers.5.v_proj")]
    selection = pick(model, target_modules=some)
    assert list(selection.modules) == some
    assert list(pick(model, target_modules=selection.resolved_targets).modules) == list(selection.modules)
    some = [n for n in every.modules if n != "model.layers.5.v_proj"]
    short = pick(model, target_modules=some).resolved_targets
    assert isinstance(short, set) and {"q_proj", "head", "11.v_proj"} <= short and len(short) < len(some)
    assert hits(model, target_modules=short) == some
    # a second look at the same names through feedforward_modules (IA3) needs them as they are
    config = Config(target_modules="all-linear")
    config.feedforward_modules = []  # type: ignore[attr-defined]
    kept = select(model, config, supports=lambda m: isinstance(m, SUPPORTED))
    assert kept.resolved_targets == set(every.modules)


def test_short_lists_keep_the_users_spelling() -> None:
    spec = [f"layers.{i}.q_proj" for i in range(9)]
    assert pick(Toy(9), target_modules=spec).resolved_targets == set(spec)


def test_quantised_linear_layers_count_as_linear() -> None:
    class Packed(nn.Module):
        in_features, out_features = 4, 4

    model = nn.ModuleDict({"a": Packed(), "b": nn.Linear(4, 4), "c": Packed()})
    assert hits(model, target_modules="all-linear", supports=lambda m: m is model["a"] or isinstance(m, nn.Linear)) == [
        "a",
        "b",
    ]


# ---------------------------------------------------------------- tables


def with_type(model: nn.Module, model_type: str) -> nn.Module:
    model.config = ModelConfig(model_type)  # type: ignore[assignment]
    return model


def test_without_targets_the_model_type_decides() -> None:
    model = with_type(Toy(1), "llama")
    selection = pick(model)
    assert list(selection.modules) == [f"{s}layers.0.{n}" for s in ("model.", "") for n in ("q_proj", "v_proj")]
    assert selection.resolved_targets == {"q_proj", "v_proj"}
    model.config = {"model_type": "llama"}  # type: ignore[assignment]
    assert list(pick(model).modules) == list(selection.modules)


def test_a_table_may_name_more_than_the_model_has() -> None:
    selection = pick(with_type(Toy(1), "blip-2"))
    assert len(selection.modules) == 4 and selection.unmatched == []
    assert selection.resolved_targets == {"q", "v", "q_proj", "v_proj"}


def test_a_table_may_be_a_regular_expression() -> None:
    model = with_type(nn.ModuleDict({"language_model": Toy(1), "vision": Toy(1)}), "gemma4")
    assert {n.partition(".")[0] for n in hits(model)} == {"language_model"}


def test_no_table_is_an_error_with_suggestions() -> None:
    with pytest.raises(ConfigError, match=r"Please specify `target_modules` in `peft_config`.*no `config.model_type`.*'q_proj'"):
        pick(Toy())
    with pytest.raises(ConfigError, match="no table for 'mystery'"):
        pick(with_type(Toy(), "mystery"))
    with pytest.raises(ConfigError, match="no table for 'llama'"):
        pick(with_type(Toy(), "llama"), peft_type="MINE")


def test_a_method_may_know_its_default_targets() -> None:
    config = Config()
    config.default_targets = lambda model: r"emb"  # type: ignore[attr-defined]
    selection = select(with_type(Toy(), "llama"), config, supports=lambda m: True)
    assert list(selection.modules) == ["emb"] and selection.resolved_targets == "emb"


def test_target_parameters_stand_beside_the_table() -> None:
    assert pick(Toy(1), target_parameters=["head.weight"]).modules == {}
    both = pick(with_type(Toy(1), "llama"), target_parameters=["head.weight"])
    assert len(both.modules) == 4 and both.parameters == ["head.weight"]


def test_tables_are_those_of_peft() -> None:
    tables = {name: getattr(defaults, name) for name in defaults.constant_names()}
    digest = hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()
    assert len(tables) == 36
    assert tables["TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"]["phi"] == ["q_proj", "v_proj", "fc1", "fc2"]
    assert tables["TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING"]["gptj"] == ["ln_1", "ln_f"]
    assert tables["TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"]["mt5"] == []
    assert "btlm" not in tables["TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING"]
    assert digest == "3b9e51d5a7cd1684c2a0f844b2677e896c7fa0951e12be3f825a1d6f887527a5"
    with pytest.raises(AttributeError):
        _ = defaults.TRANSFORMERS_MODELS_TO_NOTHING_TARGET_MODULES_MAPPING


def test_what_a_user_adds_to_a_table_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(defaults.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "mystery", ["conv"])  # type: ignore[arg-type]
    assert hits(with_type(Toy(1), "mystery")) == ["model.layers.0.conv", "layers.0.conv"]
    table = defaults.TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING["llama"]
    assert table == ["q_proj", "v_proj"] and table is not defaults.TABLES["LORA"]["llama"]


# ---------------------------------------------------------------- modules_to_save


def test_what_is_saved_whole_is_no_target() -> None:
    model = Toy(1)
    selection = pick(model, target_modules="all-linear", modules_to_save=["head", "model.layers.0"])
    assert selection.to_save == {"model.layers.0": model.model.layers[0], "head": model.head}
    assert list(selection.modules) == ["layers.0.q_proj", "layers.0.v_proj"]
    assert selection.skipped["head"] == selection.skipped["model.layers.0.q_proj"] == "trained whole (modules_to_save)"
    assert selection.resolved_targets in (
        {"layers.0.q_proj", "layers.0.v_proj"},
        r"layers\.0\.q_proj|layers\.0\.v_proj",
    )


def test_modules_inside_saved_ones_are_saved_with_them() -> None:
    selection = pick(nn.ModuleDict({"net": Toy(1), "x": nn.Linear(2, 2)}), target_modules=["x"], modules_to_save=["net", "norm"])
    assert list(selection.to_save) == ["net"]


def test_every_module_to_save_has_to_exist() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=r"modules_to_save: 'haed' matches no module.*Did you mean 'head'"):
        pick(Toy(), target_modules=["q_proj"], modules_to_save=["haed"])
    with pytest.raises(ConfigError, match="a ModuleList has no forward"):
        pick(Toy(), target_modules=["emb"], modules_to_save=["layers"])


def test_heads_of_the_task_need_not_all_exist() -> None:
    model = nn.ModuleDict({"q": nn.Linear(2, 2), "classifier": nn.Linear(2, 2), "pre_classifier": nn.Linear(2, 2)})
    for task in ("SEQ_CLS", "TOKEN_CLS"):
        selection = pick(model, target_modules=["q"], task_type=task, modules_to_save=["classifier", "score"])
        # as in PEFT the end of a name needs no dot: DistilBERT's pre_classifier is new, too
        assert list(selection.to_save) == ["classifier", "pre_classifier"]
    with pytest.raises(NoMatchingPeftModuleError, match="'score'"):
        pick(model, target_modules=["q"], modules_to_save=["classifier", "score"])
    with pytest.warns(PeftWarning, match="no module is called qa_outputs: the head stays frozen"):
        pick(model, target_modules=["q"], task_type="QUESTION_ANS", modules_to_save=["qa_outputs"])


# ---------------------------------------------------------------- patterns


def test_pattern_keys_have_to_fit() -> None:
    with pytest.raises(ConfigError, match=r"rank_pattern: 'qproj' fits none of the 4 adapted modules.*Did you mean 'q_proj'"):
        pick(Toy(), target_modules=["q_proj"], rank_pattern={r".*\.0\.q_proj": 3, "qproj": 4})
    with pytest.raises(ConfigError, match="alpha_pattern: 'v_proj'"):
        pick(Toy(), target_modules=["q_proj"], alpha_pattern={"v_proj": 4})
    pick(Toy(), target_modules=["q_proj"], rank_pattern={"layers.0.q_proj": 3}, alpha_pattern={"q_.*": 2.5})
    # lists are what AdaLoRA has found out in training
    pick(Toy(), target_modules=["q_proj"], rank_pattern={"x.lora_E": [True, False]})


def test_patterns_know_parameters_by_their_whole_names() -> None:
    pick(Toy(), target_parameters=["head.weight"], rank_pattern={"head.weight": 3})
    with pytest.raises(ConfigError, match="rank_pattern: 'head'"):
        pick(Toy(), target_parameters=["head.weight"], rank_pattern={"head": 3})


# ---------------------------------------------------------------- target_parameters


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(2, 4, 4))
        self.down = nn.Parameter(torch.zeros(2, 4, 4))
        self.gate = nn.Linear(4, 2)
        self.register_parameter("none", None)


def experts() -> nn.Module:
    return nn.ModuleDict({"b": nn.ModuleDict({"experts": Experts()}), "a": nn.ModuleDict({"experts": Experts()})})


def test_target_parameters() -> None:
    selection = pick(experts(), target_parameters=["up", "a.experts.down"], target_modules=["gate"], exclude_modules=r"a\..*")
    assert selection.parameters == ["b.experts.up", "a.experts.up", "a.experts.down"]
    assert list(selection.modules) == ["b.experts.gate"]
    assert selection.names["a.experts"] == "a.experts"
    assert selection.coverage["up"].count == 2
    assert pick(experts(), target_parameters=["up"], target_modules=[]).resolved_targets == set()
    assert pick(experts(), target_parameters=["up"]).resolved_targets is None


def test_every_parameter_has_to_exist() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=r"target_parameters: 'upp' matches no parameter.*Did you mean 'up'"):
        pick(experts(), target_parameters=["upp", "down"])
    with pytest.raises(NoMatchingPeftModuleError, match=r"target_parameters: 'none' matches no parameter"):
        pick(experts(), target_parameters=["none"], target_modules=["gate"])
    with pytest.raises(NoMatchingPeftModuleError, match=r"no `target_parameters` found.*Did you mean 'down'"):
        pick(experts(), target_parameters=["dwn"])
    assert pick(experts(), target_parameters=["upp", "down"], strict=False).unmatched == ["upp"]


def test_parameters_of_saved_modules_are_left_to_them() -> None:
    selection = pick(experts(), target_parameters=["up"], modules_to_save=["b.experts"])
    assert selection.parameters == ["a.experts.up"] and "b.experts.up" in selection.skipped


# ---------------------------------------------------------------- modules adapted already


def test_adapted_layers_stand_for_their_modules() -> None:
    model = Toy(2)
    layer = model.model.layers[0].q_proj = Adapted(model.model.layers[0].q_proj)  # type: ignore[assignment]
    for spec in (["q_proj"], r".*\.q_proj"):
        selection = pick(model, target_modules=spec)
        assert list(selection.modules) == ["model.layers.0.q_proj", "model.layers.1.q_proj", "layers.0.q_proj"]
        assert selection.modules["model.layers.0.q_proj"] is layer
    every = pick(model, target_modules="all-linear")
    assert len(every.modules) == 7
    assert every.resolved_targets == set(hits(Toy(2), target_modules="all-linear"))
    with pytest.raises(NoMatchingPeftModuleError):
        pick(model, target_modules=["default"])
    with pytest.raises(NoMatchingPeftModuleError):
        pick(model, target_modules=["base_layer"])


def test_modules_inside_adapted_ones_keep_their_names() -> None:
    model = experts()
    model["a"]["experts"] = Adapted(Adapted(model["a"]["experts"]))  # type: ignore[index, operator]
    selection = pick(model, target_modules=["gate"], target_parameters=["experts.up"])
    path = "a.experts.base_layer.base_layer.gate"
    assert list(selection.modules) == ["b.experts.gate", path]
    assert selection.modules[path] is model.get_submodule(path)
    assert selection.names[path] == "a.experts.gate"
    assert selection.parameters == ["b.experts.up", "a.experts.up"]
    assert hits(model, target_modules=["a.experts.gate"]) == [path]
    assert pick(model, target_modules="all-linear").resolved_targets == {"a.experts.gate", "b.experts.gate"}


def test_modules_with_trained_copies() -> None:
    model = Toy(1)
    model.head = Saved(model.head)  # type: ignore[assignment]
    selection = pick(model, target_modules="all-linear")
    assert not any("head" in n for n in selection.modules)
    assert "another adapter trains it whole" in selection.skipped["head"]
    with pytest.raises(ConfigError, match=r"'head'.*another adapter trains it whole"):
        pick(model, target_modules=["q_proj", "head"])
    again = pick(model, target_modules=["q_proj"], modules_to_save=["head"])
    assert again.to_save == {"head": model.head}


def test_adapted_modules_are_not_saved_whole() -> None:
    model = Toy(1)
    model.head = Adapted(model.head)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="modules_to_save: 'head' cannot be trained whole: 'head' is adapted already"):
        pick(model, target_modules=["q_proj"], modules_to_save=["head"])
    model.model.layers[0].q_proj = Adapted(model.model.layers[0].q_proj)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"'model.layers.0.q_proj' is adapted already"):
        pick(model, target_modules=["emb"], modules_to_save=["model.layers.0"])


def test_embeddings_with_trained_rows() -> None:
    model = Toy(1)
    model.emb = Tokens(Adapted(model.emb))  # type: ignore[assignment]
    selection = pick(model, target_modules=["emb"])
    assert list(selection.modules) == ["emb.token_adapter"]
    assert selection.names == {"emb.token_adapter": "emb"}


def test_wrappers_leave_no_trace_in_names() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._checkpoint_wrapped_module = module

    model = Toy(1)
    model.model.layers[0] = Wrapper(model.model.layers[0])
    selection = pick(model, target_modules="all-linear")
    path = "model.layers.0._checkpoint_wrapped_module.q_proj"
    assert selection.names[path] == "model.layers.0.q_proj" and selection.modules[path] is model.get_submodule(path)
    assert selection.resolved_targets == set(hits(Toy(1), target_modules="all-linear"))
    compiled = torch.compile(Toy(1))
    assert pick(compiled, target_modules=["model.layers.0.q_proj"]).names == {  # type: ignore[arg-type]
        "_orig_mod.model.layers.0.q_proj": "model.layers.0.q_proj"
    }


# ---------------------------------------------------------------- modules in several places


def test_shared_modules_are_listed_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "box": nn.ModuleDict({})})
    model["tied"] = model["a"]
    model["box2"] = model["box"]
    model["box"]["c"] = nn.Linear(2, 2)  # type: ignore[index, operator]
    for spec in (["a"], ["tied"], "tied", ["a", "tied"]):
        selection = pick(model, target_modules=spec)
        assert list(selection.modules) == ["a"]
        assert selection.aliases == {"a": ["tied"]}
    assert hits(model, target_modules="all-linear") == ["a", "b", "box.c"]
    assert pick(model, target_modules="all-linear").aliases == {"a": ["tied"]}
    assert [p.name for p in places(model)] == ["a", "b", "box", "box.c"]


def test_a_model_that_contains_itself_is_walked_once() -> None:
    model = Toy(1)
    model.model.whole = model
    assert hits(model, target_modules=["head"]) == ["head"]


# ---------------------------------------------------------------- weights that are read without their module


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def test_out_proj_belongs_to_its_attention() -> None:
    both = pick(encoder(), target_modules=["self_attn", "out_proj", "linear1"])
    assert list(both.modules) == ["self_attn", "linear1"]
    assert "adapted together with 'self_attn'" in both.skipped["self_attn.out_proj"]
    every = pick(encoder(), target_modules="all-linear")
    assert list(every.modules) == ["linear1", "linear2"] and "self_attn" in every.skipped["self_attn.out_proj"]
    assert every.resolved_targets == {"linear1", "linear2"}
    with pytest.raises(ConfigError, match=r"'self_attn.out_proj'.*'self_attn' \(target that instead\).*would not act"):
        pick(encoder(), target_modules=["out_proj"])
    with pytest.raises(ConfigError, match="would not act"):
        pick(nn.MultiheadAttention(8, 2), target_modules=["out_proj"])


def test_patterns_for_an_attention_hold_for_its_out_proj() -> None:
    config = veneer.LoraConfig(target_modules=["0"], rank_pattern={"0": 3}, alpha_pattern={"0": 6})
    model = veneer.get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), config)
    outer = model.get_base_model()[0]
    for layer in (outer, outer.base_layer.out_proj):
        assert layer.lora_A["default"].weight.shape == (3, 8) and layer.scaling["default"] == 2


def test_out_proj_of_an_old_adapter_can_be_read() -> None:
    with pytest.warns(PeftWarning, match="'self_attn.out_proj' does not act"):
        assert hits(encoder(), target_modules=["self_attn.out_proj"], strict=False) == ["self_attn.out_proj"]


def test_out_proj_of_an_adapted_attention() -> None:
    model = encoder()
    model.self_attn = Adapted(model.self_attn)  # type: ignore[arg-type, assignment]
    assert hits(model, target_modules="all-linear") == ["linear1", "linear2"]
    with pytest.raises(
        ConfigError, match=r"'self_attn' \(target that instead\).*would not act"
    ):  # where the attention has another adapter as well
        pick(model, target_modules=["out_proj"])
    with pytest.warns(PeftWarning, match="does not act"):
        named = pick(model, target_modules=["out_proj"], strict=False)
    assert named.names == {"self_attn.base_layer.out_proj": "self_attn.out_proj"}
    assert hits(model, target_modules=["self_attn", "out_proj"]) == ["self_attn"]


@pytest.mark.parametrize(
    "model_type", ["mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h", "bamba", "granitemoehybrid", "zamba2"]
)
def test_mamba_reads_some_weights_in_its_kernels(model_type: str) -> None:
    model = nn.ModuleDict({"in_proj": nn.Linear(2, 2), "out_proj": nn.Linear(2, 2), "conv1d": nn.Conv1d(2, 2, 1)})
    for spec in (["in_proj", "out_proj"], ["conv1d"], ".*out_proj"):
        with pytest.raises(ConfigError, match=f"fused kernels of {model_type} models.*would not act"):
            pick(with_type(model, model_type), target_modules=spec)
    every = pick(with_type(model, model_type), target_modules="all-linear")
    assert list(every.modules) == ["in_proj"] and "out_proj" in every.skipped
    assert hits(with_type(model, "llama"), target_modules=["out_proj"]) == ["out_proj"]


class Fused(nn.Module):
    """Reads the weight of `q`, as WavLM's attention does; calls `k`, hands `v` on, and asks `o` what it is before it calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        nn.init.zeros_(self.k.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.q.weight, self.q.bias) + self.k(x) @ self.k.weight
        y = self.run(self.v, y.to(self.v.weight.dtype))
        return self.o(y) if isinstance(self.o.weight, Tensor) else y

    @staticmethod
    def run(module: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = module(x)
        return out


def test_weights_that_are_read_without_their_module() -> None:
    model = nn.Sequential(Fused())
    every = pick(model, target_modules="all-linear")
    assert list(every.modules) == ["0.k", "0.v", "0.o"] and "Fused reads its weight directly" in every.skipped["0.q"]
    with pytest.raises(
        ConfigError, match=r"'0.q' \(Linear\).*Fused reads its weight directly and never calls it, so its adapter would not act"
    ):
        pick(model, target_modules=["q", "k"])
    with pytest.warns(PeftWarning, match="'0.q' does not act"):  # a file of PEFT's, where it did not either
        assert hits(model, target_modules=["q", "k"], strict=False) == ["0.q", "0.k"]


def test_wavlm_reads_its_projections() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,),
        num_feat_extract_layers=1, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = transformers.WavLMModel(config)
    skipped = pick(model, target_modules="all-linear").skipped
    assert sum("WavLMAttention reads" in why for why in skipped.values()) == 4, skipped
    with pytest.raises(ConfigError, match="WavLMAttention reads its weight directly"):
        pick(model, target_modules=["q_proj", "v_proj"])


# ---------------------------------------------------------------- keys instead of targets


def keys(*names: str) -> dict[str, torch.Tensor]:
    return {f"{n}.{leaf}.weight": torch.zeros(1) for n in names for leaf in ("lora_A", "lora_B")}


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "_orig_mod.", "base_model.model._orig_mod.", "module."])
def test_keys_name_the_modules(prefix: str) -> None:
    state = keys(f"{prefix}model.layers.1.q_proj", f"{prefix}layers.0.v_proj")
    state[f"{prefix}head.weight"] = state[f"{prefix}model.layers.1.q_proj.base_layer.bias"] = torch.zeros(1)
    state[f"{prefix}layers.0.gone.lora_A.weight"] = torch.zeros(1)
    with pytest.warns(PeftWarning, match=r"Only the config has 'head'\. Only the state_dict has 'layers.0.v_proj', 'model"):
        selection = pick(Toy(2), target_modules=["head"], state_dict=state)
    assert list(selection.modules) == ["model.layers.1.q_proj", "layers.0.v_proj"]
    # `layers.0.v_proj` alone would also hit `model.layers.0.v_proj`
    assert hits(Toy(2), target_modules=selection.resolved_targets) == list(selection.modules)


def test_keys_that_agree_with_the_targets_leave_their_spelling() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selection = pick(Toy(1), target_modules=["q_proj", "zzz"], state_dict=keys("model.layers.0.q_proj", "layers.0.q_proj"))
        assert selection.resolved_targets == {"q_proj", "zzz"}
        # no targets and no table: nothing to compare with
        selection = pick(Toy(1), state_dict=keys("model.layers.0.q_proj"))
        assert selection.resolved_targets == {"model.layers.0.q_proj"}


def test_keys_of_attention_and_of_adapted_layers() -> None:
    state = keys("self_attn", "self_attn.base_layer.out_proj")
    assert hits(encoder(), target_modules=["self_attn"], state_dict=state) == ["self_attn"]
    model = Toy(1)
    model.head = Adapted(model.head)  # type: ignore[assignment]
    assert hits(model, target_modules=["head"], state_dict=keys("base_model.model.head")) == ["head"]


def test_keys_of_another_model_are_an_error() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=r"No key of the state_dict.*2 keys, such as 'x.lora_A.weight'"):
        pick(Toy(), target_modules=["q_proj"], state_dict=keys("x"))
    with pytest.raises(NoMatchingPeftModuleError, match="It has 0 keys"):
        pick(Toy(), target_modules=["q_proj"], state_dict={})
    with pytest.raises(ConfigError, match=r"'model.layers.0.norm'"):
        pick(Toy(), target_modules=["q_proj"], state_dict=keys("model.layers.0.norm"))


def test_parameters_come_from_the_config_all_the_same() -> None:
    state = keys("a.experts", "a.experts.base_layer", "b.experts.gate")
    selection = pick(
        experts(),
        target_modules=["b.experts.gate"],
        target_parameters=["a.experts.up", "a.experts.down"],
        state_dict=state,
    )
    assert list(selection.modules) == ["b.experts.gate"]
    assert selection.parameters == ["a.experts.up", "a.experts.down"]


# ---------------------------------------------------------------- transformers


def test_output_layers_of_transformers_models() -> None:
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_key_value_heads=2))
    every = pick(llama, target_modules="all-linear")
    assert len(every.modules) == 7 and every.skipped == {"lm_head": "it is the output layer"}
    assert list(pick(llama, target_modules=["lm_head", "q_proj"]).modules)[-1] == "lm_head"
    llama.lm_head = Adapted(llama.lm_head)
    assert "lm_head" in pick(llama, target_modules="all-linear").skipped
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**small))
    assert "classifier" in pick(bert, target_modules="all-linear").modules
    heads = pick(bert, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    assert "classifier" not in heads.modules and list(heads.to_save) == ["classifier"]
    assert {n.rpartition(".")[2] for n in pick(bert).modules} == {"query", "value"}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    conv1d = transformers.pytorch_utils.Conv1D
    found = pick(gpt2, target_modules="all-linear", supports=lambda m: isinstance(m, (nn.Linear, conv1d)))
    assert sorted(n.rpartition("h.0.")[2] for n in found.modules) == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]


# ---------------------------------------------------------------- cost


def test_cost_grows_with_the_model_not_with_the_list() -> None:
    model = Toy(300)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]

    def seconds(spec: Any) -> float:
        best = float("inf")
        for _ in range(5):
            start = time.process_time()
            pick(model, target_modules=spec)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(names) < 5 * seconds(["q_proj", "v_proj"])
