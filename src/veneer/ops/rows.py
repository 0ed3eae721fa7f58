"""Some rows of a table replaced by trained ones: new tokens of an embedding and of the head tied to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Geometry, Op


@dataclass(eq=False)
class ReplaceRows(Op):
    """The difference that puts `values` in the place of the table's rows `index`.

    The table T (vocabulary, width) is W of a linear head, or Wᵀ of an embedding (`lookup`: then x holds row numbers).

    Args:
        index: (k,) sorted row numbers.
        values: (k, width) the new rows.
        old: (k, width) the table's own rows there.
        size: number of rows of the table.
    """

    index: Tensor
    values: Tensor
    old: Tensor
    size: int
    lookup: bool

    def dense(self) -> Tensor:
        diff = self.values - self.old.to(self.values.dtype)
        table = diff.new_zeros(self.size, diff.shape[1]).index_copy(0, self.index, diff)
        return table.T if self.lookup else table

    def thin(self) -> tuple[Tensor, Tensor, float]:
        diff = self.values - self.old.to(self.values.dtype)
        chosen = diff.new_zeros(self.size, len(self.index))  # a column for each row that is replaced
        chosen[self.index, torch.arange(len(self.index), device=diff.device)] = 1.0
        return (diff.T, chosen.T, 1.0) if self.lookup else (chosen, diff, 1.0)

    def add_to(self, y: Tensor, x: Tensor, geo: Geometry) -> Tensor:
        diff = self.values - self.old.to(self.values.dtype)
        if not self.lookup:
            return y.index_add(-1, self.index, torch.nn.functional.linear(x, diff.to(x.dtype)).to(y.dtype))
        x = x.to(self.index.dtype)
        at = torch.searchsorted(self.index, x).clamp(max=len(self.index) - 1)
        hit = self.index[at] == x
        scale = getattr(geo, "lookup_scale", 1.0)  # embeddings that multiply what they look up
        # the trained row itself, not old + difference: exact in 16 bits too
        return torch.where(hit.unsqueeze(-1), (self.values[at] * scale).to(y.dtype), y)

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        m = self.dense()
        return geo.contract(x, m.to(x.dtype) if x.is_floating_point() else m)
