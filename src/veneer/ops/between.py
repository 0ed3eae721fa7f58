"""A low-rank change with something of its own between its two factors: gates per row or token, a draw, a mixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import MergeError
from .base import Geometry, Op


@dataclass(eq=False)
class Between(Op):
    """y += scale · U g(V x),  up = U (n_out, k), down = V (r, n_in), g from (..., r) to (..., k), features last.

    It is no matrix where g depends on the input, so it cannot be formed: `dense` raises.

    Args:
        g: gets V x and x itself, in the geometry's own layout.
        why: the reason `dense` gives.
        whole: the matrix that it is on average, which a merge takes, where there is one.
    """

    fixed: ClassVar[bool] = False

    up: Tensor
    down: Tensor
    g: Callable[[Tensor, Tensor], Tensor]
    scale: float = 1.0
    dropout: float = 0.0
    why: str = "its change depends on the input"
    whole: Op | None = None

    def dense(self) -> Tensor:
        if self.whole is not None:
            return self.whole.dense()
        raise MergeError(f"No weight holds this change: {self.why}. Keep it unmerged.")

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        dropped = geo.drop(x, self.dropout) if self.dropout > 0 else x
        down, up = self.down, self.up
        if x.is_floating_point():
            down, up = down.to(x.dtype), up.to(x.dtype)
        h = geo.last(geo.contract(dropped, down))
        return geo.mix(geo.unlast(self.g(h, x).to(h.dtype)), up * self.scale)


def per_row(fact: Tensor, rows: int) -> Tensor:
    """A fact of each row of the batch, for a batch in which each row stands several times, one after another (beams).

    Args:
        fact: (batch, ...).
        rows: how many there are now.
    """
    if len(fact) == rows:
        return fact
    if rows % len(fact):
        raise ValueError(f"There are facts about {len(fact)} rows, and {rows} rows in the batch.")
    return torch.repeat_interleave(fact, rows // len(fact), 0)
