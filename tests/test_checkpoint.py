"""Files of adapters: what is written, what is read, and what is refused."""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from veneer.checkpoint import (
    AdapterFile,
    fingerprint,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_into,
    load_peft_weights,
    read_adapter,
    save_adapter,
    set_base_model_state_dict,
    set_peft_model_state_dict,
    slots,
    update_card,
    write_adapter,
)
from veneer.checkpoint import save as save_module
from veneer.checkpoint.base import other_base
from veneer.checkpoint.save import digest, folder_of
from veneer.engine.inject import attach
from veneer.engine.layer import adapted_layers
from veneer.engine.merge import merge, unmerge
from veneer.engine.original import original_weights
from veneer.errors import LoadError, PeftWarning, RouteError, SaveError
from veneer.hotswap import hotswap_adapter
from veneer.mapping import get_peft_model
from veneer.methods.hira import HiraConfig
from veneer.methods.lora import LoraConfig
from veneer.model import PeftModel

NAMES = ["default", "1", "lora", "my.adapter", "weight", "base_layer", "lora_A", "module"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.lora = nn.Linear(6, 6)  # a module named as an adapter might be, and as a part of tensors' names
        self.weight_net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = x + self.weight_net(self.lora(self.q_proj(x)).tanh())
        return h


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(9, 6)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        out: Tensor = self.head(h)
        return out


class Inner(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Wrapped(nn.Module):
    """The module tree of a PeftModel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = Inner(model)
        self.peft_config: dict[str, Any] = {}

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.base_model.model(ids)
        return out


IDS = torch.arange(8).reshape(2, 4)


def config(**kwargs: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "lora", "weight_net.0"], **kwargs})


def adapted(
    cfg: LoraConfig | None = None, adapter: str = "default", model: nn.Module | None = None, seed: int = 1, **kwargs: Any
) -> Wrapped:
    """A wrapped model with an adapter that is not the identity."""
    wrapped = Wrapped(model if model is not None else Net())
    add(wrapped, cfg or config(), adapter, seed, **kwargs)
    return wrapped


def add(wrapped: Wrapped, cfg: LoraConfig, adapter: str, seed: int = 1, **kwargs: Any) -> None:
    attach(wrapped.get_base_model(), cfg, adapter, **kwargs)
    wrapped.peft_config[adapter] = cfg
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for slot in slots(wrapped, adapter, cfg).values():
            if not slot.tensor.is_meta:
                slot.tensor.copy_(torch.randn(slot.shape, generator=generator) * 0.3)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Tensor]:
    """The folder of an adapter, and what the model gives with it."""
    model = adapted()
    save_adapter(model, model.peft_config["default"], "default", tmp_path)
    return tmp_path, model(IDS).detach()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return set(now) == set(before) and all(torch.equal(now[k], v) and now[k].dtype == v.dtype for k, v in before.items())


# ---------------------------------------------------------------- keys


def test_keys_of_a_plain_adapter() -> None:
    keys = set(get_peft_model_state_dict(adapted()))
    want = {"q_proj", "lora", "weight_net.0"}
    assert keys == {f"base_model.model.layers.{i}.{m}.lora_{x}.weight" for i in (0, 1) for m in want for x in "AB"}


def test_an_injected_model_has_no_prefix_but_its_file_has(tmp_path: Path) -> None:
    model, cfg = Net(), config()
    attach(model, cfg, "default")
    model.peft_config = {"default": cfg}  # type: ignore[assignment]
    state = get_peft_model_state_dict(model)
    assert "layers.0.q_proj.lora_A.weight" in state and len(state) == 12
    save_adapter(model, cfg, "default", tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {f"base_model.model.{k}" for k in state}
    for spelled in (state, {f"base_model.model.{k}": v for k, v in state.items()}):
        report = set_peft_model_state_dict(model, spelled)
        assert report.missing_keys == [] and report.unexpected_keys == []


@pytest.mark.parametrize("name", NAMES)
def test_any_adapter_name_saves_the_same_file(name: str, tmp_path: Path, saved: tuple[Path, Tensor]) -> None:
    folder, output = saved
    model = adapted(adapter=name)
    save_adapter(model, model.peft_config[name], name, tmp_path / "x")
    mine, theirs = load_file(tmp_path / "x/adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    assert set(mine) == set(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)
    fresh = adapted(adapter=name, seed=7)
    load_into(fresh, name, read_adapter(tmp_path / "x"))
    assert torch.equal(fresh(IDS), output)


@pytest.mark.parametrize("name", NAMES)
def test_another_adapter_of_any_name_takes_nothing_away(name: str) -> None:
    model = adapted()
    before = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    other = "other" if name == "default" else name
    add(model, config(r=3, modules_to_save=["head"]), other, seed=5)
    after = get_peft_model_state_dict(model)
    assert set(after) == set(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert all(t.shape != after.get(k, torch.empty(0)).shape for k, t in get_peft_model_state_dict(model, adapter_name=other).items())
    whole = model.state_dict()  # of both adapters, in memory names
    again = get_peft_model_state_dict(model, state_dict=whole, adapter_name=other)
    assert all(torch.equal(again[k], v) for k, v in get_peft_model_state_dict(model, adapter_name=other).items())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.ones(4, 4))
        self.down = nn.Parameter(torch.ones(7, 2))
        self.across = nn.Parameter(torch.ones(4, 4))


def several_parameters(targets: list[str], seed: int = 1) -> Wrapped:
    config = LoraConfig(r=1, target_modules=[], target_parameters=targets)
    return adapted(config, model=nn.ModuleDict({"experts": Experts()}), seed=seed)


def test_keys_of_several_parameters_of_a_module() -> None:
    """They nest in the order in which the module has them, whatever the order of the targets, as PEFT's do."""
    for targets in (["up", "down"], ["down", "up"]):
        shapes = {
            k.removeprefix("base_model.model."): tuple(v.shape) for k, v in get_peft_model_state_dict(several_parameters(targets)).items()
        }
        assert shapes == {
            "experts.base_layer.lora_A.weight": (1, 4),
            "experts.base_layer.lora_B.weight": (4, 1),
            "experts.lora_A.weight": (1, 2),
            "experts.lora_B.weight": (7, 1),
        }


def test_files_in_which_parameters_nest_by_name_stay_readable(tmp_path: Path) -> None:
    """As veneer wrote them before it knew PEFT's order: `across`, `down`, `up` from the inside out, where it is `up`, `down`, `across` now."""
    model = several_parameters(["up", "down", "across"])
    save_adapter(model, model.peft_config["default"], "default", tmp_path)
    now = get_peft_model_state_dict(model)
    deep = "experts.base_layer.base_layer."
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as f:
        notes = f.metadata()
    assert notes.pop("veneer_nesting") == "registered"
    turned = {k.replace(deep, "experts.") if deep in k else k.replace("experts.lora", f"{deep}lora"): t for k, t in now.items()}
    save_file(turned, tmp_path / "adapter_model.safetensors", metadata=notes)
    model = several_parameters(["up", "down", "across"], seed=2)
    load_into(model, "default", read_adapter(tmp_path))
    swapped = several_parameters(["up", "down", "across"], seed=3)
    hotswap_adapter(swapped, tmp_path, "default")
    assert all(torch.equal(t, now[k]) for k, t in get_peft_model_state_dict(swapped).items())
    again = get_peft_model_state_dict(model)
    assert again.keys() == now.keys() and all(torch.equal(again[k], t) for k, t in now.items())


def test_modules_to_save_and_biases_keys() -> None:
    keys = {
        k.removeprefix("base_model.model.")
        for k in get_peft_model_state_dict(adapted(config(target_modules=["q_proj"], modules_to_save=["head"])))
    }
    assert {"head.weight", "head.bias"} <= keys and not any("modules_to_save" in k or "original" in k for k in keys)
    only = {
        k.removeprefix("base_model.model.") for k in get_peft_model_state_dict(adapted(config(target_modules=["q_proj"], bias="lora_only")))
    }
    assert {k for k in only if "bias" in k} == {"layers.0.q_proj.base_layer.bias", "layers.1.q_proj.base_layer.bias"}
    every = {k.removeprefix("base_model.model.") for k in get_peft_model_state_dict(adapted(config(target_modules=["q_proj"], bias="all")))}
    assert {"layers.0.q_proj.base_layer.bias", "layers.0.lora.bias", "layers.1.weight_net.1.bias", "head.bias"} <= every


class FrozenNorm(nn.Module):
    """As DETR has it: a batch norm whose tensors are buffers."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def test_all_biases_are_in_the_file_also_those_that_are_buffers() -> None:
    """PEFT writes and reads them; they do not train, so a file may lack them."""

    def made() -> Any:
        torch.manual_seed(0)
        return get_peft_model(nn.Sequential(nn.Linear(3, 4), FrozenNorm()), config(target_modules=["0"], bias="all"))

    source, target = made(), made()
    key = "base_model.model.1.bias"
    state = dict(get_peft_model_state_dict(source))
    assert set(state) == {f"base_model.model.0.{n}" for n in ("lora_A.weight", "lora_B.weight", "base_layer.bias")} | {key}
    load_into(target, "default", {**state, key: torch.full((4,), 0.25)})
    assert torch.equal(target.get_submodule("base_model.model.1").bias, torch.full((4,), 0.25))
    del state[key]
    load_into(target, "default", state)


def test_files_of_peft_with_all_biases_and_a_saved_module_load() -> None:
    """PEFT also lists the original's bias, and the copy's twice."""
    cfg = config(target_modules=["q_proj"], bias="all", modules_to_save=["head"])
    source = adapted(copy.deepcopy(cfg))
    state = dict(get_peft_model_state_dict(source))
    state["base_model.model.head.original_module.bias"] = torch.full((4,), 0.25)
    state["base_model.model.head.modules_to_save.bias"] = state["base_model.model.head.bias"]
    target = adapted(cfg, seed=9)
    load_into(target, "default", state)
    assert torch.equal(target(IDS), source(IDS))
    state["base_model.model.head.modules_to_save.bias"] = state["base_model.model.head.bias"] + 1
    with pytest.raises(LoadError, match="differ in the file"):
        load_into(target, "default", state)


def test_dora_and_embedding_names_with_and_without_weight() -> None:
    cfg = config(target_modules=["q_proj", "embed"], use_dora=True)
    source = adapted(copy.deepcopy(cfg))
    state = get_peft_model_state_dict(source)
    names = {k.removeprefix("base_model.model.") for k in state}
    assert {"layers.0.q_proj.lora_magnitude_vector", "embed.lora_embedding_A", "embed.lora_magnitude_vector"} <= names
    old = {k if k.endswith(".weight") else f"{k}.weight": v for k, v in state.items()}
    target = adapted(cfg, seed=9)
    load_into(target, "default", old)
    assert torch.equal(target(IDS), source(IDS))


class Tokens(Net):
    """A model that tells its embeddings, as transformers' do."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = self.embed
        del self.embed
        self.lm_head = nn.Linear(6, 9, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.config = {"vocab_size": 9}

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.embed_tokens(ids))
        return out


def _names(model: Wrapped, **kwargs: Any) -> set[str]:
    return {k.removeprefix("base_model.model.") for k in get_peft_model_state_dict(model, **kwargs)}


def test_embeddings_are_saved_where_they_have_to_be(tmp_path: Path) -> None:
    tables = {"embed_tokens.weight", "lm_head.weight", "embed_tokens.base_layer.weight"}
    plain = adapted(config(target_modules=["q_proj"]), model=Tokens())
    assert not _names(plain) & tables
    assert _names(plain, save_embedding_layers=True) & tables == {"embed_tokens.weight", "lm_head.weight"}
    targeted = adapted(config(target_modules=["q_proj", "embed_tokens"]), model=Tokens())
    assert _names(targeted) & tables == {"embed_tokens.base_layer.weight"}
    assert _names(targeted, save_embedding_layers=True) & tables == {"lm_head.weight", "embed_tokens.base_layer.weight"}
    assert not _names(targeted, save_embedding_layers=False) & tables
    by_pattern = adapted(config(target_modules=r".*embed_tokens"), model=Tokens())
    assert "embed_tokens.base_layer.weight" in _names(by_pattern)
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    resized = adapted(config(target_modules=["q_proj"], base_model_name_or_path=str(tmp_path)), model=Tokens())
    assert _names(resized) & tables == {"embed_tokens.weight", "lm_head.weight"}
    both = adapted(config(target_modules=["embed_tokens"], base_model_name_or_path=str(tmp_path)), model=Tokens())
    assert _names(both) & tables == {"lm_head.weight", "embed_tokens.base_layer.weight"}  # the head was resized too
    (tmp_path / "config.json").write_text('{"vocab_size": 9}')
    assert not _names(resized) & tables


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_the_base_that_go_along_are_the_frozen_ones_while_merged(tied: bool) -> None:
    cfg = config(target_modules=["q_proj", "embed_tokens"], bias="all")
    model = adapted(cfg, model=Tokens(tied))
    before, inner = get_peft_model_state_dict(model), model.get_base_model()
    merge(inner, ["default"])
    while_merged = model(IDS)
    for after in (get_peft_model_state_dict(model), get_peft_model_state_dict(model, state_dict=model.state_dict())):
        assert before.keys() == after.keys() and all(torch.equal(before[k], t) for k, t in after.items())
    attach(inner, cfg, "other")
    model.peft_config["other"] = cfg
    load_into(model, "other", before)  # another adapter's file with the same base
    assert torch.equal(model(IDS), while_merged)
    key = "base_model.model.embed_tokens.base_layer.weight"
    with pytest.raises(LoadError, match="unmerge_adapter"):
        load_into(model, "other", {**before, key: before[key] + 1})


def test_saved_embeddings_are_loaded_and_keep_the_models_dtype() -> None:
    source = adapted(config(target_modules=["q_proj"]), model=Tokens())
    with torch.no_grad():
        source.get_base_model().embed_tokens.weight.add_(0.5)  # type: ignore[operator, union-attr]
    state = get_peft_model_state_dict(source, save_embedding_layers=True)
    target = adapted(config(target_modules=["q_proj"]), model=Tokens().to(torch.bfloat16))
    load_into(target, "default", state)
    table = target.get_base_model().embed_tokens.weight  # type: ignore[union-attr]
    assert table.dtype == torch.bfloat16
    assert torch.equal(table, source.get_base_model().embed_tokens.weight.to(torch.bfloat16))  # type: ignore[operator, arg-type, union-attr]
    assert get_peft_model_state_dict(target)["base_model.model.layers.0.q_proj.lora_A.weight"].dtype == torch.float32
    state["base_model.model.embed_tokens.weight"] = torch.zeros(11, 6)
    with pytest.raises(LoadError, match=r"11 rows"):
        load_into(target, "default", state)


# ---------------------------------------------------------------- loading: exact, repaired, or an error


MUTATIONS: dict[str, Callable[[str], str]] = {
    "compiled": lambda k: f"_orig_mod.{k}",
    "compiled inside": lambda k: k.replace("layers.0.", "layers.0._orig_mod.").replace("q_proj.", "q_proj._orig_mod."),
    "ddp": lambda k: f"module.{k}",
    "fsdp": lambda k: k.replace("layers.", "_fsdp_wrapped_module.layers._fsdp_wrapped_module."),
    "checkpointed": lambda k: k.replace("q_proj.", "_checkpoint_wrapped_module.q_proj."),
    "all wrappers": lambda k: f"module._orig_mod._fsdp_wrapped_module.{k}",
    "no prefix": lambda k: k.removeprefix("base_model.model."),
    "extra level": lambda k: k.replace("base_model.model.", "base_model.model.model."),
    "extra levels, no prefix": lambda k: k.replace("base_model.model.", "language_model.decoder."),
    "in memory": lambda k: k.removesuffix("weight") + "default.weight",
    "in memory, another name": lambda k: k.removesuffix("weight") + "some.other.weight",
    "in memory, a name like a part": lambda k: k.removesuffix("weight") + "lora_A.weight",
    "compiled, in memory, another name": lambda k: f"_orig_mod.{k.removesuffix('weight')}x.weight",
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutated_keys_are_repaired_exactly(mutation: str, saved: tuple[Path, Tensor]) -> None:
    folder, output = saved
    tensors = {MUTATIONS[mutation](k): v for k, v in load_file(folder / "adapter_model.safetensors").items()}
    model = adapted(seed=9)
    assert not torch.equal(model(IDS), output)
    report = load_into(model, "default", tensors)
    assert torch.equal(model(IDS), output)
    assert report.missing_keys == [] and report.unexpected_keys == []


def test_a_missing_level_is_repaired(saved: tuple[Path, Tensor]) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Net()

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.model(ids)
            return out

    folder, output = saved
    model = adapted(model=Outer(), seed=9)
    report = load_into(model, "default", read_adapter(folder), check_base="off")
    assert torch.equal(model(IDS), output) and report.rename == ("", "model")


def test_moved_vlm_paths_are_understood() -> None:
    def vlm(language: list[str], vision: list[str]) -> nn.Module:
        root = nn.Module()
        for path, block in ((language, "layers"), (vision, "blocks")):
            at = root
            for name in path:
                at._modules.setdefault(name, nn.Module())
                at = at._modules[name]  # type: ignore[assignment]
            at._modules[block] = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 4)})])
        return root

    old = adapted(config(target_modules=["q_proj"]), model=vlm(["model"], ["visual"]))
    new = adapted(config(target_modules=["q_proj"]), model=vlm(["model", "language_model"], ["model", "visual"]), seed=9)
    load_into(new, "default", get_peft_model_state_dict(old))
    theirs, ours = get_peft_model_state_dict(old), get_peft_model_state_dict(new)
    assert torch.equal(
        ours["base_model.model.model.visual.blocks.0.q_proj.lora_B.weight"], theirs["base_model.model.visual.blocks.0.q_proj.lora_B.weight"]
    )
    load_into(old, "default", ours)  # and the other way


