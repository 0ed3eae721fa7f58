"""M given whole or made anew, and sums of matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Geometry, Op
from .lowrank import LowRank


@dataclass(eq=False)
class Dense(Op):
    """M itself, (n_out, n_in)."""

    m: Tensor

    def dense(self) -> Tensor:
        return self.m


@dataclass(eq=False)
class Derived(Op):
    """M = make(*parts), (n_out, n_in), a dense matrix of a few small tensors. A linear layer keeps those for the backward, and makes M anew.

    `make` gives a new tensor, the same at each call, and every tensor of it that trains is among the parts. So does `factors`, if given: (n_out, r) and
    (r, n_in), so thin that multiplying by both costs less than by M, which is their product.
    """

    make: Callable[..., Tensor]
    parts: tuple[Tensor, ...]
    factors: Callable[..., tuple[Tensor, Tensor]] | None = None

    def dense(self) -> Tensor:
        return self.make(*self.parts)

    def low(self) -> LowRank | None:
        """M as its two factors, if it has any."""
        return None if self.factors is None else LowRank(*self.factors(*self.parts))

    def thin(self) -> tuple[Tensor, Tensor, float] | None:
        low = self.low()
        return None if low is None else low.thin()

    @property
    def lean(self) -> bool:
        return self.factors is not None

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        low = self.low()
        return super().rows(x, geo) if low is None else low.rows(x, geo)


@dataclass(eq=False)
class Sum(Op):
    """M = Σ Mᵢ."""

    terms: Sequence[Op]

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        return all(t.fixed for t in self.terms)

    @property
    def lean(self) -> bool:
        return all(t.lean for t in self.terms)

    def dense(self) -> Tensor:
        return functools.reduce(torch.add, [t.dense() for t in self.terms])

    def thin(self) -> tuple[Tensor, Tensor, float] | None:
        parts = [t.thin() for t in self.terms]
        known = [p for p in parts if p is not None]
        if len(known) < len(parts):
            return None
        return torch.cat([u for u, _, _ in known], -1), torch.cat([v * s for _, v, s in known], -2), 1.0

    def add_to(self, y: Tensor, x: Tensor, geo: Geometry) -> Tensor:
        for t in self.terms:
            y = t.add_to(y, x, geo)
        return y

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        first, *rest = self.terms
        y = first.rows(x, geo)
        for t in rest:
            y = t.add_to(y, x, geo)
        return y

    def left(self, w: Tensor) -> Tensor:
        return functools.reduce(torch.add, [t.left(w) for t in self.terms])
