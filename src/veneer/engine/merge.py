"""Merging: the adapters' change put into the frozen weights, rounded once; and the frozen weights put back bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MergeError
from .inject import active_adapters, adapted_layers, unwrap
from .layer import AdaptedLayer
from .route import adapter_names, check_known
from .ties import holders, untie_config


@dataclass(frozen=True)
class LayerReport:
    """What one layer's merge lost to rounding.

    Attributes:
        error: ‖rounded ΔW - ΔW‖ / ‖ΔW‖.
        lost: share of entries whose weight did not move although their ΔW is not zero.
        size: ‖ΔW‖ / ‖W‖.
    """

    error: float
    lost: float
    size: float

    @property
    def verdict(self) -> str:
        """In words: `exact`, `good`, or `lossy` where more than a tenth of the change is lost."""
        return "exact" if self.error < 1e-6 else "good" if self.error <= 0.1 else "lossy"


@dataclass
class MergeReport:
    """Per layer path, what was lost."""

    layers: dict[str, LayerReport] = field(default_factory=dict)

    @property
    def worst(self) -> str | None:
        """The path with the largest error."""
        return max(self.layers, key=lambda p: self.layers[p].error) if self.layers else None

    def __str__(self) -> str:
        if not self.layers:
            return "nothing merged"
        rows = [f"{p}: error {r.error:.1e}, lost {r.lost:.1%}, {r.verdict}" for p, r in self.layers.items()]
        return "\n".join(rows)


def merge(model: nn.Module, names: Sequence[str] | None = None, *, safe_merge: bool = True, progressbar: bool = False) -> MergeReport:
    """Merge these (or the active) adapters into the model's weights; `unmerge` undoes it exactly.

    All active changes are summed in float32 (float64 for float64 weights) and rounded once. Every layer is computed and checked before
    the first is changed.

    Raises:
        MergeError: if a layer cannot be merged or gets values that are not finite; the model is as it was.
    """
    names = _names(model, names)
    return merge_layers(progress(list(adapted_layers(model)), progressbar, "Merging"), names, model)


def merge_layers(layers: Iterable[tuple[str, AdaptedLayer]], names: Sequence[str], model: nn.Module | None = None) -> MergeReport:
    """Merge into these layers: compute and check all, then change all."""
    report = MergeReport()
    ready: list[tuple[AdaptedLayer, list[str], dict[str, Tensor]]] = []
    for path, layer in layers:
        mine = [n for n in names if n in layer.attached]
        if not mine or set(mine) <= set(layer.merged_adapters):
            continue
        mine = layer.merged_adapters + [n for n in mine if n not in layer.merged_adapters]
        tensors, report.layers[path] = _merged(path, layer, mine)
        ready.append((layer, mine, tensors))
    shared = {id(p) for p in _shared_parameters(model)} if model is not None else set()
    for layer, mine, tensors in ready:
        for name, new in tensors.items():
            _swap(layer, name, new, shared)
        layer.merged_adapters = mine
    if model is not None and ready:
        ready[0][0].switch.untied += untie_config(model)
    return report


@torch.no_grad()
def _merged(path: str, layer: AdaptedLayer, names: list[str]) -> tuple[dict[str, Tensor], LayerReport]:
    """The layer's tensors that change, by name, in its own layout and dtypes, checked."""
    for name in names:
        if why := layer.attached[name].config.unmergeable:
            raise MergeError(f"{path}: the adapter {name!r} cannot be merged: {why}. Keep it unmerged.")
    frozen = layer.frozen_tensors()
    wide = {k: t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t for k, t in frozen.items()}
    try:
        exact = layer.site.substituted(layer.base_layer, layer.changes(names, at_rest=True), wide)
    except MergeError as e:
        raise MergeError(f"{path}: {e}") from None
    if set(exact) - set(frozen):
        raise MergeError(
            f"{path}: the adapter trains a bias, and the layer has none to merge it into. Keep it unmerged, or give the layer a bias of zeros."
        )
    rounded = {k: t.to(frozen[k].dtype).contiguous() for k, t in exact.items() if t is not wide[k]}
    if not all(bool(torch.isfinite(t).all()) for t in rounded.values()):
        raise MergeError(f"{path}: NaNs detected in the merged weights. The adapter {names} seems to be broken")
    floating = [k for k, t in rounded.items() if t.is_floating_point()]
    return rounded, _loss([(exact[k] - wide[k], rounded[k].to(wide[k].dtype) - wide[k], wide[k]) for k in floating])


