"""M = w1 ⊗ (up · down): a large matrix out of two or three small ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.products import linear
from .base import Geometry, Op


@dataclass(eq=False)
class Kron(Op):
    """M = w1 ⊗ w2, w1 (l, m), w2 (k, n): (l · k, m · n).

    The inputs are an m x n table X, and y = w1 X w2ᵀ, an l x k table; the Kronecker product is never formed where the features are flat.

    Args:
        w2: (k, n); or `down` (r, n) and w2 (k, r), of which w2 · down takes its place.
    """

    w1: Tensor
    w2: Tensor
    down: Tensor | None = None

    def dense(self) -> Tensor:
        whole: Tensor = torch.kron(self.w1, (self.w2 if self.down is None else self.w2 @ self.down).contiguous())
        return whole

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        if not geo.plain:
            return super().rows(x, geo)
        (l, m), (k, n) = self.w1.shape, self.w2.shape  # noqa: E741
        w1, w2, down = self.w1.to(x.dtype), self.w2.to(x.dtype), self.down
        table: Tensor = x.reshape(-1, m, x.shape[-1] // m)
        if down is not None:
            table = _along(_across(_along(table, down.to(x.dtype)), w1), w2)
        elif m * k * (n + l) <= l * n * (m + k):  # which of the two products first costs fewer operations
            table = _across(_along(table, w2), w1)
        else:
            table = _along(_across(table, w1), w2)
        return table.reshape(*x.shape[:-1], l * k)


def _along(table: Tensor, w2: Tensor) -> Tensor:
    """X w2ᵀ for tables X (tokens, m, n): one product of matrices, whether w2 trains or not."""
    return linear(table.reshape(-1, table.shape[-1]), w2).view(*table.shape[:-1], w2.shape[0])


def _across(table: Tensor, w1: Tensor) -> Tensor:
    """w1 X for tables X (tokens, m, n)."""
    return _along(table.mT, w1).mT
