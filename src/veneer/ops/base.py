"""The contract of a structured matrix, and of the geometry it is applied in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..kernels.autograd import autocast_dtype
from ..kernels.dropout import dropped
from ..kernels.products import linear, wide


class Geometry(Protocol):
    """How a site turns its input into features: plain rows, sliding windows (convolution) or looked-up rows (embedding).

    Attributes:
        plain: whether `contract` is the product x Mᵀ and nothing else.
    """

    plain: ClassVar[bool]

    def contract(self, x: Tensor, m: Tensor) -> Tensor:
        """x Mᵀ with M (m, n_in); the m features stand where the site has its output features."""

    def mix(self, h: Tensor, n: Tensor) -> Tensor:
        """N h on the feature axis of an output-like tensor, N (n_out, m)."""

    def last(self, y: Tensor) -> Tensor:
        """A view of an output-like tensor with the features last; `unlast` undoes it."""

    def unlast(self, y: Tensor) -> Tensor: ...

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Input dropout with probability p, scaled by 1 / (1 - p)."""


class Rows:
    """The plain geometry: x (..., n_in)."""

    plain: ClassVar[bool] = True

    def contract(self, x: Tensor, m: Tensor) -> Tensor:
        return linear(x, m)

    def mix(self, h: Tensor, n: Tensor) -> Tensor:
        return linear(h, n)

    def last(self, y: Tensor) -> Tensor:
        return y

    def unlast(self, y: Tensor) -> Tensor:
        return y

    def drop(self, x: Tensor, p: float) -> Tensor:
        return dropped(x, p)


def mixed_onto(y: Tensor, h: Tensor, n: Tensor, geo: Geometry) -> Tensor:
    """y + N h in one pass over y where the geometry is plain; h with the features where the geometry has them."""
    if geo.plain and y.dtype == h.dtype == n.dtype and autocast_dtype(y.device.type) is None:
        rows = h.reshape(-1, h.shape[-1])
        if not wide(rows, n.mT):
            return torch.addmm(y.reshape(-1, y.shape[-1]), rows, n.mT).view(y.shape)
    return y + geo.mix(h, n).to(y.dtype)


class Op(ABC):
    """A structured matrix M (n_out, n_in). Law: `rows(x, Rows()) == x @ dense().T`.

    Subclasses are final. Their tensors stay in the dtype they were given; `rows` computes in the input's.
    One that is `fixed` False is no matrix, since what it does depends on the input: it has no `dense` and no law.
    """

    fixed: ClassVar[bool] = True

    @abstractmethod
    def dense(self) -> Tensor:
        """M itself, in the dtype of its tensors."""

    def thin(self) -> tuple[Tensor, Tensor, float] | None:
        """(U, V, s) with M = s · U V, U (..., n_out, k) and V (..., k, n_in), where M is made of two such factors; None where it is not."""
        return None

    @property
    def lean(self) -> bool:
        """Whether it is applied without being formed: whether it has a `rows` of its own."""
        return type(self).rows is not Op.rows

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        """x Mᵀ in the geometry `geo`, computed in the dtype of x where x is floating."""
        m = self.dense()
        return geo.contract(x, m.to(x.dtype) if x.is_floating_point() else m)

    def add_to(self, y: Tensor, x: Tensor, geo: Geometry) -> Tensor:
        """y + x Mᵀ."""
        d = self.rows(x, geo)
        return y + d.to(y.dtype)

    def left(self, w: Tensor) -> Tensor:
        """M W."""
        return self.dense().to(w.dtype) @ w

    def right(self, w: Tensor) -> Tensor:
        """W M."""
        return w @ self.dense().to(w.dtype)