def _loss(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> LayerReport:
    """`parts`: of each tensor the exact difference, the one that is left after rounding, and the frozen values."""

    def norm(tensors: Iterable[Tensor]) -> float:
        return math.sqrt(sum(float(t.norm()) ** 2 for t in tensors))

    size = norm(d for d, _, _ in parts)
    count = sum(int((d != 0).sum()) for d, _, _ in parts)
    lost = sum(int(((got == 0) & (d != 0)).sum()) for d, got, _ in parts)
    return LayerReport(
        norm(got - d for d, got, _ in parts) / size if size else 0.0,
        lost / count if count else 0.0,
        size / max(norm(w for _, _, w in parts), 1e-30),
    )


def _shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [m._parameters[n] for group in holders(model).values() for _, m, n in group[:1]]  # type: ignore[misc]


def owner_of(layer: AdaptedLayer, dotted: str) -> tuple[nn.Module, str]:
    """The module below the layer's base that holds the tensor of this name, and its last name."""
    path, _, name = dotted.rpartition(".")
    return layer.base_layer.get_submodule(path), name


def _swap(layer: AdaptedLayer, key: str, new: Tensor, shared: set[int]) -> None:
    """Put new values into a tensor and keep the frozen ones. A parameter that others hold too is left to them."""
    owner, name = owner_of(layer, key)
    p = owner._parameters.get(name)
    if p is None:
        layer.originals.setdefault(key, (None, owner._buffers[name]))  # type: ignore[arg-type]
        owner._buffers[name] = new
        return
    layer.originals.setdefault(key, (p, p.data))
    if id(p) in shared:
        owner._parameters[name] = nn.Parameter(new, requires_grad=p.requires_grad)
    else:
        p.data = new


@torch.no_grad()
def unmerge_layer(layer: AdaptedLayer) -> None:
    """Put the frozen tensors of one layer back, bit for bit."""
    for key, (p, values) in layer.originals.items():
        owner, name = owner_of(layer, key)
        if p is None:
            owner._buffers[name] = values
        elif owner._parameters[name] is p:
            p.data = values
        else:
            owner._parameters[name] = p  # the shared parameter itself: tied again
    layer.originals = {}
    layer.merged_adapters = []


def unmerge(model: nn.Module) -> None:
    """Put all frozen tensors back, bit for bit; weights that were tied are tied again."""
    layers = [layer for _, layer in adapted_layers(model) if layer.merged]
    for layer in layers:
        unmerge_layer(layer)
    for layer in layers[:1]:
        for config in layer.switch.untied:
            config.tie_word_embeddings = True
        layer.switch.untied = []


def merge_and_unload(
    model: nn.Module, names: Sequence[str] | None = None, *, safe_merge: bool = True, progressbar: bool = False
) -> nn.Module:
    """Merge these (or the active) adapters for good and take all wrappers off; modules trained whole take the originals' places."""
    from ..blocks.saved import ModulesToSaveWrapper

    names = _names(model, names)
    merge(model, names, safe_merge=safe_merge, progressbar=progressbar)

    def inner(wrapper: Any) -> nn.Module:
        if isinstance(wrapper, ModulesToSaveWrapper):
            mine = [n for n in names if n in wrapper.modules_to_save]
            if mine:
                copied: nn.Module = wrapper.modules_to_save[mine[-1]]
                return copied
        out: nn.Module = wrapper.inside()
        return out

    for _, layer in adapted_layers(model):
        layer.originals = {}
    top = unwrap(model, inner)
    untie_config(top)
    return top


def _names(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    if names is None:
        return active_adapters(model)
    names = [names] if isinstance(names, str) else list(names)
    check_known(names, adapter_names(model))
    return names


def progress(layers: list[tuple[str, AdaptedLayer]], show: bool, what: str) -> Iterable[tuple[str, AdaptedLayer]]:
    """The layers, behind a bar if it is asked for."""
    if not show:
        return layers
    from tqdm import tqdm

    wrapped: Iterable[tuple[str, AdaptedLayer]] = tqdm(layers, desc=what, unit="layer")
    return wrapped
