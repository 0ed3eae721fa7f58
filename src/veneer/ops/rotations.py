"""Orthogonal matrices: block-diagonal rotations, butterflies of them, products of reflections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.autograd import no_autocast
from ..kernels.pairs import swapped, turned
from ..kernels.products import linear
from .base import Geometry, Op


@dataclass(eq=False)
class BlockDiag(Op):
    """M = blockdiag(blocks), blocks (k, m, n); one block (1, m, n) stands for all of them where `repeat` says how many.

    With `groups`, M is over the inputs of all groups of a grouped layer, and `right` takes the layer's weight, whose rows have those of their group.
    """

    blocks: Tensor
    repeat: int = 1
    groups: int = 1

    def dense(self) -> Tensor:
        whole: Tensor = torch.block_diag(*self.blocks.expand(max(self.repeat, len(self.blocks)), -1, -1))
        return whole

    def _times(self, x: Tensor, blocks: Tensor) -> Tensor:
        b = blocks.shape[-1]
        parts: Tensor = x.unflatten(-1, (x.shape[-1] // b, b))
        return torch.einsum("...kc,kbc->...kb", parts, blocks.to(x.dtype).expand(parts.shape[-2], -1, -1)).flatten(-2)

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        return geo.unlast(self._times(geo.last(x), self.blocks))

    def left(self, w: Tensor) -> Tensor:
        return self._times(w.mT, self.blocks).mT

    def right(self, w: Tensor) -> Tensor:
        if self.groups > 1 and len(self.blocks) > 1:
            parts = zip(w.chunk(self.groups), self.blocks.mT.chunk(self.groups), strict=True)
            return torch.cat([self._times(rows, blocks) for rows, blocks in parts])
        return self._times(w, self.blocks.mT)


@dataclass(eq=False)
class Reflections(Op):
    """M = H₁ H₂ … H_r, Hᵢ = I - 2 uᵢ uᵢᵀ with the unit columns uᵢ of u (n, r).

    In the compact WY form M = I - U T Uᵀ, T⁻¹ = ½ I + the strictly upper part of UᵀU: two thin products instead of r passes.
    """

    u: Tensor

    def _t(self) -> Tensor:
        with no_autocast(self.u.device.type):  # r x r, and no solver works in half precision
            u = self.u.float() if self.u.dtype in (torch.bfloat16, torch.float16) else self.u
            gram = u.mT @ u
            eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
            t: Tensor = torch.linalg.solve_triangular(gram.triu(1) + 0.5 * eye, eye, upper=True)
        return t.to(self.u.dtype)

    def dense(self) -> Tensor:
        return torch.eye(self.u.shape[0], dtype=self.u.dtype, device=self.u.device) - self.u @ self._t() @ self.u.mT

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        u = self.u.to(x.dtype)
        z = geo.last(x)
        return geo.unlast(z - linear(linear(linear(z, u.mT), self._t().to(x.dtype)), u))

    def left(self, w: Tensor) -> Tensor:
        u = self.u.to(w.dtype)
        return w - u @ (self._t().to(w.dtype) @ (u.mT @ w))

    def right(self, w: Tensor) -> Tensor:
        u = self.u.to(w.dtype)
        return w - (w @ u @ self._t().to(w.dtype)) @ u.mT


@dataclass(eq=False)
class Product(Op):
    """M = M₁ M₂ … M_k."""

    factors: Sequence[Op]

    @property
    def lean(self) -> bool:
        return all(f.lean for f in self.factors)

    def dense(self) -> Tensor:
        m = self.factors[0].dense()
        for f in self.factors[1:]:
            m = f.right(m)
        return m

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        for f in reversed(self.factors):  # x Mᵀ = x M_kᵀ … M₁ᵀ
            x = f.rows(x, geo)
        return x

    def left(self, w: Tensor) -> Tensor:
        for f in reversed(self.factors):
            w = f.left(w)
        return w

    def right(self, w: Tensor) -> Tensor:
        for f in self.factors:
            w = f.right(w)
        return w


@dataclass(eq=False)
class Shuffle(Op):
    """M a permutation that changes two axes: coordinates that stand as tables (..., a, b, c) stand as (..., b, a, c) after it.

    Mᵀ = Shuffle(b, a, c).

    Args:
        n: the number of coordinates, a multiple of a · b · c.
        like: gives `dense` its dtype and device.
    """

    a: int
    b: int
    c: int
    n: int
    like: Tensor

    def dense(self) -> Tensor:
        return self._swapped(torch.eye(self.n, dtype=self.like.dtype, device=self.like.device)).mT

    def _swapped(self, x: Tensor) -> Tensor:
        return _exchange(x, self.a, self.b, self.c)

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        return geo.unlast(self._swapped(geo.last(x)))

    def left(self, w: Tensor) -> Tensor:
        return self._swapped(w.mT).mT

    def right(self, w: Tensor) -> Tensor:
        return _exchange(w, self.b, self.a, self.c)


def _exchange(x: Tensor, a: int, b: int, c: int) -> Tensor:
    tables: Tensor = x.unflatten(-1, (-1, a, b, c))
    return tables.transpose(-3, -2).flatten(-4)


@dataclass(eq=False)
class Pairs(Op):
    """M scales and rotates pairs of coordinates: (M y)ᵢ = aᵢ yᵢ + bᵢ y[partner of i].

    Coordinates stand in groups of 2 · half; each in the first half of a group is the partner of the one as far into the second.
    """

    a: Tensor
    b: Tensor
    half: int

    def dense(self) -> Tensor:
        n = self.a.shape[0]
        rows = torch.arange(n, device=self.a.device)
        return torch.diag(self.a).index_put((rows, swapped(rows, self.half)), self.b, accumulate=True)

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        return geo.unlast(turned(geo.last(x), self.a, self.b, self.half))

    def left(self, w: Tensor) -> Tensor:
        return self.a.to(w.dtype).unsqueeze(-1) * w + self.b.to(w.dtype).unsqueeze(-1) * swapped(w.mT, self.half).mT


def skew(flat: Tensor, b: int) -> Tensor:
    """Skew-symmetric matrices (..., b, b) from their upper triangles (..., b (b - 1) / 2)."""
    i, j = torch.triu_indices(b, b, 1, device=flat.device)
    q: Tensor = flat.new_zeros(*flat.shape[:-1], b * b).index_copy(-1, i * b + j, flat).unflatten(-1, (b, b))
    return q - q.mT


def cayley(q: Tensor, terms: int | None) -> Tensor:
    """Rotations from skew matrices (..., b, b): (I + Q)⁻¹ (I - Q), or, of the opposite sense, its truncated Neumann series.

    Args:
        terms: None for the exact form; else I + 2Q + 2Q² + … + Q^(terms - 1), where 3 means 4, as in PEFT.
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms is None:
        with no_autocast(q.device.type):  # no solver works in half precision
            wide = torch.float32 if q.dtype in (torch.bfloat16, torch.float16) else q.dtype
            exact: Tensor = torch.linalg.solve((eye + q).to(wide), (eye - q).to(wide), left=False)
        return exact.to(q.dtype)
    last = max(terms, 4) if terms > 2 else terms
    r, power = eye + 2 * q if terms > 1 else eye.expand_as(q), q
    for t in range(2, last):
        power = power @ q
        r = r + (1 if t == last - 1 else 2) * power
    return r


def blocks_dropped(rotations: Tensor, rate: float) -> Tensor:
    """Multiplicative dropout: in one of the factors, drawn anew, each block is the identity with probability `rate`.

    Args:
        rotations: (factors, blocks, b, b).
    """
    m, count, b, _ = rotations.shape
    device = rotations.device
    chosen = torch.arange(m, device=device).view(m, 1) == torch.randint(m, (1,), device=device)
    gone = (torch.rand(1, count, device=device) < rate) & chosen
    return torch.where(gone[..., None, None], torch.eye(b, dtype=rotations.dtype, device=device), rotations)
