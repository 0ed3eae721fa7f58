"""M = diag(d): scaling of inputs or outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.products import gained
from .base import Geometry, Op


@dataclass(eq=False)
class Diag(Op):
    """M = diag(d), d (n,), or (n, 1), or (1, n): as a method's leaf has it.

    With `groups`, M is over the inputs of all groups of a grouped layer, and `right` takes the layer's weight, whose rows have those of their group.
    """

    d: Tensor
    groups: int = 1

    @property
    def vector(self) -> Tensor:
        return self.d.flatten()

    def dense(self) -> Tensor:
        return torch.diag(self.vector)

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        return geo.unlast(gained(geo.last(x), self.vector))

    def left(self, w: Tensor) -> Tensor:
        return self.vector.to(w.dtype).unsqueeze(-1) * w

    def right(self, w: Tensor) -> Tensor:
        if self.groups > 1:
            parts: Tensor = w.unflatten(0, (self.groups, -1))
            return (parts * self.d.to(w.dtype).view(self.groups, 1, -1)).flatten(0, 1)
        return w * self.vector.to(w.dtype)
