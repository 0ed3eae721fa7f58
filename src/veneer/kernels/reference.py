"""The readable versions: what the fused functions must equal, in value and in every gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .dropout import dropped_by
from .packed import Packed, packed_linear
from .products import gained


def lowrank_linear(
    x: Tensor,
    w: Tensor | Packed,
    b: Tensor | None,
    a: Tensor,
    up: Tensor,
    scale: float | Tensor,
    *,
    dropout: float = 0.0,
    gain: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """y = gain ⊙ (x Wᵀ + scale · (drop(x) Aᵀ) Bᵀ) + b, by ordinary autograd; with a seed, dropout by the fused function's mask."""
    drop = F.dropout if seed is None else functools.partial(dropped_by, seed=seed)
    dropped = drop(x, dropout) if dropout > 0 else x
    y = (F.linear(x, w) if isinstance(w, Tensor) else packed_linear(x, w)) + scale * F.linear(
        F.linear(dropped, a.to(x.dtype)), up.to(x.dtype)
    )
    if gain is not None:
        y = gained(y, gain)
    return y if b is None else y + b.to(y.dtype)


def derived_linear(
    x: Tensor, w: Tensor, b: Tensor | None, make: Callable[..., Tensor], parts: Sequence[Tensor], factors: object = None
) -> Tensor:
    """y = x Wᵀ + x Dᵀ + b, D = make(*parts) itself even where it has factors, by ordinary autograd."""
    y = F.linear(x, w, b)
    return y + F.linear(x, make(*parts).to(x.dtype))


def row_norm_sq(w: Tensor, a: Tensor, up: Tensor, scale: float) -> Tensor:
    """‖w_i + scale · b_i A‖² row by row, with B A formed."""
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    return (w.to(wide) + scale * (up.to(wide) @ a.to(wide))).square().sum(1)


def sparse_linear(x: Tensor, w: Tensor | None, b: Tensor | None, index: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """y = x (W + D)ᵀ + b with D, zero but for `values` at the flat positions `index`, formed by ordinary autograd."""
    d = values.new_zeros(shape[0] * shape[1]).index_put((index.long(),), values).view(shape).to(x.dtype)
    y = F.linear(x, d) if w is None else F.linear(x, w) + F.linear(x, d)
    return y if b is None else y + b.to(y.dtype)


def add_rowwise(y: Tensor, x: Tensor, factors: Sequence[tuple[Tensor, Tensor, float | Tensor]], owner: Sequence[int]) -> Tensor:
    """y_i + s_k (x_i A_kᵀ) B_kᵀ row by row, k the owner of row i, -1 for none."""
    out = []
    for row, z, k in zip(y, x, owner, strict=True):
        if k >= 0:
            a, up, s = factors[k]
            row = row + s * F.linear(F.linear(z, a.to(z.dtype)), up.to(z.dtype))
        out.append(row)
    return torch.stack(out)
