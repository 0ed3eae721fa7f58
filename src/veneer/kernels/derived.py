"""y = x (W + D)ᵀ + b with D made from a few small tensors, as one autograd function: it keeps x and those, and makes D anew in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .autograd import autocast_dtype, by_hand, no_autocast, stand_in, written_out
from .lowrank import shaped_like
from .products import addmm_, linear, mm, times, wide

Make = Callable[..., Tensor]


def derived_linear(x: Tensor, w: Tensor, b: Tensor | None, make: Make, parts: Sequence[Tensor]) -> Tensor:
    """A frozen linear layer with a dense change.

    In 32 bits and wider D is added to W for one product; below, where the sum would lose what is small in D, it has a product of its own
    (not in the gradient for x, which is rounded more than that).

    Args:
        x: (..., n_in);  w: W (n_out, n_in), frozen, or autograd's own functions are taken;  b: (n_out,) or None.
        make: D (n_out, n_in) from `parts`, a new tensor; called again in the backward, it has to give the same.
        parts: what gets gradients, in any floating dtype.
    """
    if torch.compiler.is_compiling() or not by_hand(w, *parts):  # a compiler decides by itself what to make anew
        return reference.derived_linear(x, w, b, make, parts)
    kind = x.device.type
    if (dtype := autocast_dtype(kind)) is not None:
        with no_autocast(kind):
            return _run(x.to(dtype), w.to(dtype), None if b is None else b.to(dtype), make, parts)
    return _run(x, w, b, make, parts)


def _run(x: Tensor, w: Tensor, b: Tensor | None, make: Make, parts: Sequence[Tensor]) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, b, *parts)):
        out: Tensor = _DerivedLinear.apply(make, x, w, b, *parts)  # type: ignore[no-untyped-call]
        return shaped_like(out, x)
    return shaped_like(_forward(x, w, b, make(*parts)), x)


def _one(w: Tensor, d: Tensor) -> bool:
    """Whether W + D holds all of D."""
    return w.dtype == d.dtype and w.dtype in (torch.float32, torch.float64)


def _forward(x: Tensor, w: Tensor, b: Tensor | None, d: Tensor) -> Tensor:
    """y (tokens, n_out)."""
    rows = x.reshape(-1, x.shape[-1])
    if _one(w, d):
        return F.linear(rows, w + d, b)
    if wide(rows, w.mT):  # and it does in 32 bits
        return times(rows, (w + d.float()).mT, b)
    return addmm_(linear(rows, w, b), rows, d.to(x.dtype).mT)


def _again(ctx: Any, dy: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
    x, w, *parts = ctx.saved_tensors
    b = stand_in(dy.shape[-1], dy, ctx.b_dtype)
    return reference.derived_linear(x, w, b, ctx.make, parts), (None, x, None, b, *parts)


class _DerivedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Make, x: Tensor, w: Tensor, b: Tensor | None, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, *parts)
        ctx.make, ctx.b_dtype = make, None if b is None else b.dtype
        return _forward(x, w, b, make(*parts))

    @staticmethod
    @written_out(_again)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, *parts = ctx.saved_tensors
        _, need_x, _, need_b, *need = ctx.needs_input_grad
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        with torch.enable_grad():
            fresh = [t.detach().requires_grad_(n) for t, n in zip(parts, need, strict=True)]
            d = ctx.make(*fresh)
        dx = None
        if need_x:  # one product in 16 bits too: what W + D rounds away of D is less than what dx itself is rounded by
            dx = times(dy, w + d.detach().float()) if wide(dy, w) else mm(dy, w + d.detach().to(w.dtype))
        grads: list[Tensor | None] = [None] * len(parts)
        if wanted := [i for i, n in enumerate(need) if n]:
            found = torch.autograd.grad(d, [fresh[i] for i in wanted], mm(dy.mT, rows).to(d.dtype), allow_unused=True)
            for i, g in zip(wanted, found, strict=True):
                grads[i] = g
        return None, None if dx is None else dx.view(x.shape), None, dy.sum(0).to(ctx.b_dtype) if need_b else None, *grads
