"""M = s · U V: the form of LoRA and its many relatives; and I - U V."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.autograd import transformed
from ..kernels.products import linear
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
class Vectored(Op):
    """M = scale · diag(outer) U diag(inner) V: trained vectors about frozen factors, U the first rows of `up` and V the first columns of `down`,
    which layers of all sizes share.

    Args:
        outer: (n_out,).  up: (n_out or more, r).  inner: (r,).  down: (r, n_in or more).
        dropout: as of `LowRank`.
    """

    outer: Tensor
    up: Tensor
    inner: Tensor
    down: Tensor
    n_in: int
    scale: float | Tensor = 1.0
    dropout: float = 0.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """(U, V), in the dtype of the vectors."""
        n, dtype, up, down = self.outer.shape[0], self.outer.dtype, self.up, self.down
        up = up if up.shape[0] == n else up[:n]
        down = down if down.shape[1] == self.n_in else down[:, : self.n_in]
        return up if up.dtype == dtype else up.to(dtype), down if down.dtype == dtype else down.to(dtype)

    def low(self) -> LowRank:
        """M as two factors. Both vectors go into the first: the second stays what it is, and its gradient, a product with all tokens, is not asked for."""
        up, down = self.factors()
        return LowRank(self.outer.unsqueeze(1) * (up * self.inner), down, self.scale, self.dropout)

    def few(self, x: Tensor) -> bool:
        """Whether the vectors are better taken times what the factors make of x: for a few tokens without gradients."""
        if torch.is_grad_enabled() or self.dropout or transformed() or x.numel() >= x.shape[-1] * self.inner.shape[0]:
            return False
        return x.device.type == "cpu" and not isinstance(self.scale, Tensor) and not torch.compiler.is_compiling()

    def dense(self) -> Tensor:
        return self.low().dense()

    def thin(self) -> tuple[Tensor, Tensor, float]:
        return self.low().thin()

    @property
    def lean(self) -> bool:
        return self.inner.shape[0] < min(self.outer.shape[0], self.n_in)

    def left(self, w: Tensor) -> Tensor:
        return self.low().left(w)

    def right(self, w: Tensor) -> Tensor:
        return self.low().right(w)

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        if not (geo.plain and self.few(x)):
            return self.low().rows(x, geo)
        up, down = self.factors()  # in the vectors' dtype small products are faster, and no factor is cast
        h = linear(x.to(down.dtype), down).mul_(self.inner)
        return linear(h if self.scale == 1 else h.mul_(self.scale), up).mul_(self.outer)

    def add_to(self, y: Tensor, x: Tensor, geo: Geometry) -> Tensor:
        d = self.rows(x, geo)
        return y + (d if d.dtype == y.dtype else d.to(y.dtype))


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
