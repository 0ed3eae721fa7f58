"""A change with something of its own between its two factors: gates per row or token, a draw, a mixture, a structured matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import MergeError, RouteError
from ..kernels.products import linear
from .base import Geometry, Op, mixed_onto


@dataclass(eq=False)
class Between(Op):
    """y += scale · U g(V x),  up = U (n_out, k), down = V (r, n_in), g from (..., r) to (..., k), features last.

    It is no matrix where g depends on the input, so it cannot be formed: `dense` raises.

    Args:
        up: U, or a function that makes it of V x.
        g: gets V x and x itself, in the geometry's own layout; V x as it is if not given.
        why: the reason `dense` gives.
        whole: the matrix that it is on average, which a merge takes, where there is one.
    """

    fixed: ClassVar[bool] = False

    up: Tensor | Callable[[Tensor], Tensor]
    down: Tensor
    g: Callable[[Tensor, Tensor], Tensor] | None = None
    scale: float | Tensor = 1.0
    dropout: float = 0.0
    why: str = "its change depends on the input"
    whole: Op | None = None

    def dense(self) -> Tensor:
        if self.whole is not None:
            return self.whole.dense()
        raise MergeError(f"No weight holds this change: {self.why}. Keep it unmerged.")

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        return geo.mix(*self._middle(x, geo))

    def add_to(self, y: Tensor, x: Tensor, geo: Geometry) -> Tensor:
        return mixed_onto(y, *self._middle(x, geo), geo)

    def _middle(self, x: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
        """(g(V x), with the scale in one of the two; U)."""
        dropped = geo.drop(x, self.dropout) if self.dropout > 0 else x
        h = geo.last(geo.contract(dropped, self.down.to(x.dtype) if x.is_floating_point() else self.down))
        up = self.up if isinstance(self.up, Tensor) else self.up(h)
        if self.g is not None:
            h = self.g(h, x).to(h.dtype)
        up = up.to(h.dtype)
        if isinstance(self.scale, Tensor) or self.scale != 1:
            if h.numel() < up.numel():  # the smaller one
                h = h * self.scale
            else:
                up = up * self.scale
        return geo.unlast(h), up


@dataclass(eq=False)
class Inside(Op):
    """M = U N V: a structured matrix between two frozen ones."""

    up: Tensor
    middle: Op
    down: Tensor
    dropout: float = 0.0

    def dense(self) -> Tensor:
        return self.up @ self.middle.left(self.down).to(self.up.dtype)

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        return geo.mix(*self._inside(x, geo))

    def add_to(self, y: Tensor, x: Tensor, geo: Geometry) -> Tensor:
        return mixed_onto(y, *self._inside(x, geo), geo)

    def _inside(self, x: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
        if self.dropout > 0:
            x = geo.drop(x, self.dropout)
        if geo.plain and x.dim() > 1:  # V x and N V x as columns of tokens: a sparse product on rows would turn them over twice
            rows = x.reshape(-1, x.shape[-1])
            h = self.middle.left(linear(self.down.to(x.dtype), rows)).mT.view(*x.shape[:-1], self.down.shape[0])
            return h, self.up.to(h.dtype)
        h = self.middle.rows(geo.contract(x, self.down.to(x.dtype)), geo)
        return h, self.up.to(h.dtype)


def gated(
    up: Tensor, down: Tensor, ranks: Sequence[int], gates: Callable[[Tensor], Tensor], dropout: float = 0.0, why: str = ""
) -> Between:
    """y += Σ_e c_e U_e V_e x: low-rank changes, one after another in `up` (n_out, Σ ranks) and `down` (Σ ranks, n_in), each with a gate.

    Args:
        ranks: of each change.
        gates: makes c (..., number of changes) of x; its leading dimensions are those of x without features.
    """
    same = len(set(ranks)) == 1

    def gate(h: Tensor, x: Tensor) -> Tensor:
        c = gates(x).to(h.dtype)
        if same:
            gated: Tensor = (h.unflatten(-1, (len(ranks), -1)) * c.unsqueeze(-1)).flatten(-2)
            return gated
        return h * torch.cat([c[..., i : i + 1].expand(*c.shape[:-1], r) for i, r in enumerate(ranks)], -1)

    return Between(up, down, gate, dropout=dropout, why=why)


def per_row(fact: Tensor, rows: int) -> Tensor:
    """A fact of each row of the batch, for a batch in which each row stands several times, one after another (beams).

    Args:
        fact: (batch, ...).
        rows: how many there are now.
    """
    if len(fact) == rows:
        return fact
    if rows % len(fact):
        raise RouteError(f"There are facts about {len(fact)} rows, and {rows} rows in the batch.")
    return torch.repeat_interleave(fact, rows // len(fact), 0)


def per_token(fact: Tensor, shape: Sequence[int], where: str) -> Tensor:
    """A fact of each token of each row, in the form of what a layer sees: all of them, its tokens in one row, or the last one of each row.

    Args:
        fact: (rows, tokens, ...).
        shape: of the layer's input without its features.
        where: the layer's name.

    Raises:
        RouteError: if the layer sees anything else.
    """
    rows, tokens = fact.shape[:2]
    if tuple(shape) == (rows, tokens):
        return fact
    if tuple(shape) == (rows * tokens,):
        return fact.flatten(0, 1)
    if tuple(shape) == (rows, 1):
        return fact[:, -1:]
    raise RouteError(
        f"The layer {where!r} gets an input of shape {tuple(shape)} where the batch has {rows} rows of {tokens} tokens, so it cannot be told which "
        "tokens it sees. Leave it out of target_modules."
    )
