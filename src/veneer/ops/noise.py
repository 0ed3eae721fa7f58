"""What is done to a matrix in training alone: inputs dropped, or the whole of it left out of a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Geometry, Op
from .diag import Diag
from .rotations import Product


@dataclass(eq=False)
class Dropped(Op):
    """M, applied to inputs of which each is dropped with probability `rate`. `dense` never sees it."""

    inner: Op
    rate: float

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        return self.inner.fixed

    @property
    def lean(self) -> bool:
        return self.inner.lean

    def dense(self) -> Tensor:
        return self.inner.dense()

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        return self.inner.rows(geo.drop(x, self.rate) if self.rate > 0 else x, geo)


@dataclass(eq=False)
class Switched(Op):
    """gate · M, gate a tensor of one number that is 1 or 0: a module that is there or not, without a branch in the code."""

    inner: Op
    gate: Tensor

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        return self.inner.fixed

    @property
    def lean(self) -> bool:
        return self.inner.lean

    def dense(self) -> Tensor:
        m = self.inner.dense()
        return m * self.gate.to(m.dtype)

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        y = self.inner.rows(x, geo)
        return y * self.gate.to(y.dtype)


def rank_dropped(add: Op, rate: float, rows: int, like: Tensor, *, rescale: bool) -> Op:
    """ΔW with whole rows dropped with probability `rate`; `rescale`: what is left is scaled up, so that the mean stays."""
    if rate == 0:
        return add
    kept = (torch.rand(rows, device=like.device) >= rate).to(like.dtype)
    return Product([Diag(kept / kept.mean().clamp_min(1 / rows) if rescale else kept), add])
