"""y = x (W + D)ᵀ + b with D, or two thin factors of it, made from a few small tensors, as one autograd function: it keeps x and those, and makes D or the
factors anew in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .autograd import autocast_dtype, by_hand, no_autocast, stand_in, written_out
from .lowrank import lowrank_linear, shaped_like
from .products import addmm_, linear, mm, times, wide

Make = Callable[..., Tensor]
Factors = Callable[..., tuple[Tensor, Tensor]]


def derived_linear(x: Tensor, w: Tensor, b: Tensor | None, make: Make, parts: Sequence[Tensor], factors: Factors | None = None) -> Tensor:
    """A frozen linear layer with a dense change.

    In 32 bits and wider D is added to W for one product; below, where the sum would lose what is small in D, it has a product of its own
    (not in the gradient for x, which is rounded more than that).

    Args:
        x: (..., n_in);  w: W (n_out, n_in), frozen, or autograd's own functions are taken;  b: (n_out,) or None.
        make: D (n_out, n_in) from `parts`, a new tensor; called again in the backward, it has to give the same.
        parts: what gets gradients, in any floating dtype.
        factors: from the parts (n_out, r) and (r, n_in), whose product is D; then these are used, and D is never formed.
    """
    if torch.compiler.is_compiling() or not by_hand(w, *parts):  # a compiler decides by itself what to make anew
        if factors is None:
            return reference.derived_linear(x, w, b, make, parts)
        up, down = factors(*parts)
        return reference.lowrank_linear(x, w, b, down, up, 1.0)
    kind = x.device.type
    if (dtype := autocast_dtype(kind)) is not None:
        with no_autocast(kind):
            return _run(x.to(dtype), w.to(dtype), None if b is None else b.to(dtype), make, parts, factors)
    return _run(x, w, b, make, parts, factors)


def _run(x: Tensor, w: Tensor, b: Tensor | None, make: Make, parts: Sequence[Tensor], factors: Factors | None) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, b, *parts)):
        run = _DerivedLinear.apply if factors is None else _FactoredLinear.apply
        out: Tensor = run(make if factors is None else factors, x, w, b, *parts)  # type: ignore[no-untyped-call]
        return shaped_like(out, x)
    if factors is not None:
        up, down = factors(*parts)
        return lowrank_linear(x, w, b, down, up, 1.0)
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
        fresh, d = _made_anew(ctx.make, parts, need)
        dx = None
        if need_x:  # one product in 16 bits too: what W + D rounds away of D is less than what dx itself is rounded by
            dx = times(dy, w + d.detach().float()) if wide(dy, w) else mm(dy, w + d.detach().to(w.dtype))
        grads = _through((d,), (mm(dy.mT, rows),), fresh) if any(need) else [None] * len(parts)
        return None, None if dx is None else dx.view(x.shape), None, dy.sum(0).to(ctx.b_dtype) if need_b else None, *grads


def _made_anew(make: Callable[..., Any], parts: Sequence[Tensor], need: Sequence[bool]) -> tuple[list[Tensor], Any]:
    """Leaves that are equal to the parts, and what `make` makes of them, with a graph."""
    with torch.enable_grad():
        fresh = [t.detach().requires_grad_(n) for t, n in zip(parts, need, strict=True)]
        return fresh, make(*fresh)


def _through(made: Sequence[Tensor], grads: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of the parts, from those of what was made of them."""
    wanted = [p for p in parts if p.requires_grad]
    found = iter(torch.autograd.grad(made, wanted, [g.to(m.dtype) for m, g in zip(made, grads, strict=True)], allow_unused=True))
    return [next(found) if p.requires_grad else None for p in parts]


def _factored_again(ctx: Any, dy: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
    x, w, _, *parts = ctx.saved_tensors
    b = stand_in(dy.shape[-1], dy, ctx.b_dtype)
    up, down = ctx.factors(*parts)
    return reference.lowrank_linear(x, w, b, down, up, 1.0), (None, x, None, b, *parts)


class _FactoredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factors: Factors, x: Tensor, w: Tensor, b: Tensor | None, *parts: Tensor) -> Tensor:
        rows, (up, down) = x.reshape(-1, x.shape[-1]), factors(*parts)
        h = mm(rows, down.to(x.dtype).mT)
        ctx.save_for_backward(x, w, h, *parts)
        ctx.factors, ctx.b_dtype = factors, None if b is None else b.dtype
        return addmm_(linear(rows, w, b), h, up.to(x.dtype).mT)

    @staticmethod
    @written_out(_factored_again)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, h, *parts = ctx.saved_tensors
        _, need_x, _, need_b, *need = ctx.needs_input_grad
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        fresh, (up, down) = _made_anew(ctx.factors, parts, need)
        dh = mm(dy, up.detach().to(dy.dtype))
        dx = addmm_(mm(dy, w), dh, down.detach().to(dy.dtype)).view(x.shape) if need_x else None
        grads = _through((up, down), (mm(dy.mT, h), mm(dh.mT, rows)), fresh) if any(need) else [None] * len(parts)
        return None, dx, None, dy.sum(0).to(ctx.b_dtype) if need_b else None, *grads
