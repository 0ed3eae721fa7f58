"""One LoRA in the place of another, under the same name, in a model that may be compiled: no layer is made anew, and nothing is compiled again."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checkpoint.base import check_identity
from .checkpoint.keys import Slot, adapters_of, bare, base_root, slots
from .checkpoint.load import config_of, read_adapter
from .checkpoint.match import match, plain
from .checkpoint.nested import as_registered
from .checkpoint.plan import keeps_dtype
from .config import PeftConfig
from .engine.holders import Attached
from .engine.layer import AdaptedLayer, adapted_layers, set_slot
from .engine.select import select
from .errors import ConfigError, MergeError, PeftError, PeftWarning, SwapError, hint
from .methods.lora import LoraConfig
from .sites import adaptable
from .types import name_of
from .variants import PLAIN, VARIANTS, variant_of

_ALIKE = ("use_rslora", "lora_dropout", "use_dora")
_PADDABLE = (PLAIN, VARIANTS["use_dora"])


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """See whether an adapter of the second config can take the place of one of the first. Ranks, alphas and their patterns may differ.

    Raises:
        ConfigError: if they are no LoRAs, or differ in what the layers are built with.
    """
    one, two = (name_of(c.peft_type) for c in (config0, config1))
    if one != two:
        raise ConfigError(f"Incompatible PEFT types found: {one} and {two}. Only an adapter of the same method can take another's place.")
    if not isinstance(config0, LoraConfig) or not isinstance(config1, LoraConfig):
        raise ConfigError(f"Hotswapping only supports LORA but {one} was passed. Load the adapter under a name of its own (load_adapter).")
    for name in (*_ALIKE, *(n for n in VARIANTS if n not in _ALIKE)):
        a, b = getattr(config0, name), getattr(config1, name)
        if a != b:
            raise ConfigError(f"Configs are incompatible: for {name}, {a} != {b}. Load the adapter under a name of its own (load_adapter).")


# -------------------------------------------------------------------- preparing


@torch.no_grad()
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make room in a model's LoRAs, before it is compiled, so that others of any rank up to `target_rank` and any alpha can take their place.

    The factors are filled up with zeros and the scalings become tensors. The adapters do what they did, and their configs say what they are now: of
    rank `target_rank`, with an alpha that keeps the scaling.

    Args:
        target_rank: the largest rank to come; None: ranks stay, and only as large ones can come.
        config: further configs to bring up to the new rank, in place. Those of the model itself are anyway.
        check_compiled: what to do if the model is compiled already: "error", "warn" or "ignore".

    Raises:
        ConfigError: if the model is compiled, has no LoRA, or one that cannot be filled up; the model is as it was.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead.")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        if check_compiled == "error":
            raise ConfigError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already compiled: it will be compiled once more.",
                PeftWarning,
                stacklevel=2,
            )
    loras = [
        (n, layer, a)
        for _, layer in adapted_layers(base_root(model))
        for n, a in layer.attached.items()
        if isinstance(a.config, LoraConfig)
    ]
    if not loras:
        raise ConfigError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading the first LoRA."
        )
    roomy = [(layer, a, _roomier(layer, a, target_rank)) for _, layer, a in loras]
    for name, layer, a in loras:
        if not isinstance(layer.scaling[name], Tensor):
            site = layer.weight_site
            device = site.codec.weight(layer.get_base_layer(), site.weight_key).device
            layer.scaling[name] = torch.tensor(float(layer.scaling[name]), device=device)
        a.kept = None
    for layer, a, new in roomy:
        assert a.place is not None
        leaves = new.leaves(a.place)
        for leaf in a.leaves:
            if leaf not in a.derived:
                t = a.tensor(leaf)
                if tuple(t.shape) != leaves[leaf].shape:
                    store, key = a.source[leaf]
                    roomy_t = _padded(t.detach(), leaves[leaf].shape, layer)
                    store[key] = nn.Parameter(roomy_t, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else roomy_t
        a.config, a.leaves = new, leaves
        layer.tell_compiled()
    for name in dict.fromkeys(n for n, _, _ in loras):
        _follow(model, name)
    if target_rank is not None and config:
        names = [a.place.called for _, _, a in loras if a.place is not None]
        for c in config.values() if isinstance(config, dict) else [config]:
            _take_over(c, {n: _ranked(c.at(n), target_rank) for n in names})


def _roomier(layer: AdaptedLayer, a: Attached, target_rank: int | None) -> LoraConfig:
    """The config of one layer's adapter with a larger rank. Always a copy of its own: compiled code depends on which layers share theirs."""
    config: Any = a.config
    rank = target_rank or config.r
    if config.r > rank:
        raise ConfigError(
            f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({config.r}) at {layer.name!r}. "
            "This is not possible."
        )
    if config.r == rank:
        return _ranked(config, rank)
    if rank % layer.site.groups:
        raise ConfigError(
            f"{layer.name!r} has groups={layer.site.groups}: please choose a target rank that is divisible by them, not {rank}."
        )
    if variant_of(config) not in _PADDABLE:
        raise ConfigError(
            f"`{variant_of(config).field}` means another change at another rank, so it cannot be filled up. Give no target_rank."
        )
    return _ranked(config, rank)


