"""`Change`: what a method does to a frozen weight. W' = gain ⊙ (left · W · right + add);  b' = (left b or b) + shift.

The others here are what methods do that change no weight, or a whole module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .errors import MergeError
from .ops import Derived, Diag, Geometry, LowRank, Op, Sparse, Sum, Vectored

Base = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Change:
    """W' = gain ⊙ (left W right + add) on the canonical weight W (n_out, n_in), and b' = left b (if left_on_bias) + shift.

    `gain` (n_out,) scales the rows of the whole (DoRA), never the bias. A method that has no such form gives `base`, a dense f(W) that takes the place of W.
    """

    left: Op | None = None
    right: Op | None = None
    add: Op | None = None
    shift: Tensor | None = None
    left_on_bias: bool = False
    base: Tensor | None = None
    gain: Tensor | None = None

    @property
    def additive(self) -> bool:
        """Whether W' = W + add and nothing else happens to W."""
        return self.left is None and self.right is None and self.base is None and self.gain is None

    @property
    def fixed(self) -> bool:
        """Whether there is a W' at all: whether the change is the same for all inputs."""
        return self.add is None or self.add.fixed

    @property
    def lean(self) -> bool:
        """Whether `rows` needs W for one product, and forms nothing of its size."""
        return self.base is None and all(op is None or op.lean for op in (self.left, self.right, self.add))

    def weight(self, w: Tensor) -> Tensor:
        """W' in the dtype of w. Merging, the oracle of the laws, and the way for sites that cannot be split."""
        if self.base is not None:
            w = self.base.to(w.dtype)
        if self.left is not None:
            w = self.left.left(w)
        if self.right is not None:
            w = self.right.right(w)
        if self.add is not None:
            w = self._plus(w, self.add)
        return w if self.gain is None else self.gain.to(w.dtype).unsqueeze(-1) * w

    @staticmethod
    def _plus(w: Tensor, add: Op) -> Tensor:
        d = add.dense()
        if d.shape != w.shape:
            raise MergeError(
                f"the adapter's change has shape {tuple(d.shape)}, the weight {tuple(w.shape)}: it reads input channels that a "
                "grouped convolution of this shape does not see, so no weight of the layer holds it. Keep it unmerged."
            )
        return w + d.to(w.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        """b' in the dtype of b, or of the shift where there is no bias."""
        if b is not None and self.left is not None and self.left_on_bias:
            b = self.left.left(b.unsqueeze(-1)).squeeze(-1)
        if self.shift is None:
            return b
        return self.shift if b is None else b + self.shift.to(b.dtype)

    def rows(self, base: Base, x: Tensor, geo: Geometry) -> Tensor:
        """The output without bias: base(x) = x Wᵀ in the geometry `geo`."""
        if self.base is not None:
            m = self.base.to(x.dtype) if x.is_floating_point() else self.base
            y = geo.contract(x if self.right is None else self.right.rows(x, geo), m)
        else:
            y = base(x if self.right is None else self.right.rows(x, geo))
        if self.left is not None:
            y = self.left.rows(y, geo)
        if self.add is not None:
            y = self.add.add_to(y, x, geo)
        return y if self.gain is None else Diag(self.gain).rows(y, geo)


@dataclass(frozen=True, eq=False)
class Swap:
    """Tensors, by name inside a module of any kind, that take the places of its own (`module` sites)."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Attend:
    """Further tokens that every query of an attention layer attends to (`self_attention` sites); the heads' outputs get what `mix` gives.

    Args:
        tokens: (n, width of the layer's input).
        mix: (q (batch, heads, tokens, head), k and v of the further tokens (heads, n, head), scale of q·k) -> (batch, heads, tokens, head).
    """

    tokens: Tensor
    mix: Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, eq=False)
class Beside:
    """What goes along a block (`block` sites), on the rows of its adapter.

    Args:
        before: hidden states (batch, tokens, width) that would enter the block -> those that do.
        after: sees those that leave it.
    """

    before: Callable[[Tensor], Tensor]
    after: Callable[[Tensor], None]


Stacking = Literal["sum", "chain"]


def weight(changes: Sequence[tuple[Change, Stacking]], w: Tensor) -> Tensor:
    """W' of several active adapters, in order. `sum`: the difference to W is added; `chain`: applied to what the ones before gave."""
    out = w
    for c, stacking in changes:
        out = c.weight(out) if out is w or stacking == "chain" or c.additive else out + (c.weight(w) - w)
    return out


def bias(changes: Sequence[tuple[Change, Stacking]], b: Tensor | None) -> Tensor | None:
    """b' of several active adapters, in order."""
    for c, _ in changes:
        b = c.bias(b)
    return b


def rows(changes: Sequence[tuple[Change, Stacking]], base: Base, x: Tensor, geo: Geometry) -> Tensor:
    """The output of several active adapters without bias; equals the site run with `weight(changes, W)`."""
    *before, (last, stacking) = changes
    if not before:
        return last.rows(base, x, geo)
    if stacking == "chain":
        return last.rows(lambda z: rows(before, base, z, geo), x, geo)
    y = rows(before, base, x, geo)
    if last.additive:
        return y if last.add is None else last.add.add_to(y, x, geo)
    return y + (last.rows(base, x, geo) - base(x))


def placed(changes: Sequence[tuple[Change, Stacking]]) -> tuple[Sparse, Sequence[Op]] | None:
    """(sparse part, what else is added) if the changes are one addition that has a sparse part; else None."""
    if len(changes) != 1 or not changes[0][0].additive:
        return None
    add = changes[0][0].add
    first, *rest = add.terms if isinstance(add, Sum) else (add,)
    return (first, rest) if isinstance(first, Sparse) else None


def fused(changes: Sequence[tuple[Change, Stacking]], x: Tensor) -> tuple[LowRank, Tensor | None] | None:
    """(low-rank part, gain or None) if the changes are one low-rank addition to x Wᵀ, with or without a gain; else None."""
    if len(changes) != 1:
        return None
    c = changes[0][0]
    if c.left is not None or c.right is not None or c.base is not None:
        return None
    if isinstance(c.add, Vectored) and not c.add.few(x):
        return c.add.low(), c.gain
    return (c.add, c.gain) if isinstance(c.add, LowRank) else None


def low_rank(change: Change) -> LowRank | None:
    """What the change adds, as one matrix of two factors (n_out, r) and (r, n_in), if it does nothing else to W; else None."""
    return factors(change.add) if change.additive else None


def factors(add: Op | None) -> LowRank | None:
    """The matrix as one of two factors (n_out, r) and (r, n_in), if it is; else None."""
    if not two_factors(add):
        return None
    return add.low() if isinstance(add, (Vectored, Derived)) else add  # type: ignore[return-value]


def two_factors(add: Op | None) -> bool:
    """Whether `factors` gives any; nothing is formed to see it."""
    if isinstance(add, Derived):
        return add.factors is not None
    return isinstance(add, Vectored) or (isinstance(add, LowRank) and add.up.ndim == 2)


def derived(changes: Sequence[tuple[Change, Stacking]]) -> Derived | None:
    """The dense matrix that is added, if the changes are just that and it can be made anew."""
    add = changes[0][0].add if len(changes) == 1 and changes[0][0].additive else None
    return add if isinstance(add, Derived) else None
