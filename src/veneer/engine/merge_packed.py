"""Merging into quantised layers: onto the weights as they are or as they were, left dense or packed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from ..bases.base import twin
from ..change import bias as changed_bias
from ..change import weight as changed_weight
from ..errors import MergeError, hint
from .layer import AdaptedLayer
from .loss import LayerReport, check_finite, loss
from .original import Original, Weights, original_weights


@dataclass(frozen=True)
class Into:
    """Where the changes of quantised layers go.

    Args:
        onto: "dequantised", the weights as the adapters were trained on them, or "original", those from before they were quantised.
        store: "dense", as torch's own layers in the dtype of the layer's input, or "quantised", packed again by the same storage.
        original: where the original weights are; see `veneer.engine.original`.
    """

    onto: Literal["dequantised", "original"] = "dequantised"
    store: Literal["dense", "quantised"] | None = None
    original: Original | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("onto", self.onto, ("dequantised", "original")), ("store", self.store, ("dense", "quantised", None))):
            if value not in known:
                raise MergeError(
                    f"`{name}` is one of {', '.join(map(repr, known[:2]))}, got {value!r}.{hint(str(value), map(str, known[:2]))}"
                )
        if self.original is not None and self.onto != "original":
            raise MergeError("`original` says where the unquantised weights are, which are used with onto='original' alone.")

    def check(self, layers: Sequence[tuple[str, AdaptedLayer]]) -> None:
        """Raise MergeError if it was asked for what no layer needs."""
        if (self.onto != "dequantised" or self.store is not None) and not any(layer.quantised for _, layer in layers):
            raise MergeError("`onto` and `store` are about quantised layers, and none of the adapted ones is quantised. Leave them out.")


@contextmanager
def originals(model: nn.Module, layers: Sequence[tuple[str, AdaptedLayer]], into: Into) -> Iterator[Weights | None]:
    """The weights from before the quantisation, if the merge is to go onto them."""
    if into.onto != "original":
        yield None
        return
    with original_weights(model, into.original) as weights:
        packed = [(path, layer) for path, layer in layers if layer.quantised]
        weights.check(
            {path: layer.frozen for path, layer in packed},
            {path: layer.weight_site.codec.weight(layer.frozen).shape for path, layer in packed},
        )
        yield weights


@torch.no_grad()
def merged_packed(
    path: str, layer: AdaptedLayer, names: list[str], into: Into, model: nn.Module | None, original: Weights | None
) -> tuple[nn.Module, LayerReport]:
    """The module that takes the place of a quantised one."""
    site, old = layer.weight_site, layer.frozen
    frozen, b = layer.frozen_weight().float(), site.bias(old)
    changes = layer.changes(names, at_rest=True)
    exact = wanted = changed_weight(changes, frozen)  # what the layer computes with now
    target = frozen
    if original is not None:
        target = layer.assumed = site.canonical(original.weight(path, old).to(frozen))
        try:
            changes = layer.changes(names, at_rest=True)
            wanted = changed_weight(changes, target)
        finally:
            layer.assumed = None
    new_b = changed_bias(changes, None if b is None else b.float())
    check_finite(path, names, wanted, new_b)
    if into.store == "quantised":
        if new_b is not None and b is None:
            raise MergeError(
                f"{path}: the adapter trains a bias (lora_bias), and the layer has none to merge it into. Merge with store='dense', which gives it one."
            )
        try:
            new = site.codec.written(old, site.stored(wanted))
        except MergeError as e:
            raise MergeError(f"{path}: {e}") from None
        if new_b is not None and b is not None and any(c.shift is not None or c.left_on_bias for c, _ in changes):
            kept = new_b.to(b)
            new = twin(new, **{site.bias_name: nn.Parameter(kept, requires_grad=False) if isinstance(b, nn.Parameter) else kept})
        got = site.weight(new).float()
    else:
        dtype = layer.input_dtype or _dtype(model) or site.codec.dtype(old)
        w = site.stored(wanted).to(dtype).contiguous()
        check_finite(path, names, w, None)
        new = site.dense(old, nn.Parameter(w, False), None if new_b is None else nn.Parameter(new_b.to(dtype), False))
        got = site.canonical(w).float()
    report = loss([(wanted, got, target)])
    size = float((exact - frozen).norm())
    return new, replace(report, quantisation=float((got - exact).norm()) / size if size else 0.0)


def _dtype(model: nn.Module | None) -> torch.dtype | None:
    """The dtype of what a model's layers pass on: that of its embeddings, if they are plain."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        dtype = getattr(getattr(get(), "weight", None), "dtype", None) if get is not None else None
    except NotImplementedError:
        return None
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1 else None