def _surplus(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**t, "base_model.model.layers.2.q_proj.lora_A.weight": torch.zeros(2, 6)}


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "empty": (lambda t: {}, "holds no tensors"),
    "half": (lambda t: dict(list(t.items())[: len(t) // 2]), "6 of the 12 tensors it needs are not in the file"),
    "surplus": (_surplus, r"layers\.2\.q_proj.*nearest: .*q_proj\.lora_A"),
    "another layer": (lambda t: {k.replace("layers.1.", "layers.7."): v for k, v in t.items()}, "layers.7"),
    "another module": (lambda t: {k.replace("q_proj", "query"): v for k, v in t.items()}, "query"),
    "another parent": (
        lambda t: {k.replace("layers.", "decoder.blocks."): v for k, v in t.items()},
        r"key_mapping=\{'\^decoder\\\\.blocks\\\\.': 'layers\.'\}",
    ),
    "another rank": (lambda t: {k: v[:1] if "lora_A" in k else v[:, :1] for k, v in t.items()}, r"shape \(1, 6\) in the file and \(2, 6\)"),
    "integers": (lambda t: {k: v.long() for k, v in t.items()}, "torch.int64 in the file"),
    "twice": (lambda t: {**t, **{f"module.{k}": v + 1 for k, v in t.items()}}, "differ in the file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_does_not_fit_is_an_error_and_changes_nothing(case: str, saved: tuple[Path, Tensor]) -> None:
    change, said = BROKEN[case]
    tensors = change(load_file(saved[0] / "adapter_model.safetensors"))
    model = adapted(seed=9)
    before = snapshot(model)
    with pytest.raises(LoadError, match=said):
        load_into(model, "default", tensors)
    assert unchanged(model, before)


def test_the_rename_an_error_names_repairs_it(saved: tuple[Path, Tensor]) -> None:
    folder, output = saved
    tensors = {k.replace("layers.", "decoder.blocks."): v for k, v in load_file(folder / "adapter_model.safetensors").items()}
    model = adapted(seed=9)
    with pytest.raises(LoadError) as error:
        load_into(model, "default", tensors)
    mapping = eval(str(error.value).partition("key_mapping=")[2])
    load_into(model, "default", tensors, key_mapping=mapping)
    assert torch.equal(model(IDS), output)


def test_a_swapped_encoder_is_not_taken_for_a_rename() -> None:
    def net(name: str) -> nn.Module:
        return nn.ModuleDict({name: nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})

    state = get_peft_model_state_dict(adapted(config(target_modules=["q_proj"]), model=net("encoder")))
    with pytest.raises(LoadError, match="encoder"):
        load_into(adapted(config(target_modules=["q_proj"]), model=net("decoder")), "default", state)


def test_what_set_peft_model_state_dict_returns_and_refuses(saved: tuple[Path, Tensor]) -> None:
    tensors = load_file(saved[0] / "adapter_model.safetensors")
    model = adapted(seed=9)
    before = snapshot(model)
    report = set_peft_model_state_dict(model, {**tensors, "foo.bar": torch.zeros(2)})
    assert report.unexpected_keys == ["foo.bar"] and report.missing_keys == []
    missing, unexpected = report  # as torch's own result
    assert (missing, unexpected) == ([], ["foo.bar"])
    assert torch.equal(model(IDS), saved[1])
    model.load_state_dict(before)
    some = dict(list(tensors.items())[:4])
    for wrong in (some, {"foo.bar": torch.zeros(2)}, {}):
        with pytest.raises(LoadError):
            set_peft_model_state_dict(model, wrong)
        assert unchanged(model, before)
    with pytest.raises(LoadError):
        set_peft_model_state_dict(model, {**tensors, "foo.bar": torch.zeros(2)}, strict=True)
    report = set_peft_model_state_dict(model, {**some, "foo.bar": torch.zeros(2)}, strict=False)
    assert len(report.missing_keys) == 8 and all(".default." in k and k in model.state_dict() for k in report.missing_keys)
    with pytest.raises(LoadError):  # nothing fits at all
        set_peft_model_state_dict(model, {"foo.bar": torch.zeros(2)}, strict=False)
    with pytest.raises(RouteError, match="default"):
        set_peft_model_state_dict(model, tensors, adapter_name="defualt")


def test_mismatched_sizes_are_left_out_if_asked(saved: tuple[Path, Tensor]) -> None:
    tensors = load_file(saved[0] / "adapter_model.safetensors")
    name = "base_model.model.layers.0.lora.lora_A.weight"
    tensors[name] = torch.zeros(5, 6)
    model = adapted(seed=9)
    kept = get_peft_model_state_dict(model)[name].clone()
    report = set_peft_model_state_dict(model, tensors, ignore_mismatched_sizes=True)
    assert report.mismatched == [(name, (5, 6), (2, 6))] and len(report.missing_keys) == 1
    now = get_peft_model_state_dict(model)
    assert torch.equal(now[name], kept)
    other = "base_model.model.layers.0.lora.lora_B.weight"
    assert torch.equal(now[other], tensors[other])


def test_key_mapping_works_on_names_without_the_prefix(saved: tuple[Path, Tensor]) -> None:
    names = load_peft_weights(saved[0], device="cpu", key_mapping={r"^layers\.0": "first", r"layers": "rest"})
    assert "base_model.model.first.q_proj.lora_A.weight" in names and "base_model.model.rest.1.q_proj.lora_A.weight" in names
    with pytest.raises(LoadError, match="two keys"):
        load_peft_weights(saved[0], device="cpu", key_mapping={r"layers\.\d": "layers"})


# ---------------------------------------------------------------- dtype, device, identity of parameters


@pytest.mark.parametrize(("upcast", "want"), [(False, torch.bfloat16), (True, torch.float32)])
def test_the_dtype_in_the_file_is_the_dtype_loaded(upcast: bool, want: torch.dtype, saved: tuple[Path, Tensor]) -> None:
    tensors = {k: v.to(torch.bfloat16) for k, v in load_file(saved[0] / "adapter_model.safetensors").items()}
    model = adapted(seed=9)
    parameters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    versions = {n: p._version for n, p in parameters.items()}
    load_into(model, "default", tensors, upcast=upcast)
    for key, value in get_peft_model_state_dict(model).items():
        assert value.dtype == want and torch.equal(value, tensors[key].to(want))
    for n, p in model.named_parameters():
        if "lora_" in n:  # an optimizer keeps its parameters, and caches see a new version
            assert p is parameters[n] and p._version > versions[n] and p.requires_grad


def test_adapters_on_the_meta_device_are_filled(saved: tuple[Path, Tensor]) -> None:
    model = adapted(low_cpu_mem_usage=True)
    assert all(t.is_meta for t in get_peft_model_state_dict(model).values())
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    load_into(model, "default", read_adapter(saved[0]))
    assert torch.equal(model(IDS), saved[1])
    assert before == {n: p.requires_grad for n, p in model.named_parameters()}
    path = saved[0] / "adapter_model.safetensors"
    with path.open("r+b") as f:  # the values are the model's own, not views of the file
        f.seek(-8, os.SEEK_END)
        f.write(b"\xff" * 8)
    assert torch.equal(model(IDS), saved[1])


def test_tied_copies_in_a_file_have_to_agree() -> None:
    cfg = config(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    source = adapted(copy.deepcopy(cfg), model=Tokens(tied=True))
    state = {k: v.clone() for k, v in get_peft_model_state_dict(source).items()}
    a, b = "base_model.model.embed_tokens.lora_embedding_A", "base_model.model.lm_head.lora_B.weight"
    assert torch.equal(state[a].T, state[b])
    for lazy in (False, True):
        target = Wrapped(Tokens(tied=True))
        attach(target.get_base_model(), copy.deepcopy(cfg), "default", low_cpu_mem_usage=lazy)
        target.peft_config["default"] = cfg
        load_into(target, "default", state)
        assert torch.equal(target(IDS), source(IDS))
        head = {k: v for k, v in state.items() if ".lm_head.lora" not in k}
        load_into(target, "default", head)  # one copy is enough
        table = {k: v for k, v in state.items() if ".embed_tokens.lora" not in k}
        load_into(target, "default", table)  # whichever it is
        assert torch.equal(target(IDS), source(IDS))
        with pytest.raises(LoadError, match="tied in the model, but differ"):
            load_into(target, "default", {**state, b: state[b] + 1})


def test_a_sharded_tensor_is_written_and_read_whole(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    script = f"""
import torch, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from test_checkpoint import *
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
model = adapted()
plain = {{k: v.clone() for k, v in get_peft_model_state_dict(model).items()}}
for s in slots(model, "default", model.peft_config["default"]).values():
    s.owner._parameters[s.attribute] = nn.Parameter(distribute_tensor(s.tensor.detach(), mesh, [Shard(0)]))
save_adapter(model, model.peft_config["default"], "default", {str(tmp_path)!r})
got = load_file({str(tmp_path / "adapter_model.safetensors")!r})
assert all(torch.equal(got[k], v) for k, v in plain.items()) and len(got) == 12
load_into(model, "default", {{k: v + 1 for k, v in plain.items()}})
for k, t in get_peft_model_state_dict(model).items():
    assert not isinstance(t, DTensor) and torch.equal(t, plain[k] + 1)  # whole, as every caller's torch.save needs it
dist.destroy_process_group()
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert done.stdout.strip().endswith("fine"), done.stderr[-2000:]


# ---------------------------------------------------------------- saving: whole or not at all


def _partial(s: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in s.items() if "layers.1" not in k}


def _changed(to: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda s: {k: to(v) if "layers.1.q_proj.lora_B" in k else v for k, v in s.items()}


BROKEN_SAVES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "empty": (lambda s: {}, "It is empty"),
    "partial": (_partial, "lacks 6 of the 12"),
    "prefixed": (lambda s: {f"my_wrapper.{k}": v for k, v in s.items()}, "my_wrapper"),
    "zero-size": (_changed(lambda t: torch.empty(0)), r"\(0,\) instead of \(6, 2\)"),
    "a slice": (_changed(lambda t: t[:3]), r"\(3, 2\) instead of \(6, 2\)"),
    "meta": (_changed(lambda t: t.to("meta")), "on the meta device"),
    "not finite": (_changed(lambda t: t * float("nan")), "not finite"),
    "infinite": (_changed(lambda t: t / 0), "not finite"),
}


@pytest.mark.parametrize("case", BROKEN_SAVES)
def test_a_broken_save_is_an_error_and_leaves_the_old_file(case: str, saved: tuple[Path, Tensor]) -> None:
    change, said = BROKEN_SAVES[case]
    model = adapted(seed=9)
    before = {p.name: p.read_bytes() for p in saved[0].iterdir()}
    with pytest.raises(SaveError, match=said):
        save_adapter(model, model.peft_config["default"], "default", saved[0], state_dict=change(dict(model.state_dict())))
    assert {p.name: p.read_bytes() for p in saved[0].iterdir()} == before


@pytest.mark.parametrize("value", [torch.full((2, 6), float("inf")), torch.empty(2, 6, device="meta"), torch.empty(0)])
def test_a_broken_tensor_in_the_model_is_not_saved(value: Tensor, tmp_path: Path) -> None:
    model = adapted()
    holder = model.get_base_model().layers[0].q_proj.lora_A["default"]  # type: ignore[index, union-attr]
    holder._parameters["weight"] = nn.Parameter(value)
    with pytest.raises(SaveError, match=r"layers\.0\.q_proj\.lora_A"):
        save_adapter(model, model.peft_config["default"], "default", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrap", ["_orig_mod.", "module.", "module._fsdp_wrapped_module."])
def test_a_wrapped_state_dict_is_understood(wrap: str) -> None:
    model = adapted()
    state = {wrap + k: v for k, v in model.state_dict().items()}
    got, want = get_peft_model_state_dict(model, state_dict=state), get_peft_model_state_dict(model)
    assert set(got) == set(want) and all(torch.equal(got[k], want[k]) for k in want)


def test_compiled_and_ddp_like_models_save_plain_names(tmp_path: Path) -> None:
    model = adapted()
    want = set(get_peft_model_state_dict(model))
    compiled = torch.compile(model, backend="eager")
    assert set(get_peft_model_state_dict(compiled)) == want
    assert set(get_peft_model_state_dict(model, state_dict=compiled.state_dict())) == want
    assert set(get_peft_model_state_dict(nn.DataParallel(model))) == want
    layers: Any = model.get_base_model().layers
    layers[0] = torch.compile(layers[0], backend="eager")
    assert "base_model.model.layers.0._orig_mod.q_proj.lora_A.default.weight" in model.state_dict()
    assert set(get_peft_model_state_dict(model)) == want
    save_adapter(model, model.peft_config["default"], "default", tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == want
    load_into(model, "default", read_adapter(tmp_path))


def test_a_module_called_module_keeps_its_name() -> None:
    model = adapted(config(target_modules=["q_proj"]), model=nn.ModuleDict({"module": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})}))
    state = get_peft_model_state_dict(model)
    assert set(state) == {f"base_model.model.module.q_proj.lora_{x}.weight" for x in "AB"}
    load_into(model, "default", {f"module.{k}": v for k, v in state.items()})


def test_no_adapter_no_file(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(RouteError, match="'default'"):
        get_peft_model_state_dict(model, adapter_name="defualt")
    with pytest.raises(SaveError, match=r"no tensors in this model.*'default'"):
        save_adapter(model, config(), "other", tmp_path / "x")
    with pytest.raises(SaveError, match="empty"):
        write_adapter({}, config(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(SaveError, match="folder's"):
        folder_of(tmp_path, "../other")
    assert folder_of(tmp_path, "default") == tmp_path and folder_of(tmp_path, "my.adapter") == tmp_path / "my.adapter"


def test_what_is_written(saved: tuple[Path, Tensor]) -> None:
    folder, _ = saved
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["inference_mode"] is True and fields["r"] == 2 and fields["peft_type"] == "LORA"
    file = read_adapter(folder)
    assert file.metadata["format"] == "pt" and file.metadata["veneer_digest"] == digest(file.tensors)
    (folder / "other").touch()
    for name in ("adapter_model.safetensors", "adapter_config.json"):  # readable for whom new files are
        assert (folder / name).stat().st_mode == (folder / "other").stat().st_mode


def test_saving_does_not_change_the_config_or_the_model(tmp_path: Path) -> None:
    model = adapted()
    before, fields = snapshot(model), model.peft_config["default"].to_dict()
    save_adapter(model, model.peft_config["default"], "default", tmp_path, verify=True)
    assert unchanged(model, before) and model.peft_config["default"].to_dict() == fields


def test_the_other_processes_write_nothing(tmp_path: Path) -> None:
    model = adapted()
    assert save_adapter(model, model.peft_config["default"], "default", tmp_path / "x", is_main_process=False) is None
    assert not (tmp_path / "x").exists()


def test_pickled_files_both_ways(tmp_path: Path, saved: tuple[Path, Tensor]) -> None:
    model = adapted()
    for verify in (False, True):
        save_adapter(model, model.peft_config["default"], "default", tmp_path / "b", safe_serialization=False, verify=verify)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["adapter_config.json", "adapter_model.bin"]
    fresh = adapted(seed=9)
    load_into(fresh, "default", read_adapter(tmp_path / "b"))
    assert torch.equal(fresh(IDS), saved[1])
    # one format takes the place of the other: a stale file would be read first
    save_adapter(model, model.peft_config["default"], "default", saved[0], safe_serialization=False)
    assert not (saved[0] / "adapter_model.safetensors").exists()


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/veneer_was_here",)


@pytest.mark.parametrize("content", [_Evil(), {"a": 1}, [torch.zeros(1)]])
def test_a_pickle_with_anything_but_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(LoadError, match=r"adapter_model\.bin"):
        read_adapter(tmp_path)
    assert not Path("/tmp/veneer_was_here").exists()


def test_a_full_disk_leaves_the_old_files(saved: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {p.name: p.read_bytes() for p in saved[0].iterdir()}
    monkeypatch.setattr(save_module, "save_file", full)
    model = adapted(seed=9)
    with pytest.raises(SaveError, match="No space left"):
        save_adapter(model, model.peft_config["default"], "default", saved[0])
    assert {p.name: p.read_bytes() for p in saved[0].iterdir()} == before


def test_a_disk_that_returns_other_bytes_is_noticed(saved: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(tensors: dict[str, Tensor], path: Path, metadata: Any = None) -> None:
        save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, path, metadata=metadata)

    before = (saved[0] / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(save_module, "save_file", lossy)
    model = adapted(seed=9)
    with pytest.raises(SaveError, match="read again"):
        save_adapter(model, model.peft_config["default"], "default", saved[0], verify=True)
    assert (saved[0] / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("when", ["writing", "written"])
def test_a_process_killed_while_saving_leaves_the_old_files(when: str, saved: tuple[Path, Tensor]) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint import *
real = save_module.save_file
def killed(tensors, path, metadata=None):
    if {when!r} == "written":
        real(tensors, path, metadata=metadata)
    else:
        Path(path).write_bytes(b"half of a file")
    os.kill(os.getpid(), signal.SIGKILL)
save_module.save_file = killed
model = adapted(config(r=5), seed=9)
save_adapter(model, model.peft_config["default"], "default", {str(saved[0])!r})
"""
    names = ("adapter_model.safetensors", "adapter_config.json")
    before = [(saved[0] / n).read_bytes() for n in names]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [(saved[0] / n).read_bytes() for n in names] == before
    model = adapted(seed=9)
    load_into(model, "default", read_adapter(saved[0]))
    assert torch.equal(model(IDS), saved[1])


def test_shared_and_strided_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    t = torch.randn(4, 3)
    write_adapter({"a": t, "b": t.T, "c": t[1:3, ::2], "d": t}, config(), tmp_path)
    got = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(got["a"], t) and torch.equal(got["b"], t.T) and torch.equal(got["c"], t[1:3, ::2]) and torch.equal(got["d"], t)


# ---------------------------------------------------------------- reading files


@pytest.mark.parametrize("damage", ["cut", "garbage", "nothing", "header"])
def test_a_damaged_file_is_named(damage: str, saved: tuple[Path, Tensor]) -> None:
    path = saved[0] / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-10], "garbage": b"\xff" * 200, "nothing": b"", "header": data[:20]}[damage])
    with pytest.raises(LoadError, match=r"adapter_model\.safetensors cannot be read.*bytes"):
        read_adapter(saved[0])


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    save_file({}, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match="holds no tensors"):
        read_adapter(tmp_path)


def test_a_wrong_path_is_told(saved: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder = saved[0]
    with pytest.raises(LoadError, match="no folder"):
        read_adapter("/no/such/folder")
    with pytest.raises(LoadError, match="no folder ''"):
        read_adapter("")
    (folder / "sub").mkdir()
    for p in list(folder.glob("adapter_*")):
        p.rename(folder / "sub" / p.name)
    with pytest.raises(LoadError, match="subfolder='sub'"):
        read_adapter(folder)
    assert len(read_adapter(folder, subfolder="sub").tensors) == 12
    with pytest.raises(LoadError, match="is a file"):
        read_adapter(folder / "sub/adapter_model.safetensors")


def test_nothing_asks_the_network(saved: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = adapted(config(target_modules=["q_proj", "embed_tokens"], base_model_name_or_path="some/base"), model=Tokens())
    save_adapter(model, model.peft_config["default"], "default", saved[0] / "new")
    update_card(saved[0] / "new", base_model="some/base")
    load_into(model, "default", read_adapter(saved[0] / "new"))


def test_offline_the_hub_gives_an_error_not_a_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(LoadError, match="no folder 'some/adapter'"):
        read_adapter("some/adapter", local_files_only=True, cache_dir=tmp_path)


def test_a_cached_hub_adapter_is_read_offline(saved: tuple[Path, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    repo, commit = tmp_path / "cache/models--some--adapter", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    model = adapted()
    save_adapter(model, model.peft_config["default"], "default", repo / "snapshots" / commit, safe_serialization=False)
    file = read_adapter("some/adapter", local_files_only=True, cache_dir=tmp_path / "cache")
    assert file.path.name == "adapter_model.bin" and len(file.tensors) == 12


# ---------------------------------------------------------------- start values


def test_start_values_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    def pissa(**kwargs: Any) -> Wrapped:
        return adapted(config(target_modules=["q_proj"], init_lora_weights="pissa"), **kwargs)

    model = pissa()
    names = set(slots(model, "default", model.peft_config["default"], start=True))
    assert names == {f"base_model.model.layers.{i}.q_proj.lora_{x}0.weight" for i in (0, 1) for x in "AB"} or len(names) == 4
    save_adapter(model, model.peft_config["default"], "default", tmp_path)
    assert set(load_file(tmp_path / "adapter_init.safetensors")) == names
    assert not names & set(load_file(tmp_path / "adapter_model.safetensors"))
    fresh = pissa(seed=9)
    for slot in slots(fresh, "default", fresh.peft_config["default"], start=True).values():
        slot.tensor.zero_()
    load_into(fresh, "default", read_adapter(tmp_path))
    assert torch.equal(fresh(IDS), model(IDS))
    (tmp_path / "adapter_init.safetensors").unlink()
    with pytest.raises(LoadError, match="adapter_init"):
        read_adapter(tmp_path)
    plain = adapted()
    save_adapter(model, model.peft_config["default"], "default", tmp_path)
    save_adapter(plain, plain.peft_config["default"], "default", tmp_path)
    assert not (tmp_path / "adapter_init.safetensors").exists()


@pytest.mark.parametrize("fails", ["adapter_init", "adapter_model"])
def test_a_save_that_fails_between_the_two_files_leaves_both(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pissa(seed: int) -> Wrapped:
        return adapted(config(target_modules=["q_proj"], init_lora_weights="pissa"), model=Net(seed), seed=seed)

    model, other = pissa(0), pissa(1)
    save_adapter(model, model.peft_config["default"], "default", tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real = save_module.save_file

    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        if fails in Path(path).name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(save_module, "save_file", full)
    with pytest.raises(SaveError, match="No space left"):
        save_adapter(other, other.peft_config["default"], "default", tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("kind", "why"), [("pissa_niter_2", "random"), ("lora_ga", "gradients"), ("pissa", None)])
def test_a_file_without_a_start_that_cannot_be_found_again_warns(kind: str, why: str | None, tmp_path: Path) -> None:
    model = adapted(config(target_modules=["q_proj"], init_lora_weights="pissa"))
    save_adapter(model, model.peft_config["default"], "default", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    file = AdapterFile(load_file(path), path)  # as of PEFT
    cfg = config(target_modules=["q_proj"], init_lora_weights=kind)
    fresh = adapted(cfg) if kind != "lora_ga" else model
    if why is None:
        load_into(fresh, "default", file, cfg)
        return
    with pytest.warns(PeftWarning, match=f"start values.*{why}.*path_initial"):
        load_into(fresh, "default", file, cfg)
    load_into(fresh, "default", load_file(path), cfg)  # a state dict: the model has its start


# ---------------------------------------------------------------- the base


def test_base_state_dict_has_the_original_names() -> None:
    plain = Net().state_dict()
    model = adapted(config(target_modules=["q_proj", "weight_net.0"], modules_to_save=["head"], trainable_token_indices={"embed": [1, 2]}))
    got = get_base_model_state_dict(model)
    assert set(got) == set(plain) and all(torch.equal(got[k], plain[k]) for k in plain)
    merge(model.get_base_model(), ["default"])
    merged = get_base_model_state_dict(model)
    assert all(torch.equal(merged[k], plain[k]) for k in plain)  # the frozen weights, bit for bit
    with pytest.raises(LoadError, match="unmerge"):
        set_base_model_state_dict(model, plain)


def test_base_weights_are_loaded_whole_or_not_at_all() -> None:
    model = adapted(config(modules_to_save=["head"]))
    adapter = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    before, new = snapshot(model), Net(seed=5).state_dict()
    for wrong, said in (
        ({**new, "zz": torch.zeros(1)}, "zz"),
        ({k: v for k, v in new.items() if k != "head.bias"}, "head.bias"),
        ({**new, "head.bias": torch.zeros(3)}, r"\(3,\)"),
    ):
        with pytest.raises(LoadError, match=said):
            set_base_model_state_dict(model, wrong)
        assert unchanged(model, before)
    result = set_base_model_state_dict(model, {"head.bias": torch.ones(4), "zz": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["zz"] and "embed.weight" in result.missing_keys
    set_base_model_state_dict(model, new)
    got = get_base_model_state_dict(model)
    assert all(torch.equal(got[k], new[k]) for k in new)
    assert all(torch.equal(v, adapter[k]) for k, v in get_peft_model_state_dict(model).items())


def test_another_base_is_told(saved: tuple[Path, Tensor]) -> None:
    other = adapted(model=Net(seed=3))
    with pytest.warns(PeftWarning, match="not the base model.*other values"):
        load_into(other, "default", read_adapter(saved[0]))
    before = snapshot(other)
    with pytest.raises(LoadError, match="not the base model"):
        load_into(other, "default", read_adapter(saved[0]), check_base="error")
    assert unchanged(other, before)


@pytest.mark.parametrize("change", ["same", "bfloat16", "float16", "resized", "adapted", "merged", "embeddings"])
def test_the_same_base_is_recognised(change: str, saved: tuple[Path, Tensor]) -> None:
    base = Net()
    if change == "resized":
        base.embed = nn.Embedding(12, 6)
    if change == "embeddings":
        nn.init.zeros_(base.embed.weight)
    model = adapted(model=base.to({"bfloat16": torch.bfloat16, "float16": torch.float16}.get(change, torch.float32)))
    if change == "adapted":
        add(model, config(modules_to_save=["head"]), "second")
    if change == "merged":
        add(model, config(), "second")
        merge(model.get_base_model(), ["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_into(model, "second" if change == "merged" else "default", read_adapter(saved[0]), check_base="error")
    remembered = read_adapter(saved[0]).metadata["veneer_base"]
    assert remembered and other_base(remembered, model.get_base_model()) is None


def test_a_changed_fingerprint_is_exact_in_one_dtype() -> None:
    base = Net().requires_grad_(False)
    remembered = fingerprint(base)
    assert len(remembered) < 3000 and "embed" not in remembered and "bias" not in remembered
    with torch.no_grad():
        base.layers[1].lora.weight.mul_(1 + 1e-5)  # type: ignore[union-attr, operator]
    said = other_base(remembered, base)
    assert said is not None and "layers.1.lora.weight" in said
    base.layers[1].lora = nn.Linear(5, 6)  # type: ignore[union-attr]
    assert "(6, 5)" in str(other_base(remembered, base))
    assert "no weights" in str(other_base(remembered, nn.Linear(3, 3)))


def test_a_changed_scaling_is_an_error(saved: tuple[Path, Tensor]) -> None:
    model = adapted(config(lora_alpha=16), seed=9)
    with pytest.raises(LoadError, match="lora_alpha is 16, and was 8"):
        load_into(model, "default", read_adapter(saved[0]))
    load_into(model, "default", read_adapter(saved[0]), check_config=False)
    file = read_adapter(saved[0])
    load_into(model, "default", AdapterFile(file.tensors, file.path))  # files of other libraries remember nothing


# ---------------------------------------------------------------- further slots of a method


class Recoded(LoraConfig):
    """A method that keeps one more tensor and writes its tensors in a form of its own."""

    def checkpoint_slots(self, model: nn.Module, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        yield "base_model.bank", f"base_model.bank.{adapter}", "bank", model

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.replace("bank", "bank_half"): v / 2 if "bank" in k else v for k, v in tensors.items()}

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.replace("bank_half", "bank"): v * 2 if "bank" in k else v for k, v in tensors.items()}


def test_a_method_may_add_slots_and_recode(tmp_path: Path) -> None:
    model = Wrapped(Net())
    model.register_parameter("bank", nn.Parameter(torch.randn(3)))
    cfg = Recoded(r=2, target_modules=["q_proj"])
    attach(model.get_base_model(), cfg, "default")
    model.peft_config["default"] = cfg
    save_adapter(model, cfg, "default", tmp_path)
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["base_model.bank_half"], model.bank / 2)  # type: ignore[operator]
    want = model.bank.detach().clone()  # type: ignore[operator]
    nn.init.zeros_(model.bank)  # type: ignore[arg-type]
    load_into(model, "default", read_adapter(tmp_path))
    assert torch.equal(model.bank, want)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "ranks", [{"up": 4, "down": 4}, {"up": 2, "down": 4}, {"0.up": 2, "1.up": 4, "down": 4}], ids=["none", "all", "some"]
)
def test_hira_is_read_with_the_ranks_of_the_file(ranks: dict[str, int], tmp_path: Path) -> None:
    """PEFT writes `rank_pattern` and heeds it only where the layer has a HiRA already."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({n: nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for n in "01"})

    targets = ["up", "down"]
    made = get_peft_model(net(), HiraConfig(r=4, target_modules=targets, rank_pattern=ranks))
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.normal_()
    made.save_pretrained(tmp_path)
    base = made.get_base_model()
    want = {n: layer.get_delta_weight("default") for n, layer in adapted_layers(base)}
    save_file(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")  # without what veneer notes
    written = tmp_path / "adapter_config.json"
    written.write_text(json.dumps({**json.loads(written.read_text()), "r": 4, "rank_pattern": {"up": 2}}))
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    loaded.load_adapter(tmp_path, "other")
    for name in ("default", "other"):
        got = {n: layer.get_delta_weight(name) for n, layer in adapted_layers(loaded.get_base_model())}
        assert got.keys() == want.keys() and all(torch.equal(got[n], d) for n, d in want.items())
    loaded.save_pretrained(tmp_path / "again")
    PeftModel.from_pretrained(net(), tmp_path / "again")


@pytest.mark.parametrize("name", ["runs--2", "a..b", "x.git", "models--gpt2/snapshot", "n" * 120, "modèle/x", "C:\\models\\x", "../gone"])
def test_whatever_the_base_is_called_the_adapter_is_saved(name: str, tmp_path: Path) -> None:
    """The base's config tells whether its vocabulary was resized; a folder that is gone, and whose name no repository may have, tells nothing."""
    pytest.importorskip("huggingface_hub")
    model = adapted(config(base_model_name_or_path=name), model=Tokens())
    save_adapter(model, model.peft_config["default"], "default", tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 12
    with pytest.raises(LoadError, match="no safetensors files"), original_weights(SimpleNamespace(name_or_path=name)):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eva_config", {"rho": 1.5}),
        ("corda_config", {"corda_method": "kpm"}),
        ("loftq_config", {"loftq_bits": 8}),
        ("kasa_config", {"beta": 0.1}),
        ("velora_config", {}),
        ("arrow_config", {"top_k": 1}),
    ],
)
def test_unknown_options_inside_a_field_are_passed_over_too(name: str, value: dict[str, Any], tmp_path: Path) -> None:
    """As files of a later version may have them."""
    LoraConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = {**json.loads(path.read_text()), "init_lora_weights": {"eva_config": "eva", "corda_config": "corda"}.get(name, True)}
    path.write_text(json.dumps({**fields, name: {**value, "later": 3, "empty": None}}))
    with pytest.warns(PeftWarning, match=rf"`{name}` has later, which .* does not know"):
        read = LoraConfig.from_pretrained(tmp_path)
    options = getattr(read, name)
    assert all(getattr(options, k) == v for k, v in value.items()) and not hasattr(options, "later")


def test_a_tied_heads_trained_rows_may_be_in_the_file_once_more() -> None:
    """PEFT writes them where it writes whole embeddings, as after a resize."""
    tied = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"

    def made(seed: int) -> Wrapped:
        return adapted(config(target_modules=["q_proj"], trainable_token_indices=[1, 3]), model=Tokens(tied=True), seed=seed)

    model, fresh = made(1), made(2)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=True)
    assert tied not in tensors
    rows = tensors["base_model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    with pytest.raises(LoadError, match="are tied in the model, but differ"):
        load_into(fresh, "default", {**tensors, tied: rows + 1})
    load_into(fresh, "default", {**tensors, tied: rows.clone()})
    assert torch.equal(fresh(IDS), model(IDS))
    load_into(made(3), "default", tensors)


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], r".*(q_proj|embed_tokens)"])
def test_tied_factors_that_have_come_apart_in_training_are_two_adapters(targets: Any, tmp_path: Path) -> None:
    """PEFT's do, where it turns them to float32."""
    model = get_peft_model(Tokens(tied=True), LoraConfig(r=2, target_modules=targets, ensure_weight_tying=True))
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(Tokens(tied=True), tmp_path).peft_config["default"].ensure_weight_tying
    tensors = {k: torch.randn_like(t) for k, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    tables = {k: Tokens(tied=True).embed_tokens.weight.detach() for k in tensors if "base_layer" in k}
    save_file({**tensors, **tables}, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(Tokens(tied=True), tmp_path)
    got = get_peft_model_state_dict(loaded)
    assert all(torch.equal(got[k], t) for k, t in tensors.items() if k not in tables)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(PeftModel.from_pretrained(Tokens(tied=True), tmp_path / "again")(IDS), loaded(IDS))


# ---------------------------------------------------------------- the model card


def test_a_new_card_has_the_front_matter(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    path = update_card(tmp_path, base_model="org/base: x's", tags=["lora", "transformers"], pipeline_tag="text-generation")
    _, head, body = path.read_text().split("---\n", 2)
    fields = yaml.safe_load(head)
    assert fields["base_model"] == "org/base: x's" and fields["library_name"] == "peft" and fields["pipeline_tag"] == "text-generation"
    assert fields["tags"] == ["base_model:adapter:org/base: x's", "lora", "transformers", "veneer"]
    assert "# Adapter for" in body


@pytest.mark.parametrize("written, then", [("transformers", "peft"), ("'transformers'", "peft"), ("diffusers", "diffusers")])
def test_a_card_of_trainer_is_one_of_an_adapter(written: str, then: str, tmp_path: Path) -> None:
    """Trainer.create_model_card writes the whole card anew, as for a whole model, and asks the adapted model to put it right."""
    path = tmp_path / "README.md"
    path.write_text(f"---\nlibrary_name: {written}\nlicense: mit\n---\nlibrary_name: transformers\n")
    update_card(tmp_path)
    assert path.read_text().startswith(f"---\nlibrary_name: {then}\nlicense: mit\n") and path.read_text().endswith(
        "---\nlibrary_name: transformers\n"
    )


@pytest.mark.parametrize(
    "head",
    [
        "",
        "---\nlicense: mit\ntags:\n- mine\n---\n",
        "---\ntags: [mine, 'lora']\nbase_model: my/own\n---\n",
        "---\ntags: []\nx: |\n  a: b\n---\n",
    ],
)
def test_a_card_keeps_what_the_user_wrote(head: str, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    body = "# My words\n\n---\nstay: here\n---\n"
    path = tmp_path / "README.md"
    path.write_text(head + body)
    update_card(tmp_path, base_model="org/base", tags=["lora"])
    text = path.read_text()
    assert text.endswith(body)
    fields, before = yaml.safe_load(text.split("---\n", 2)[1]), yaml.safe_load(head.removesuffix("---\n")) if head else {}
    for key, value in before.items():
        assert (set(value) <= set(fields[key])) if isinstance(value, list) else fields[key] == value
    assert {"lora", "veneer"} <= set(fields["tags"]) and len(set(fields["tags"])) == len(fields["tags"])
    update_card(tmp_path, base_model="org/base", tags=["lora"])
    assert path.read_text() == text  # nothing is added twice


def test_a_model_with_a_number_for_a_parameter_saves(tmp_path: Path) -> None:
    """CLIP's `logit_scale`."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale, self.proj = nn.Parameter(torch.tensor(2.5)), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x) * self.logit_scale

    base = Scaled()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x))
    base.logit_scale.data.fill_(3.0)
    with pytest.warns(PeftWarning, match="logit_scale"):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_card_keeps_its_line_ends_and_a_mark_before_it_hides_nothing(tmp_path: Path) -> None:
    """As editors on Windows write it."""
    path = tmp_path / "README.md"
    path.write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\nmine\r\n")
    update_card(tmp_path, tags=["lora"])
    assert path.read_bytes() == b"---\r\nlicense: mit\r\nlibrary_name: peft\r\ntags:\r\n- lora\r\n- veneer\r\n---\r\nmine\r\n"


def test_a_card_that_is_no_utf_8_is_named_and_left(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes("café".encode("cp1252"))
    with pytest.raises(SaveError, match=r"README.md.*no UTF-8.*adapter itself is written"):
        get_peft_model(Net(), config()).save_pretrained(tmp_path)
    assert path.read_bytes() == "café".encode("cp1252") and PeftModel.from_pretrained(Net(), tmp_path)


def test_a_byte_order_mark_before_a_config_is_passed_over(saved: tuple[Path, Tensor]) -> None:
    path = saved[0] / "adapter_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert torch.equal(PeftModel.from_pretrained(Net(), saved[0])(IDS), saved[1])


def test_no_file_goes_into_an_adapter_that_is_merged(saved: tuple[Path, Tensor]) -> None:
    """The weights would go on with the old values."""
    model = adapted()
    merge(model.get_base_model(), ["default"])
    with pytest.raises(LoadError, match=r"'default' is merged into .* Call unmerge_adapter\(\) first"):
        load_into(model, "default", read_adapter(saved[0]))
    unmerge(model.get_base_model())
    load_into(model, "default", read_adapter(saved[0]))
