"""y_i = a_i x_i + b_i x_partner(i) on the last axis, pairs being each other's partners, as one autograd function: it keeps x alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import transformed, written_out
from .products import gained


def turned(x: Tensor, a: Tensor, b: Tensor, half: int) -> Tensor:
    """Coordinates in groups of 2 · half, of which each in the first half is the partner of the one as far into the second.

    Args:
        x: (..., n);  a, b: (n,), in any floating dtype.
    """
    if torch.compiler.is_compiling() or transformed():
        return _ordinary(x, a, b, half)
    out: Tensor = _Turned.apply(x, a, b, half)  # type: ignore[no-untyped-call]
    return out


def swapped(x: Tensor, half: int) -> Tensor:
    """x with the partners in each other's places."""
    groups: Tensor = x.unflatten(-1, (-1, 2, half))
    return torch.stack((groups[..., 1, :], groups[..., 0, :]), -2).flatten(-3)


def _ordinary(x: Tensor, a: Tensor, b: Tensor, half: int) -> Tensor:
    return gained(x, a) + swapped(x, half) * b.to(x.dtype)


def _again(ctx: Any, _: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
    x, a, b = ctx.saved_tensors
    return _ordinary(x, a, b, ctx.half), (x, a, b, None)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, half: int) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.half = half
        return gained(x, a).addcmul_(swapped(x, half), b.to(x.dtype))

    @staticmethod
    @written_out(_again)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        dx = da = db = None
        if ctx.needs_input_grad[0]:  # (M y)ᵀ: b goes with the partner
            dx = (dy * a.to(dy.dtype)).addcmul_(swapped(dy, ctx.half), swapped(b, ctx.half).to(dy.dtype))
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[1]:
            da = (rows * x.reshape(rows.shape)).sum(0).to(a.dtype)
        if ctx.needs_input_grad[2]:
            db = (rows * swapped(x, ctx.half).reshape(rows.shape)).sum(0).to(b.dtype)
        return dx, da, db, None
