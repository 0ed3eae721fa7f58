"""Several adapters made one: worked out for every layer before the first thing changes, and brought into the form of a new adapter."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, NoMatchingPeftModuleError, PeftWarning, RouteError
from ..method import Method
from ..sharding import reshard, whole
from ..sites import adaptable
from .holders import opened
from .layer import AdaptedLayer, adapted_layers
from .parts import AS_LORA, ON_DELTA, Combined, Parts, Recipe, united
from .route import check_known
from .select import select
from .wrapper import adapter_modules

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
    """An adapter that has been worked out and is in no model yet.

    Attributes:
        config: its config.
        tensors: by layer, its tensors.
        beside: by module that is trained whole, or table with trained rows, the adapter whose values it takes over.
    """

    config: Method
    tensors: Mapping[AdaptedLayer, Mapping[str, Tensor]]
    beside: dict[Any, str]
    report: CombineReport

    @torch.no_grad()
    def fill(self, adapter: str) -> None:
        """Put the values into the adapter, which has been attached by this config."""
        rows = {m: m.attached[other] for m, other in self.beside.items() if isinstance(m, AdaptedLayer)}
        tensors = {m: {n: a.tensor(n) for n in a.leaves if n not in a.derived} for m, a in rows.items()}
        for layer, values in {**self.tensors, **tensors}.items():
            for leaf, t in values.items():
                a, name = layer.attached[adapter], leaf
                if name in a.derived:  # shared by all layers
                    a, name, _ = a.derived[name]
                store, key = a.source[name]
                old: Tensor = store[key]
                new = whole(t.detach()).to(old.device).reshape(old.shape).clone(memory_format=torch.contiguous_format)
                store[key] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        for module, other in self.beside.items():
            if module not in rows:
                module.modules_to_save[adapter].load_state_dict(module.modules_to_save[other].state_dict())


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
    reshard(model)
    mine = {n: configs[n] for n in weights}
    _check_methods(mine, like)
    config = next(iter(mine.values())) if like is None else like
    layers = layers_of(model, mine)
    traits = [Parts.of(layer, weights, mine, recipe).traits() for layer in layers]  # the changes themselves may be large: made anew below
    if recipe.kind in ON_DELTA and recipe.rank is None:
        recipe = dataclasses.replace(recipe, rank=max((t.rank for t in traits), default=0) or None)
    gains, shifts = any(t.gain for t in traits), any(t.shift for t in traits)
    report, here, tensors = CombineReport(), {}, {}
    for layer, path in layers.items():
        with opened(layer.attached[n] for n in mine if n in layer.attached):
            parts = Parts.of(layer, weights, mine, recipe, gains, shifts)
            here[parts.site.called], tensors[layer] = config.combine(parts, parts.site)
        report.layers[path] = parts.done
    return finished(model, config.over(here), mine, tensors, report)


def finished(
    model: nn.Module, config: Any, configs: Mapping[str, Any], tensors: Mapping[AdaptedLayer, Mapping[str, Tensor]], report: CombineReport
) -> Combination:
    """The new adapter with its targets, and what the adapters it is made of train beside their layers.

    Raises:
        ConfigError: if two of them have a trained copy of one module, or trained rows of one table.
    """
    beside: dict[Any, str] = {}
    for path, module in adapter_modules(model):
        there = [n for n in configs if n in module.adapters()]
        if there and module not in tensors:
            beside[module] = _only(there, path)
    rows = [configs[n].trainable_token_indices for m, n in beside.items() if isinstance(m, AdaptedLayer)]
    saved = {n for c in configs.values() for n in getattr(c, "modules_to_save", None) or ()}
    biases = [b for c in configs.values() if (b := getattr(c, "bias", "none")) != "none"]
    extra: dict[str, Any] = {"modules_to_save": sorted(saved) or None}
    if rows:
        extra["trainable_token_indices"] = rows[0]
    if biases:
        extra["bias"] = biases[0]  # they are in the base model, whichever adapter acts
    known = {f.name for f in dataclasses.fields(config)}
    config = dataclasses.replace(config, **{k: v for k, v in extra.items() if k in known})
    return Combination(targeting(model, config, tensors, list(configs.values())), tensors, beside, report)


def layers_of(model: nn.Module, configs: Mapping[str, Method]) -> dict[AdaptedLayer, str]:
    """The layers that any of these adapters is on with its own method, with their paths."""
    return {
        layer: path
        for path, layer in adapted_layers(model)
        if any(n in layer.attached and type(layer.attached[n].config) is type(c) for n, c in configs.items())
    }


def _check_methods(configs: Mapping[str, Method], like: Method | None) -> None:
    kinds = {n: type(c).__name__ for n, c in configs.items()}
    if like is None and len(set(kinds.values())) > 1:
        raise ConfigError(f"The adapters are of several methods: {kinds}. {AS_LORA}")
    for name, c in configs.items():
        if why := c.unmergeable or ("it replaces whole modules" if c.kinds == {"module"} else ""):
            raise ConfigError(f"The adapter {name!r} cannot be combined with others: {why}.")


def _only(names: Sequence[str], path: str) -> str:
    if len(names) > 1:
        raise ConfigError(
            f"The adapters {list(names)} each train {path!r} in a way of their own (modules_to_save, trainable_token_indices), and these copies "
            f"cannot be combined. Keep one: model.get_base_model().get_submodule({path!r}).delete_adapter({names[-1]!r}) drops another's."
        )
    return names[0]


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
            hit = select(model, candidate, supports=lambda m: adaptable(m, config.kinds) is not None, strict=False)
        except (ConfigError, NoMatchingPeftModuleError, RouteError):
            continue
        if sorted(hit.names[p] for p in hit.modules) == names and sorted(hit.parameters) == parameters:
            return candidate
    raise ConfigError(f"No config of {type(config).__name__} targets just the layers {names + parameters}.")


_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def _ways(names: list[str], parameters: list[str], like: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Fields that may hit the modules `names` and the `parameters`: as the configs in `like` have them, by whole names, by an expression for these."""
    common = {f: getattr(like[0], f, None) for f in _NARROWING if len({str(getattr(c, f, None)) for c in like}) == 1}
    theirs = {f: united([getattr(c, f, None) for c in like]) for f in ("target_modules", "target_parameters")}
    if theirs["target_parameters"]:
        theirs["target_parameters"] = sorted(theirs["target_parameters"])
    yield {**dict.fromkeys(_NARROWING), **common, **theirs}
    bare = {**dict.fromkeys(_NARROWING), "target_parameters": parameters or None}
    yield {**bare, "target_modules": set(names)}
    yield {**bare, "target_modules": "|".join(map(re.escape, names)) or []}
