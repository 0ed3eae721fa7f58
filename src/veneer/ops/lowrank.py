"""M = s · U V: the form of LoRA and its many relatives; and I - U V."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Geometry, Op


@dataclass(eq=False)
class LowRank(Op):
    """M = scale · up @ down, up (..., n_out, r), down (..., r, n_in); leading dimensions are experts.

    `dropout` acts on the input, in training only (the caller gives 0 otherwise); `dense` never sees it.
    """

    up: Tensor
    down: Tensor
    scale: float | Tensor = 1.0
    dropout: float = 0.0

    def dense(self) -> Tensor:
        return (self.up @ self.down) * self.scale

    def thin(self) -> tuple[Tensor, Tensor, float]:
        return self.up, self.down, float(self.scale)

    @property
    def lean(self) -> bool:
        return self.down.shape[-2] < min(self.up.shape[-2], self.down.shape[-1])  # or its factors are of a weight's size

    def left(self, w: Tensor) -> Tensor:
        return self.up.to(w.dtype) @ (self.down.to(w.dtype) @ w) * self.scale

    def right(self, w: Tensor) -> Tensor:
        return (w @ self.up.to(w.dtype)) @ self.down.to(w.dtype) * self.scale

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        if self.dropout > 0:
            x = geo.drop(x, self.dropout)
        down, up = self.down, self.up
        if x.is_floating_point():
            down, up = down.to(x.dtype), up.to(x.dtype)
        return geo.mix(geo.contract(x, down), up * self.scale)


@dataclass(eq=False)
class Deflated(Op):
    """M = I - up @ down, square: up (n, r), down (r, n)."""

    up: Tensor
    down: Tensor

    def dense(self) -> Tensor:
        return torch.eye(self.up.shape[0], dtype=self.up.dtype, device=self.up.device) - self.up @ self.down

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        return x - geo.mix(geo.mix(x, self.down.to(x.dtype)), self.up.to(x.dtype)).to(x.dtype)

    def left(self, w: Tensor) -> Tensor:
        return w - self.up.to(w.dtype) @ (self.down.to(w.dtype) @ w)

    def right(self, w: Tensor) -> Tensor:
        return w - (w @ self.up.to(w.dtype)) @ self.down.to(w.dtype)
