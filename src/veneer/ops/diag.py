"""M = diag(d): scaling of inputs or outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Geometry, Op


@dataclass(eq=False)
class Diag(Op):
    """M = diag(d), d (n,)."""

    d: Tensor

    def dense(self) -> Tensor:
        return torch.diag(self.d)

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        return geo.unlast(geo.last(x) * self.d.to(x.dtype))

    def left(self, w: Tensor) -> Tensor:
        return self.d.to(w.dtype).unsqueeze(-1) * w

    def right(self, w: Tensor) -> Tensor:
        return w * self.d.to(w.dtype)
