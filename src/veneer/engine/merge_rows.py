"""Merging low-rank changes and scalings of plain linear layers some rows at a time: one pass over the weight, and nothing of its size beside the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..change import Change, factors, two_factors
from ..ops import Diag
from .layer import AdaptedLayer
from .loss import LayerReport, Tally, at_a_time


def by_rows(layer: AdaptedLayer, changes: Sequence[tuple[Any, Any]]) -> bool:
    """Whether the changes of the layer can be merged like this: low-rank additions, or one change that scales rows and columns as well."""
    if layer.site.kind != "linear" or layer.quantised or not changes or any(type(c) is not Change for c, _ in changes):
        return False
    if any(c.add is not None and not two_factors(c.add) for c, _ in changes):
        return False
    return all(c.additive for c, _ in changes) or (len(changes) == 1 and _scales(changes[0][0]))


def _scales(change: Change) -> bool:
    return change.base is None and all(op is None or (isinstance(op, Diag) and op.groups == 1) for op in (change.left, change.right))


def merge_rows(layer: AdaptedLayer, changes: Sequence[tuple[Change, Any]], stored: Tensor) -> tuple[Tensor, LayerReport]:
    """W' in the layout and dtype of the stored weight, summed in float32 (float64 for float64) and rounded once, and what rounding lost.

    Args:
        stored: W as the module holds it.
    """
    site = layer.weight_site
    wide = torch.promote_types(stored.dtype, torch.float32)
    w, out = site.canonical(stored), torch.empty_like(stored, memory_format=torch.contiguous_format)
    new = site.canonical(out)
    first = changes[0][0]
    columns = first.right.vector.to(wide) if isinstance(first.right, Diag) else None
    before = first.left.vector.to(wide).unsqueeze(1) if isinstance(first.left, Diag) else None
    after = None if first.gain is None else first.gain.to(wide).unsqueeze(1)
    lows = [low for c, _ in changes if (low := factors(c.add)) is not None]
    up = [low.up.to(wide) * low.scale for low in lows]
    down = [low.down.to(wide) for low in lows]
    tally, rounds = Tally(), wide != stored.dtype
    step = min(max(at_a_time(w.device) // max(w.shape[1], 1), 1), max(w.shape[0], 1))
    scratch = torch.empty(step if rounds else 0, w.shape[1], dtype=wide, device=w.device)
    for i in range(0, w.shape[0], step):
        rows, part = w[i : i + step], new[i : i + step]
        exact = scratch[: len(rows)] if rounds else part
        exact.copy_(rows)
        if columns is not None:
            exact.mul_(columns)
        if before is not None:
            exact.mul_(before[i : i + step])
        for u, d in zip(up, down, strict=True):
            exact.addmm_(u[i : i + step], d)
        if after is not None:
            exact.mul_(after[i : i + step])
        if rounds:
            part.copy_(exact)
        tally.add(exact, part, rows)
    return out, tally.report()
