"""Merging: the adapters' change put into the frozen weights, rounded once; and the frozen weights put back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.config import tell_storage
from ..change import bias
from ..errors import MergeError
from ..sharding import is_dtensor, is_partitioned, reshard, spread_like
from .holders import opened
from .inject import check_root, unwrap
from .layer import AdaptedLayer, adapted_layers
from .loss import LayerReport, MergeReport, check_finite, loss
from .merge_packed import Into, merged_packed, originals
from .merge_rows import by_rows, merge_rows
from .offload import brought_in, keep, runs_on
from .original import Weights
from .replicate import separate
from .route import adapter_names, check_known, find_switch
from .ties import holders, untie_config
from .wrapper import Wrapper, adapter_modules


def merge(
    model: nn.Module,
    names: Sequence[str] | None = None,
    *,
    safe_merge: bool = True,
    progressbar: bool = False,
    into: Into | None = None,
    for_good: bool = False,
) -> MergeReport:
    """Merge these (or the active) adapters into the model's weights; `unmerge` undoes it exactly.

    All active changes are summed in float32 (float64 for float64 weights) and rounded once. Every layer is computed and checked before
    the first is changed.

    Args:
        for_good: whether nobody is going to unmerge them; then layers that accelerate offloads can be merged too.

    Raises:
        MergeError: if a layer cannot be merged or gets values that are not finite; the model is as it was.
        LoadError: if the original weights are asked for and are not found, or do not fit.
    """
    _check_names(model, names)
    into = into or Into()
    layers = list(adapted_layers(model))
    into.check(layers)
    with originals(model, layers, into) as original:
        return merge_layers(progress(layers, progressbar, "Merging"), names, model, into, original, for_good)


def merge_layers(
    layers: Iterable[tuple[str, AdaptedLayer]],
    names: str | Sequence[str] | None,
    model: nn.Module | None = None,
    into: Into | None = None,
    original: Weights | None = None,
    for_good: bool = False,
) -> MergeReport:
    """Merge into these layers: compute and check all, then change all. Warns where quantising outweighs what was learned.

    Args:
        names: of the adapters; None: those that act, on each layer its own.
        for_good: whether nobody is going to unmerge them.
    """
    report, into = MergeReport(), into or Into()
    if model is not None:
        reshard(model)
    ready: list[tuple[AdaptedLayer, list[str], dict[str, Tensor] | nn.Module]] = []
    for path, layer in layers:
        mine = [n for n in _named(layer, names) if n in layer.attached]
        if not mine or set(mine) <= set(layer.merged_adapters):
            continue
        mine = layer.merged_adapters + [n for n in mine if n not in layer.merged_adapters]
        for name in mine:
            if why := layer.attached[name].config.unmergeable:
                raise MergeError(f"{path}: the adapter {name!r} cannot be merged: {why}. Keep it unmerged.")
        elsewhere = runs_on(layer.get_base_layer()) is not None
        if elsewhere and (not for_good or layer.quantised or len(layer.site.tensors(layer.get_base_layer()).keys() - {"weight", "bias"})):
            way = (
                "Load the model without offload to merge it."
                if for_good
                else "Such layers can be merged for good only: merge_and_unload()."
            )
            raise MergeError(
                f"{path}: accelerate keeps this layer's weights elsewhere and brings them in for each call. {way} Nothing was changed."
            )
        merged: dict[str, Tensor] | nn.Module
        if layer.quantised:
            check_packed_whole(path, layer.get_base_layer())
            merged, report.layers[path] = merged_packed(path, layer, mine, into, model, original)
        else:
            with brought_in(layer.get_base_layer()):
                merged, report.layers[path] = merged_tensors(path, layer, mine)
            if elsewhere:
                merged = {name: t.to("cpu") for name, t in merged.items()}
        ready.append((layer, mine, merged))
    shared = {id(p) for p in _shared_parameters(model)} if model is not None else None
    for layer, mine, merged in ready:
        if isinstance(merged, nn.Module):
            layer.put_merged(merged, mine)
            continue
        if runs_on(layer.get_base_layer()) is not None:
            keep(layer.get_base_layer(), merged)
            continue
        for name, new in merged.items():
            _swap(layer, name, new, shared)
        layer.merged_adapters = mine
    report.warn("Merge with store='dense'" if into.store == "quantised" else "Merge with onto='dequantised'")
    if model is not None and ready:
        ready[0][0].switch.untied += untie_config(model)
    return report


def check_packed_whole(path: str, module: nn.Module) -> None:
    """Raise MergeError if a packed weight is in pieces over processes."""
    if any(p is not None and is_dtensor(p) for p in module._parameters.values()):
        raise MergeError(
            f"{path}: a packed weight that FSDP2 keeps in pieces cannot be merged. Save the adapter (save_pretrained), and merge it in one process, "
            "into the same model loaded whole."
        )


@torch.no_grad()
def merged_tensors(path: str, layer: AdaptedLayer, names: list[str]) -> tuple[dict[str, Tensor], LayerReport]:
    """The tensors of a plain layer that change, by name, in its own layout and dtypes, checked.

    Raises:
        MergeError: if they cannot be formed, or are not finite.
    """
    with opened(layer.attached[n] for n in names):
        return _formed(path, layer, names)


def _formed(path: str, layer: AdaptedLayer, names: list[str]) -> tuple[dict[str, Tensor], LayerReport]:
    frozen, changes = layer.frozen_tensors(), layer.changes(names, at_rest=True)
    if by_rows(layer, changes):
        site = layer.weight_site
        b = frozen.get(site.bias_name)
        shifts = any(c.shift is not None or (b is not None and c.left is not None and c.left_on_bias) for c, _ in changes)
        _check_held(path, layer, frozen, [site.weight_name] + [site.bias_name] * shifts)
        new, lost = merge_rows(layer, changes, frozen[site.weight_name])
        rounded = {site.weight_name: new}
        if shifts and b is not None:
            shifted = bias(changes, b.to(torch.promote_types(b.dtype, torch.float32)))
            rounded[site.bias_name] = shifted.to(b.dtype)  # type: ignore[union-attr]
        check_finite(path, names, *(t for t in rounded.values() if t is not new or not lost.finite))
        return rounded, lost
    wide = {k: t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t for k, t in frozen.items()}
    try:
        exact = layer.site.substituted(layer.base_layer, changes, wide)
    except MergeError as e:
        raise MergeError(f"{path}: {e}") from None
    _check_held(path, layer, frozen, exact)
    rounded = {k: t.to(frozen[k].dtype).contiguous() for k, t in exact.items() if t is not wide[k]}
    lost = loss([(exact[k], t, frozen[k]) for k, t in rounded.items() if t.is_floating_point()])
    check_finite(path, names, *(t for t in rounded.values() if not (t.is_floating_point() and lost.finite)))
    return rounded, lost


def _check_held(path: str, layer: AdaptedLayer, frozen: Mapping[str, Tensor], new: Iterable[str]) -> None:
    if set(new) - set(frozen):
        raise MergeError(
            f"{path}: the adapter trains a bias, and the layer has none to merge it into. Keep it unmerged, or give the layer a bias of zeros."
        )
    for key in new:
        owner, name = owner_of(layer, key)
        if name not in owner._parameters and name not in owner._buffers:
            raise MergeError(
                f"{path}: its {name} is computed at each call from other tensors (weight_norm, another parametrization, pruning), so nothing holds what is "
                "merged. Keep it unmerged, or make it a parameter first, with torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or "
                "prune.remove."
            )


def _shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [m._parameters[n] for group in holders(model).values() for _, m, n in group[:1]]  # type: ignore[misc]


def owner_of(layer: AdaptedLayer, dotted: str) -> tuple[nn.Module, str]:
    """The module below the layer's base that holds the tensor of this name, and its last name."""
    path, _, name = dotted.rpartition(".")
    return layer.base_layer.get_submodule(path), name


