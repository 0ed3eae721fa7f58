"""Merging low-rank changes of plain linear layers some rows at a time: one pass over the weight, and nothing of its size beside the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..change import Change, low_rank
from .layer import AdaptedLayer
from .loss import LayerReport, Tally, at_a_time


def by_rows(layer: AdaptedLayer, changes: Sequence[tuple[Any, Any]]) -> bool:
    """Whether the changes of the layer can be merged like this."""
    return layer.site.kind == "linear" and not layer.quantised and all(type(c) is Change and _thin(c) for c, _ in changes) and bool(changes)


def _thin(change: Change) -> bool:
    return change.additive and (change.add is None or low_rank(change) is not None)


def merge_rows(layer: AdaptedLayer, changes: Sequence[tuple[Change, Any]], stored: Tensor) -> tuple[Tensor, LayerReport]:
    """W' in the layout and dtype of the stored weight, summed in float32 (float64 for float64) and rounded once, and what rounding lost.

    Args:
        stored: W as the module holds it.
    """
    site = layer.weight_site
    wide = torch.promote_types(stored.dtype, torch.float32)
    w, out = site.canonical(stored), torch.empty_like(stored, memory_format=torch.contiguous_format)
    new = site.canonical(out)
    lows = [low for c, _ in changes if (low := low_rank(c)) is not None]
    up = [low.up.to(wide) * low.scale for low in lows]
    down = [low.down.to(wide) for low in lows]
    tally, rounds = Tally(), wide != stored.dtype
    step = min(max(at_a_time(w.device) // max(w.shape[1], 1), 1), max(w.shape[0], 1))
    scratch = torch.empty(step if rounds else 0, w.shape[1], dtype=wide, device=w.device)
    for i in range(0, w.shape[0], step):
        rows, part = w[i : i + step], new[i : i + step]
        exact = scratch[: len(rows)] if rounds else part
        exact.copy_(rows)
        for u, d in zip(up, down, strict=True):
            exact.addmm_(u[i : i + step], d)
        if rounds:
            part.copy_(exact)
        tally.add(exact, part, rows)
    return out, tally.report()
