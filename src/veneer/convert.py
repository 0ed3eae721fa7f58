"""Adapters of any method with a ΔW turned into LoRAs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .checkpoint.keys import PREFIX, adapter_names, bare, base_root, is_wrapped, join_path, slots, walk
from .checkpoint.load import config_of
from .checkpoint.save import write_adapter
from .deltas.thin import check_rank
from .engine.combine import CombineReport, finished, layers_of
from .engine.layer import AdaptedLayer, adapted_layers
from .engine.merge import progress
from .engine.parts import Parts, Recipe
from .engine.route import check_known
from .errors import ConfigError, ConversionError, PeftWarning
from .methods.lora import LoraConfig

_KEPT = ("task_type", "base_model_name_or_path", "revision", "layer_replication", "fan_in_fan_out")


class Converted(tuple[LoraConfig, dict[str, Tensor]]):
    """The pair (config, tensors by key) of a converted adapter.

    Attributes:
        report: by layer, the rank and what was lost.
    """

    report: CombineReport


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> Converted:
    """An adapter as a LoRA of the scaling 1: what it does to each weight, cut to a rank.

    Changes that are thin by nature (VeRA, DeLoRA, MiSS, …) are never formed whole, and converted exactly where `rank` allows. Trained copies of modules,
    trained rows and biases come along. Differs from PEFT's: any method whose change is a ΔW, on every kind of layer.

    Args:
        model: a PeftModel, or a model with injected adapters.
        rank: an int: the largest rank of a layer; a float in (0, 1]: on each layer the least rank with that share of the squared singular values.
        progressbar: show how far it is (needs tqdm).
        compile_kwargs: taken for PEFT's sake; there is nothing to compile.

    Returns:
        (config, tensors): unpack it. `.report` tells per layer the rank and the error; a warning comes if more than a tenth of a change is lost.

    Raises:
        ConversionError (a TypeError): if the adapter has no layers, or one whose change is no ΔW.
        ConfigError (a ValueError): if the rank is none, or more than any layer has.
        RouteError: for an adapter that is not there.
    """
    check_rank(rank)
    if compile_kwargs is not None:
        warnings.warn("`compile_kwargs` has no effect: converting is a few thin decompositions.", PeftWarning, stacklevel=2)
    root = base_root(model)
    if next(adapted_layers(root), None) is None:
        raise ConversionError("Could not detect any layer that supports LoRA conversion.")
    check_known([adapter_name], adapter_names(model))
    config = config_of(model, adapter_name)
    mine = {adapter_name: config}
    layers = layers_of(root, mine)
    _check(list(layers), adapter_name, config, rank)
    recipe, weights = Recipe("svd", rank, padded=False), {adapter_name: 1.0}
    shifts = any(Parts.of(layer, weights, mine, recipe).traits().shift for layer in layers)
    report, here, made = CombineReport(), {}, {}
    for path, layer in progress([(path, layer) for layer, path in layers.items()], progressbar, "Converting to LoRA"):
        parts = Parts.of(layer, weights, mine, recipe, shifts=shifts)
        here[parts.site.called], made[layer] = LoraConfig.holding(parts.low_rank(), parts.site)
        report.layers[path] = parts.done
    new: Any = LoraConfig(**{n: getattr(config, n) for n in _KEPT if getattr(config, n, None)}).over(here)
    new = finished(root, new, mine, made, report).config
    out = Converted((new, _keyed(model, adapter_name, config, new, made)))
    out.report = report
    report.warn("Give a larger rank.")
    return out


def _check(layers: list[AdaptedLayer], adapter: str, config: Any, rank: float) -> None:
    without = [layer for layer in layers if not layer.supports_lora_conversion(adapter)]
    if without or not layers:
        why = config.unmergeable or "it changes no weight"
        raise ConversionError(
            f"{type(config).__name__} does not support LoRA conversion: {why}. Adapters can be converted whose change is a ΔW; "
            "see model.supports_lora_conversion(name)."
        )
    side = max(min(layer.site.n_out // layer.site.groups, layer.site.n_in * layer.site.groups) * layer.site.groups for layer in layers)
    if isinstance(rank, int) and rank > side:
        raise ConfigError(f"The chosen rank {rank} is larger than the weight shape ({side}), please choose a lower rank.")
    if isinstance(config, LoraConfig):
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that.",
            PeftWarning,
            stacklevel=3,
        )


def _keyed(
    model: nn.Module, adapter: str, config: Any, new: LoraConfig, made: Mapping[AdaptedLayer, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors by key: those of the layers, and what the adapter trains besides."""
    out: dict[str, Tensor] = {}
    for spot in walk(bare(model)):
        layer: Any = spot.module
        if layer not in made:
            continue
        place = layer.attached[adapter].place
        for name, leaf in new.at(place.called).leaves(place).items():
            file = leaf.on_disk or join_path(leaf.container or name, leaf.attr or "")
            out[join_path(spot.path, file)] = made[layer][name].reshape(leaf.shape).contiguous()
    for key, slot in slots(model, adapter, config, prefix="").items():
        home: Any = slot.home
        theirs = slot.base or hasattr(type(home), "acting") or (isinstance(home, AdaptedLayer) and home not in made)
        if slot.saved and theirs:
            out[key] = slot.value()
    return out


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> CombineReport:
    """Write an adapter, turned into a LoRA, as a folder of its own, which veneer and PEFT load. Arguments and errors as of `convert_to_lora`.

    Returns:
        by layer, the rank and what was lost.
    """
    made = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config, tensors = made
    write_adapter(tensors if is_wrapped(bare(model)) else {PREFIX + k: t for k, t in tensors.items()}, config, path)
    return made.report