def _ranked(config: LoraConfig, rank: int) -> LoraConfig:
    """The config with another rank and the same scaling."""
    alpha = config.scale() * (math.sqrt(rank) if config.use_rslora else rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # said when the first was made
        return dataclasses.replace(config, r=rank, lora_alpha=int(alpha) if float(alpha).is_integer() else alpha)  # type: ignore[arg-type]


def _padded(t: Tensor, shape: tuple[int, ...], layer: AdaptedLayer) -> Tensor:
    """A tensor of a LoRA filled up with zeros to a larger rank: rows of A group by group or expert by expert, columns of B at the end."""
    blocks = layer.site.experts or layer.site.groups
    if t.shape[0] < shape[0]:
        rows = t.unflatten(0, (blocks, -1))
        out = t.new_zeros(blocks, shape[0] // blocks, *t.shape[1:])
        out[:, : rows.shape[1]] = rows
        return out.flatten(0, 1)
    out = t.new_zeros(shape)
    out[:, : t.shape[1]] = t
    return out


# -------------------------------------------------------------------- swapping


def hotswap_adapter(
    model: Any, model_name_or_path: str | os.PathLike[str], adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Put the LoRA of a folder (or the Hub) in the place of one that is loaded, wholly or not at all.

    The model then does what it would with the adapter loaded afresh, bit for bit unless it was prepared for larger ranks; the adapter's config has the
    new rank and alpha. Nothing is compiled again if `prepare_model_for_compiled_hotswap` made room, or rank and alpha are the same. Layers that the
    new adapter does not target are left without effect. Differs from PEFT's: a tensor that is missing is an error, the config follows, and ranks and
    alphas may differ from layer to layer.

    Args:
        model: a PeftModel, compiled or not.
        model_name_or_path: the folder, or, where no such folder exists, a name on the Hub.
        adapter_name: of the adapter that goes; the new one is called the same.
        torch_device: taken for PEFT's sake; the tensors go where the old ones are.
        kwargs: `subfolder, revision, cache_dir, token, ...`; `check_config=False`: let the config say another scaling than the one it was saved with.

    Raises:
        LoadError: if it does, or there is no file.
        ConfigError: if the two are not alike enough (see `check_hotswap_configs_compatible`).
        MergeError: if the adapter is merged.
        SwapError: if the file does not fit: keys that are missing or too many, other shapes, or a rank that the model has no room for.
        RouteError: if there is no such adapter.
    """
    check_config = kwargs.pop("check_config", True)
    hub = PeftConfig._split_kwargs(kwargs)[0]
    config = PeftConfig.from_pretrained(model_name_or_path, **hub)
    check_hotswap_configs_compatible(config_of(model, adapter_name), config)
    file = read_adapter(model_name_or_path, **hub)
    check_identity(file.metadata, base_root(model), config, check_base="off", check_config=check_config)
    _swap(model, as_registered(file.tensors, file.metadata, model, adapter_name), adapter_name, config, file.start)


def hotswap_adapter_from_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, config: LoraConfig, parameter_prefix: str = "lora_"
) -> None:
    """The same from tensors, by their keys in a file or their names in the model's state dict.

    Args:
        model: a PeftModel or a model with injected adapters, compiled or not.
        config: of the new adapter: its ranks and alphas.
        parameter_prefix: taken for PEFT's sake; keys are known whole.
    """
    _swap(model, state_dict, adapter_name, config, None)


@torch.no_grad()
def _swap(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str, config: LoraConfig, start: Mapping[str, Tensor] | None) -> None:
    root = base_root(model)
    layers = {layer: layer.attached[adapter] for _, layer in adapted_layers(root) if adapter in layer.attached}
    old = _config_of(model, adapter) or config
    if any(adapter in layer.merged_adapters for layer in layers):
        raise MergeError(
            f"Cannot hot-swap adapter {adapter!r} because it is currently merged into the base weights. Call unmerge_adapter() first."
        )
    loras = {layer: a for layer, a in layers.items() if isinstance(a.config, LoraConfig)}
    hit = select(root, config, supports=lambda m: adaptable(m, config.kinds) is not None, strict=False) if _targets(config) else None
    untrained = [path for path, m in hit.to_save.items() if adapter not in adapters_of(m)] if hit is not None else []
    if untrained:
        raise SwapError(
            f"The new adapter trains {untrained[0]!r} whole (modules_to_save), and the one that is there does not: its copy would go into the base "
            "model. Load it afresh. Nothing was changed."
        )
    aimed = {layer for layer, a in loras.items() if hit is None or _aimed(a, hit)}
    found = slots(model, adapter, old) | slots(model, adapter, old, start=True)
    given = _given({**tensors, **(start or {})}, found, adapter)
    where = {(id(store), key): (layer, leaf) for layer, a in loras.items() for leaf, (store, key) in a.source.items()}
    new = {layer: config.at(a.place.called) if layer in aimed else None for layer, a in loras.items() if a.place is not None}
    ready: list[tuple[Slot, Tensor]] = []
    missing: list[str] = []
    for key, slot in found.items():
        if slot.tied_with is not None:
            continue
        layer, leaf = where.get((id(_store(slot)), slot.attribute), (None, ""))
        value = given.get(key)
        if value is None and layer is not None and layer not in aimed:
            if set(loras[layer].leaves) - {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}:
                raise SwapError(
                    f"The new adapter does not target {layer.name!r}, whose DoRA (or start, or bias) would be left. Load it afresh."
                )
            value = torch.zeros_like(slot.tensor)
        if value is None:
            missing += [slot.memory_key] if slot.required else []
            continue
        ready.append((slot, _fitting(slot, value, layer, leaf, new.get(layer) if layer is not None else None, adapter)))
    if missing:
        raise SwapError(
            f"Hot swapping the adapter did not succeed, {len(missing)} of the {len(found)} tensors it needs are missing: {_some(missing)}. "
            "Nothing was changed."
        )
    for slot, value in ready:
        now = slot.tensor
        if (value.shape, value.dtype) == (now.shape, now.dtype):
            now.copy_(value)  # where it is: compiled code goes on with it
        else:
            set_slot(slot.owner, slot.attribute, value.clone(memory_format=torch.contiguous_format))
    for layer, here in new.items():
        a = loras[layer]
        if here is not None:
            layer.rescale(adapter, here.scale())
            room: Any = a.config
            same = (room.r, room.lora_alpha) == (here.r, here.lora_alpha)
            if isinstance(layer.scaling[adapter], Tensor):
                a.config = _ranked(here, room.r)
            elif not same:  # else the very object stays: compiled code depends on which layers share theirs
                a.config = here
            assert a.place is not None
            a.leaves = a.config.leaves(a.place)
        a.kept = None
        layer.tell_compiled()
    _follow(model, adapter)


def _targets(config: LoraConfig) -> bool:
    return bool(config.target_modules or config.target_parameters)


def _aimed(a: Attached, hit: Any) -> bool:
    """Whether a selection has the place of an adapter; the out_proj of an attention goes with it."""
    name = a.place.called if a.place is not None else ""
    return name in hit.names.values() or name in hit.parameters or name.removesuffix(".out_proj") in hit.names.values()


def _given(tensors: Mapping[str, Tensor], found: Mapping[str, Slot], adapter: str) -> dict[str, Tensor]:
    """The tensors by the keys of the slots."""
    if not found:
        raise SwapError(f"The model has no tensors of an adapter {adapter!r} to swap.")
    matches = match(tensors, found)
    unexpected = [k for k in tensors if k not in matches.slot_of]
    if unexpected:
        near = hint(plain(unexpected[0]), map(plain, found))
        raise SwapError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {_some(unexpected)}.{near} An adapter that targets more layers than "
            "the one that is there has to be loaded afresh. Nothing was changed."
        )
    return {
        (found[key].tied_with or found[key]).key: tensors[name].T if found[key].transposed else tensors[name]
        for name, key in matches.slot_of.items()
    }


def _fitting(slot: Slot, value: Tensor, layer: AdaptedLayer | None, leaf: str, config: LoraConfig | None, adapter: str) -> Tensor:
    """The value as it goes into the slot."""
    now = slot.tensor
    if layer is not None and config is not None:
        place = layer.attached[adapter].place
        assert place is not None
        leaves = config.leaves(place)
        wanted = leaves[leaf].shape if leaf in leaves else ()
        if tuple(value.shape) != tuple(wanted):
            raise SwapError(
                f"{slot.key!r} has the shape {tuple(value.shape)}, and its config asks for {tuple(wanted)}. Nothing was changed."
            )
        if isinstance(layer.scaling[adapter], Tensor) and value.shape != now.shape:
            if any(a > b for a, b in zip(value.shape, now.shape, strict=True)):
                raise SwapError(
                    f"{slot.key!r} has the shape {tuple(value.shape)}, and the model has room for {tuple(now.shape)}. Call "
                    "prepare_model_for_compiled_hotswap with the largest target_rank to come. Nothing was changed."
                )
            value = _padded(value, tuple(now.shape), layer)
        if isinstance(layer.scaling[adapter], Tensor):
            value = value.to(now.dtype)  # another one would be compiled again
    elif value.shape != now.shape:
        raise SwapError(
            f"{slot.key!r} has the shape {tuple(value.shape)} in the new adapter and {tuple(now.shape)} in the model. Nothing was changed."
        )
    if keeps_dtype(slot, value):
        value = value.to(now.dtype)
    return value.to(now.device)


def _store(slot: Slot) -> dict[str, Any]:
    owner: Any = slot.owner
    return owner._buffers if slot.attribute in owner._buffers else owner._parameters  # type: ignore[no-any-return]


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


# -------------------------------------------------------------------- configs


def _config_of(model: nn.Module, adapter: str) -> Any:
    try:
        return config_of(model, adapter)
    except PeftError:
        return None  # injected into a bare model that keeps no configs


def _follow(model: nn.Module, adapter: str) -> None:
    """Let the adapter's config say what its layers have."""
    config = _config_of(model, adapter)
    if config is not None:
        _take_over(config, dict(_here(bare(model), adapter)))


def _here(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraConfig]]:
    for _, layer in adapted_layers(model):
        a = layer.attached.get(adapter)
        if a is not None and a.place is not None and isinstance(a.config, LoraConfig):
            yield a.place.called, a.config


def _take_over(config: LoraConfig, here: Mapping[str, LoraConfig]) -> None:
    """Rank and alpha of every layer, into the config, which stays the same object."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        new = config.over({n: {"r": c.r, "lora_alpha": c.lora_alpha} for n, c in here.items()})
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        setattr(config, name, getattr(new, name))
