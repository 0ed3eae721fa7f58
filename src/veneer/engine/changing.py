"""What an adapter does on a layer now: made anew while it trains, and otherwise as it was the last time, as long as that is still true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..change import Change
from ..kernels.autograd import autocast_dtype, transformed
from ..kernels.norms import checksum
from ..method import Method
from ..ops import LowRank, Switched
from ..sites import Site
from .caching import keeping, stamp
from .holders import Attached, Kept, Recalled, Tensors
from .route import Facts

if TYPE_CHECKING:
    from .layer import AdaptedLayer


def change_of(layer: AdaptedLayer, a: Attached, facts: Mapping[str, Facts], at_rest: bool = False) -> Any:
    """What `AdaptedLayer.change` says of an adapter on the layer."""
    if a.traced is not None and torch.compiler.is_compiling() and not facts and not at_rest:
        made = a.traced.config.change(a.traced.held or Tensors(a), a.traced)
        return _skipped(made, a.traced.config, a) if layer.training else made
    assert a.place is not None
    if layer.training and at_rest:
        return a.config.change(Tensors(a), a.place.at_rest())
    told = facts.get(a.place.adapter) if facts else None
    if layer.training or told is not None or torch.compiler.is_compiling():
        change = a.config.change(Tensors(a), a.place if told is None else a.place.during(told))
        return _skipped(change, a.config, a) if layer.training else change
    if keeping() and not torch.is_grad_enabled() and isinstance(layer.site, Site):
        return _cached(layer, a)
    scaling = a.place.scaling
    kept = a.kept  # read once: another thread may forget it
    if kept is not None and kept.holds(scaling):
        return kept.change
    if torch.is_grad_enabled() or a.config.routes or isinstance(scaling, Tensor) or not isinstance(layer.site, Site) or transformed():
        change = a.config.change(Tensors(a), a.place)
        a.kept = Kept.of(change, a, scaling)
        return change
    return _recalled(layer, a, scaling)


def _recalled(layer: AdaptedLayer, a: Attached, scaling: float) -> Any:
    """The change as it was the last time, if all it is made of is equal to what it was."""
    assert a.place is not None
    tensors = Tensors(a)
    autocast = autocast_dtype("cpu")
    before = a.recalled
    if before is not None and before.holds(scaling, vars(tensors), lambda: checksum(layer.frozen_weight()), autocast):
        return before.change
    here = a.place.during({})
    here.told, here.asked = a.place.told, False
    change: Any = a.config.change(tensors, here)
    a.kept, a.recalled = Kept.of(change, a, scaling), None
    if a.kept is None and layer.assumed is None and Recalled.worth(change, vars(tensors)):
        weight = checksum(layer.frozen_weight()) if here.asked else None
        if not here.asked or weight is not None:
            a.recalled = Recalled(change, scaling, {k: t.clone() for k, t in vars(tensors).items()}, weight, autocast)
    return change


def _skipped(change: Any, config: Method, a: Attached) -> Any:
    """The change, or none of it with the probability that the method asks for."""
    rate = config.skip()
    if rate > 0 and change.add is not None:
        some = a.tensor(next(iter(a.leaves)))
        change.add = Switched(change.add, torch.rand((), device=some.device) >= rate)
    return change


def _cached(layer: AdaptedLayer, a: Attached) -> Change:
    """The change as it was the last time, if nothing it is made of has been written to since."""
    assert a.place is not None
    now = (float(a.place.scaling), stamp([*vars(tensors := Tensors(a)).values(), layer.frozen_weight()]))
    cached = a.cached
    if cached is None or cached[0] != now:
        change: Any = a.config.change(tensors, a.place)
        if type(change.add) is not LowRank:
            return change  # type: ignore[no-any-return]  # it may be as large as the weight
        a.cached = cached = now, change
    return cached[1]
