"""Merging low-rank changes of plain linear layers some rows at a time: one pass over the weight, and nothing of its size beside the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..change import Change
from ..ops import LowRank
from .layer import AdaptedLayer
from .loss import LayerReport

_NUMBERS = 1 << 17  # of a weight, at a time: what a cache holds


def by_rows(layer: AdaptedLayer, changes: Sequence[tuple[Any, Any]]) -> bool:
    """Whether the changes of the layer can be merged like this."""
    return layer.site.kind == "linear" and not layer.quantised and all(type(c) is Change and _thin(c) for c, _ in changes) and bool(changes)


def _thin(change: Change) -> bool:
    low = change.add
    return change.additive and (low is None or (type(low) is LowRank and low.up.ndim == 2))


def merge_rows(layer: AdaptedLayer, changes: Sequence[tuple[Change, Any]], stored: Tensor) -> tuple[Tensor, LayerReport]:
    """W' in the layout and dtype of the stored weight, summed in float32 (float64 for float64) and rounded once, and what rounding lost.

    Args:
        stored: W as the module holds it.
    """
    site = layer.weight_site
    wide = torch.promote_types(stored.dtype, torch.float32)
    w, out = site.canonical(stored), torch.empty_like(stored, memory_format=torch.contiguous_format)
    new = site.canonical(out)
    lows = [c.add for c, _ in changes if isinstance(c.add, LowRank)]
    up = [low.up.to(wide) * low.scale for low in lows]
    down = [low.down.to(wide) for low in lows]
    error, size, weight, count, lost = 0.0, 0.0, 0.0, 0, 0
    numbers = _NUMBERS if w.device.type == "cpu" else 64 * _NUMBERS
    step = min(max(numbers // max(w.shape[1], 1), 1), max(w.shape[0], 1))
    scratch = torch.empty(3, step, w.shape[1], dtype=wide, device=w.device)
    for i in range(0, w.shape[0], step):
        rows, delta, exact = scratch[:, : min(step, w.shape[0] - i)]
        rows.copy_(w[i : i + step])
        exact.copy_(rows)
        for u, d in zip(up, down, strict=True):
            exact.addmm_(u[i : i + step], d)
        new[i : i + step] = exact
        weight += float(torch.linalg.vector_norm(rows)) ** 2
        change, got = exact.sub_(rows), delta.copy_(new[i : i + step]).sub_(rows)
        moved = int(torch.count_nonzero(change))
        if not moved:
            continue
        count, size = count + moved, size + float(torch.linalg.vector_norm(change)) ** 2
        lost += int(torch.count_nonzero(change.masked_fill(got != 0, 0)))
        error += float(torch.linalg.vector_norm(got.sub_(change))) ** 2
    report = LayerReport(
        math.sqrt(error / size) if size else 0.0, lost / count if count else 0.0, math.sqrt(size) / max(math.sqrt(weight), 1e-30)
    )
    return out, report
