"""Merging: the adapters' change put into the frozen weights, rounded once; and the frozen weights put back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..change import bias as changed_bias
from ..change import weight as changed_weight
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
    return merge_layers(_progress(list(adapted_layers(model)), progressbar), names, model)


def merge_layers(layers: Iterable[tuple[str, AdaptedLayer]], names: Sequence[str], model: nn.Module | None = None) -> MergeReport:
    """Merge into these layers: compute and check all, then change all."""
    report = MergeReport()
    ready: list[tuple[AdaptedLayer, list[str], Tensor, Tensor | None]] = []
    for path, layer in layers:
        mine = [n for n in names if n in layer.attached]
        if not mine or set(mine) <= set(layer.merged_adapters):
            continue
        mine = layer.merged_adapters + [n for n in mine if n not in layer.merged_adapters]
        w, b, report.layers[path] = _merged(path, layer, mine)
        ready.append((layer, mine, w, b))
    shared = {id(p) for p in _shared_parameters(model)} if model is not None else set()
    for layer, mine, w, b in ready:
        _commit(layer, mine, w, b, shared)
    if model is not None and ready:
        ready[0][0].switch.untied += untie_config(model)
    return report


@torch.no_grad()
def _merged(path: str, layer: AdaptedLayer, names: list[str]) -> tuple[Tensor, Tensor | None, LayerReport]:
    """W' and b' in the layer's own layout and dtype, checked."""
    site, base = layer.site, layer.base_layer
    for name in names:
        if why := layer.attached[name].config.unmergeable:
            raise MergeError(f"{path}: the adapter {name!r} cannot be merged: {why}. Keep it unmerged.")
    stored = layer.get_base_weight()
    wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
    frozen = layer.frozen_weight().to(wide)
    kept_bias = layer._originals().get(site.bias_name, site.bias(base))
    changes = layer.changes(names, at_rest=True)
    try:
        exact = changed_weight(changes, frozen)
    except MergeError as e:
        raise MergeError(f"{path}: {e}") from None
    if any(c.shift is not None for c, _ in changes) and kept_bias is None:
        raise MergeError(
            f"{path}: the adapter trains a bias, and the layer has none to merge it into. Keep it unmerged, or give the layer a bias of zeros."
        )
    new_bias = changed_bias(changes, None if kept_bias is None else kept_bias.to(wide))
    rounded = exact.to(stored.dtype)
    if not bool(torch.isfinite(rounded).all()) or (new_bias is not None and not bool(torch.isfinite(new_bias).all())):
        raise MergeError(f"{path}: NaNs detected in the merged weights. The adapter {names} seems to be broken")
    new_b = None if kept_bias is None or new_bias is None else new_bias.to(kept_bias.dtype)
    return site.stored(rounded).contiguous(), new_b, _loss(frozen, exact, rounded)


def _loss(frozen: Tensor, exact: Tensor, rounded: Tensor) -> LayerReport:
    delta = exact - frozen
    got = rounded.to(exact.dtype) - frozen
    norm = float(delta.norm())
    moved = delta != 0
    count = int(moved.sum())
    lost = int(((got == 0) & moved).sum())
    return LayerReport(
        float((got - delta).norm()) / norm if norm else 0.0, lost / count if count else 0.0, norm / max(float(frozen.norm()), 1e-30)
    )


def _shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [m._parameters[n] for group in holders(model).values() for _, m, n in group[:1]]  # type: ignore[misc]


def _commit(layer: AdaptedLayer, names: list[str], w: Tensor, b: Tensor | None, shared: set[int]) -> None:
    site = layer.site
    owner, name = owner_of(layer, site.weight_name)
    _swap(layer, owner, site.weight_name, name, w, shared)
    if b is not None:
        _swap(layer, *_bias_owner(layer), b, shared)
    layer.merged_adapters = names


def owner_of(layer: AdaptedLayer, dotted: str) -> tuple[nn.Module, str]:
    """The module below the layer's base that holds the tensor of this name, and its last name."""
    path, _, name = dotted.rpartition(".")
    return layer.base_layer.get_submodule(path), name


def _bias_owner(layer: AdaptedLayer) -> tuple[nn.Module, str, str]:
    owner, name = owner_of(layer, layer.site.bias_name)
    return owner, layer.site.bias_name, name


def _swap(layer: AdaptedLayer, owner: nn.Module, key: str, name: str, new: Tensor, shared: set[int]) -> None:
    """Put new values into a parameter and keep the frozen ones. A parameter that others hold too is left to them."""
    p = owner._parameters[name]
    assert p is not None
    if key not in layer.originals:
        layer.originals[key] = (p, p.data)
    if id(p) in shared:
        owner._parameters[name] = nn.Parameter(new, requires_grad=p.requires_grad)
    else:
        p.data = new


@torch.no_grad()
def unmerge_layer(layer: AdaptedLayer) -> None:
    """Put the frozen tensors of one layer back, bit for bit."""
    for key, (p, values) in layer.originals.items():
        owner, name = owner_of(layer, key)
        now = owner._parameters[name]
        assert p is not None and now is not None and values is not None
        if now is p:
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
    from ..blocks.tokens import TrainableTokensWrapper

    names = _names(model, names)
    merge(model, names, safe_merge=safe_merge, progressbar=progressbar)

    def inner(wrapper: Any) -> nn.Module:
        if isinstance(wrapper, ModulesToSaveWrapper):
            mine = [n for n in names if n in wrapper.modules_to_save]
            out: nn.Module = wrapper.modules_to_save[mine[-1]] if mine else wrapper.original_module
            return out
        if isinstance(wrapper, TrainableTokensWrapper):
            return wrapper.token_adapter.base_layer
        out = wrapper.base_layer
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


def _progress(layers: list[tuple[str, AdaptedLayer]], show: bool) -> Iterable[tuple[str, AdaptedLayer]]:
    if not show:
        return layers
    from tqdm import tqdm

    wrapped: Iterable[tuple[str, AdaptedLayer]] = tqdm(layers, desc="Merging", unit="layer")
    return wrapped