def _laid_out_as(old: Tensor, new: Tensor) -> Tensor:
    """With its channels last where the old one has them last, which decides by which kernels a convolution runs."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(old.dim())
    if form is None or old.is_contiguous() or not old.is_contiguous(memory_format=form):
        return new
    return new.contiguous(memory_format=form)


def _swap(layer: AdaptedLayer, key: str, new: Tensor, shared: set[int] | None) -> None:
    """Put new values into a tensor and keep the frozen ones. A parameter that others hold too (`shared`; None: it is not known) is left to them."""
    owner, name = owner_of(layer, key)
    p = owner._parameters.get(name)
    if p is None:
        layer.originals.setdefault(key, (None, owner._buffers[name]))  # type: ignore[arg-type]
        owner._buffers[name] = new
        return
    if is_partitioned(p):
        raise MergeError(
            f"{layer.name}: DeepSpeed keeps this weight in pieces, and a merge in place would be lost with its next use. Write the merged model with "
            "veneer.distributed.save_merged(model, folder), or merge in another process, from the saved adapter."
        )
    if is_dtensor(p):  # written in place: engines hold the local tensor, and assigning `data` would leave it as it is
        layer.originals.setdefault(key, (p, p.detach().clone()))
        p.detach().copy_(spread_like(new, p))
        return
    layer.originals.setdefault(key, (p, p.data))
    new = _laid_out_as(p, new)
    if shared is None or id(p) in shared:
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
        elif is_dtensor(p):
            p.detach().copy_(values)
        elif owner._parameters[name] is p:
            p.data = values
        else:
            owner._parameters[name] = p  # the shared parameter itself: tied again
            if (p.device, p.dtype) != (values.device, values.dtype):  # the model was moved while no module had it
                p.data = values
    layer.originals = {}
    layer.put_back()
    layer.merged_adapters = []


def unmerge(model: nn.Module) -> None:
    """Put all frozen tensors back, bit for bit; weights that were tied are tied again."""
    layers = [layer for _, layer in adapted_layers(model) if layer.merged]
    reshard(model)
    for layer in layers:
        unmerge_layer(layer)
    for layer in layers[:1]:
        for config in layer.switch.untied:
            config.tie_word_embeddings = True
        layer.switch.untied = []


def merge_and_unload(
    model: nn.Module,
    names: Sequence[str] | None = None,
    *,
    safe_merge: bool = True,
    progressbar: bool = False,
    into: Into | None = None,
) -> nn.Module:
    """Merge these (or the active) adapters for good and take all wrappers off; modules trained whole take the originals' places."""
    from ..blocks.saved import ModulesToSaveWrapper

    check_root(model)
    for path, wrapper in adapter_modules(model):
        copies = [n for n in _named(wrapper, names) if n in wrapper.adapters()]
        if isinstance(wrapper, ModulesToSaveWrapper) and len(copies) > 1:
            raise MergeError(
                f"{path}: the adapters {copies} each have their own trained copy of it (modules_to_save), and one of them alone can take its place. "
                "Merge one of these adapters, or combine them first."
            )
    merge(model, names, safe_merge=safe_merge, progressbar=progressbar, into=into, for_good=True)

    def inner(wrapper: Any) -> nn.Module:
        if isinstance(wrapper, ModulesToSaveWrapper):
            mine = [n for n in _named(wrapper, names) if n in wrapper.modules_to_save]
            if mine:
                copied: nn.Module = wrapper.modules_to_save[mine[0]]
                return copied
        out: nn.Module = wrapper.inside()
        return out

    packed = False
    for _, layer in adapted_layers(model):
        layer.originals, packed = {}, packed or layer.packed is not None
        layer.forget_packed()
    switch = find_switch(model)
    top = unwrap(model, inner)
    untie_config(top)
    if switch is not None and switch.replaced is not None:
        separate(top)
    if packed:
        tell_storage(top)
    return top


def _check_names(model: nn.Module, names: str | Sequence[str] | None) -> None:
    if names is not None:
        check_known([names] if isinstance(names, str) else names, adapter_names(model))


def _named(wrapper: Wrapper, names: str | Sequence[str] | None) -> Sequence[str]:
    """These adapters; None: those that act there."""
    if names is None:
        return wrapper.now().names or ()
    return [names] if isinstance(names, str) else names


def progress(layers: list[tuple[str, AdaptedLayer]], show: bool, what: str) -> Iterable[tuple[str, AdaptedLayer]]:
    """The layers, behind a bar if it is asked for."""
    if not show:
        return layers
    from tqdm import tqdm

    wrapped: Iterable[tuple[str, AdaptedLayer]] = tqdm(layers, desc=what, unit="layer")
    return wrapped
