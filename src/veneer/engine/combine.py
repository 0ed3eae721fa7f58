"""Several adapters made one: worked out for every layer before the first thing changes, and brought into the form of a new adapter."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, NoMatchingPeftModuleError, PeftWarning, RouteError
from ..method import Method
from .inject import adapted_layers, adapter_modules, kind_of
from .layer import AdaptedLayer
from .parts import AS_LORA, ON_DELTA, Combined, Parts, Recipe, united
from .route import check_known
from .select import select

LOSSY = 0.1  # the error from which a combination is worth a warning


@dataclass
class CombineReport:
    """Per layer path, the new rank and what was lost."""

    layers: dict[str, Combined] = field(default_factory=dict)

    @property
    def worst(self) -> str | None:
        """The path with the largest error."""
        return max(self.layers, key=lambda p: self.layers[p].error) if self.layers else None

    def warn(self, advice: str) -> None:
        """Say so if a layer lost more than a tenth of its change."""
        bad = [p for p, c in self.layers.items() if c.error > LOSSY]
        if bad and self.worst is not None:
            warnings.warn(
                f"{len(bad)} of {len(self.layers)} layers are off by more than {LOSSY:.0%} of their change, most of all {self.worst!r} "
                f"({self.layers[self.worst].error:.0%}). {advice}",
                PeftWarning,
                stacklevel=4,
            )

    def __str__(self) -> str:
        return "\n".join(f"{p}: rank {c.rank}, error {c.error:.1e}" for p, c in self.layers.items()) or "no layers"


@dataclass(eq=False)
class Combination:
    """A combination that has been worked out and is in no model yet.

    Attributes:
        config: of the new adapter.
        tensors: by layer, its tensors;  copies: by module that is trained whole, whose copy it takes.
    """

    config: Method
    tensors: dict[AdaptedLayer, Mapping[str, Tensor]]
    copies: dict[Any, str]
    report: CombineReport

    @torch.no_grad()
    def fill(self, adapter: str) -> None:
        """Put the values into the adapter, which has been attached by this config."""
        for layer, tensors in self.tensors.items():
            a = layer.attached[adapter]
            for name, t in tensors.items():
                store, key = a.source[name]
                old: Tensor = store[key]
                new = t.detach().to(old.device).reshape(old.shape).clone(memory_format=torch.contiguous_format)
                store[key] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        for wrapper, other in self.copies.items():
            wrapper.modules_to_save[adapter].load_state_dict(wrapper.modules_to_save[other].state_dict())


def combine(
    model: nn.Module,
    configs: Mapping[str, Method],
    weights: Mapping[str, float],
    recipe: Recipe,
    like: Method | None = None,
) -> Combination:
    """Work out the adapter that does what several do together. Nothing of the model changes.

    Args:
        model: the user's model, with the adapters in it.
        configs: those of all its adapters.
        weights: by adapter.
        like: a config of the method that the new adapter is of; by default that of the adapters, the first one's.

    Raises:
        RouteError: for an adapter that is not there.
        ConfigError: if the adapters cannot be combined, or not so.
    """
    check_known(weights, list(configs))
    recipe.check()
    mine = [configs[n] for n in weights]
    _check_methods(weights, configs, like)
    config = mine[0] if like is None else like
    copies = _trained_copies(model, weights)
    tokens, layers = {}, {}
    for path, layer in adapted_layers(model):
        there = [n for n in weights if n in layer.attached]
        if not there:
            continue
        if any(type(layer.attached[n].config) is not type(configs[n]) for n in there):
            tokens[layer] = _only(there, f"trained rows of {path.removesuffix('.token_adapter')!r} (trainable_token_indices)")
        else:
            layers[layer] = path
    traits = [Parts.of(layer, weights, mine, recipe).traits() for layer in layers]  # the changes themselves may be large: made anew below
    if recipe.kind in ON_DELTA and recipe.rank is None:
        recipe = dataclasses.replace(recipe, rank=max((t.rank for t in traits), default=0) or None)
    gains, shifts = any(t.gain for t in traits), any(t.shift for t in traits)
    report, here, tensors = CombineReport(), {}, {}
    for layer, path in layers.items():
        parts = Parts.of(layer, weights, mine, recipe, gains, shifts)
        here[parts.site.called], tensors[layer] = config.combine(parts, parts.site)
        report.layers[path] = parts.done
    new = config.over(here)
    extra: dict[str, Any] = {}
    if copies or any(getattr(c, "modules_to_save", None) for c in mine):
        extra["modules_to_save"] = sorted({n for c in mine for n in getattr(c, "modules_to_save", None) or ()}) or None
    if tokens:
        extra["trainable_token_indices"] = configs[next(iter(tokens.values()))].trainable_token_indices  # type: ignore[attr-defined]
        for layer, owner in tokens.items():
            if not layer.attached[owner].derived:
                tensors[layer] = {n: layer.leaf(owner, n) for n in layer.attached[owner].leaves}
    if biased := [c.bias for c in mine if getattr(c, "bias", "none") != "none"]:  # type: ignore[attr-defined]
        extra["bias"] = biased[0]  # they are in the base model, whichever adapter acts
    return Combination(targeting(model, dataclasses.replace(new, **extra), layers, mine), tensors, copies, report)


def _check_methods(weights: Mapping[str, float], configs: Mapping[str, Method], like: Method | None) -> None:
    kinds = {n: type(configs[n]) for n in weights}
    if like is None and len(set(map(id, kinds.values()))) > 1:
        raise ConfigError(f"The adapters are of several methods: { {n: k.__name__ for n, k in kinds.items()} }. {AS_LORA}")
    for name in weights:
        if why := configs[name].unmergeable:
            raise ConfigError(f"The adapter {name!r} cannot be combined with others: {why}.")


def _only(names: Sequence[str], what: str) -> str:
    if len(names) > 1:
        raise ConfigError(
            f"The adapters {list(names)} each have their own {what}, and these cannot be combined. Leave all but one of them out, or delete the "
            "copies that are not wanted (save that adapter, take it out of its adapter_config.json and load it again)."
        )
    return names[0]


def _trained_copies(model: nn.Module, weights: Mapping[str, float]) -> dict[Any, str]:
    """By module that is trained whole, the one adapter that has a copy of it."""
    out = {}
    for path, module in adapter_modules(model):
        if isinstance(module, AdaptedLayer):
            continue
        there = [n for n in weights if n in module.adapters()]
        if there:
            out[module] = _only(there, f"trained copy of {path!r} (modules_to_save)")
    return out


# -------------------------------------------------------------------- targets


def targeting(model: nn.Module, config: Any, layers: Iterable[AdaptedLayer | Any], like: Sequence[Any]) -> Any:
    """A config that targets just these adapted layers, as the configs in `like` name them if that hits no others.

    Args:
        layers: adapted layers, or anything by such.
    """
    wanted = list(layers)
    inner = {id(getattr(layer.base_layer, "out_proj", None)) for layer in wanted if layer.site.kind == "attention"}
    modules = [layer for layer in wanted if layer.site.kind != "parameter" and id(layer) not in inner]
    called = {id(layer): next(a.place.called for a in layer.attached.values() if a.place is not None) for layer in wanted}
    names = sorted(called[id(layer)] for layer in modules)
    parameters = sorted(called[id(layer)] for layer in wanted if layer.site.kind == "parameter")
    for fields in _ways(names, parameters, like):
        known = {f.name for f in dataclasses.fields(config)}
        try:
            candidate = dataclasses.replace(config, **{k: v for k, v in fields.items() if k in known})
            hit = select(model, candidate, supports=lambda m: kind_of(m) in config.kinds, strict=False)
        except (ConfigError, NoMatchingPeftModuleError, RouteError):
            continue
        if sorted(hit.names[p] for p in hit.modules) == names and sorted(hit.parameters) == parameters:
            return candidate
    raise ConfigError(f"No config of {type(config).__name__} targets just the layers {names + parameters}.")


def _ways(names: list[str], parameters: list[str], like: Sequence[Any]) -> Iterator[dict[str, Any]]:
    def all_(field_name: str) -> list[Any]:
        return [getattr(c, field_name, None) for c in like]

    plain: dict[str, Any] = {
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_parameters": parameters or None,
    }
    targets = united(all_("target_modules"))
    for narrowed in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if all(v == all_(narrowed)[0] for v in all_(narrowed)):
            plain[narrowed] = all_(narrowed)[0]
    yield {
        **plain,
        "target_modules": targets,
        "target_parameters": united(all_("target_parameters")) and sorted(united(all_("target_parameters"))),
    }
    bare = {**plain, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    yield {**bare, "target_modules": set(names)}
    yield {**bare, "target_modules": "|".join(map(_escaped, names)) or []}


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")
