"""M = one small block, repeated over all inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..kernels.products import linear
from .base import Geometry, Op


@dataclass(eq=False)
class Tiled(Op):
    """M = the block's transpose side by side: M[i, j] = block[j mod r, i mod m], (n_out, n_in), block (r, m), m a divisor of n_out.

    So y is one thin product with the sum of the inputs' pieces of length r, the last of which may be shorter.
    """

    block: Tensor
    n_out: int
    n_in: int

    def dense(self) -> Tensor:
        r, m = self.block.shape
        whole: Tensor = self.block.mT.repeat(self.n_out // m, -(-self.n_in // r))
        return whole[:, : self.n_in]

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        if not geo.plain:
            return super().rows(x, geo)
        y = self._thin(x)
        return y.repeat(*(1,) * (y.ndim - 1), self.n_out // self.block.shape[1])

    def add_to(self, y: Tensor, x: Tensor, geo: Geometry) -> Tensor:
        if not geo.plain:
            return super().add_to(y, x, geo)
        tiles: Tensor = y.unflatten(-1, (-1, self.block.shape[1])) + self._thin(x).unsqueeze(-2).to(y.dtype)
        return tiles.flatten(-2)

    def _thin(self, x: Tensor) -> Tensor:
        r = self.block.shape[0]
        whole = self.n_in - self.n_in % r
        h = x[..., :whole].unflatten(-1, (-1, r)).sum(-2)
        if whole < self.n_in:
            h = h + F.pad(x[..., whole:], (0, r - self.n_in % r))
        return linear(h, self.block.mT.to(x.dtype))
