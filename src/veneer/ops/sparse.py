"""M zero but for some entries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.sparse import sparse_left, sparse_linear
from .base import Geometry, Op


@dataclass(eq=False)
class Sparse(Op):
    """M (n_out, n_in) = shape, zero but for `values` (k,) at the positions `index` (k,) of its flattened form, none of them twice."""

    index: Tensor
    values: Tensor
    shape: tuple[int, int]

    def dense(self) -> Tensor:
        n, m = self.shape
        return self.values.new_zeros(n * m).index_put((self.index.long(),), self.values).view(n, m)

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        if geo.plain:
            return sparse_linear(x, None, None, self.index, self.values, self.shape)
        return super().rows(x, geo)

    def left(self, w: Tensor) -> Tensor:
        return sparse_left(self.index, self.values, self.shape, w) if w.dim() == 2 else super().left(w)
