"""y = gain ⊙ (x Wᵀ + s · (drop(x) Aᵀ) Bᵀ) + b as one autograd function: it keeps x and h = drop(x) Aᵀ, and nothing else of the tokens' size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .autograd import autocast_dtype, by_hand, no_autocast, stand_in, written_out
from .dropout import masked, new_seed, survivors
from .packed import Packed, product
from .products import FEW, LOW, addmm_, gained, linear, mm


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
    """A frozen linear layer with a low-rank change.

    Args:
        x: (..., n_in);  w: W (n_out, n_in), frozen, or autograd's own functions are taken; or a packed one;  b: (n_out,) or None.
        a: A (r, n_in);  up: B (n_out, r), in any floating dtype: the factors are cast to the dtype of x, never x to theirs.
        scale: s; as a tensor, it may change without compiled code being compiled again.
        dropout: the probability with which entries of x are dropped before A.
        gain: (n_out,) or None.
        seed: of the dropout mask, for tests; drawn from the global generator if not given.
    """
    if isinstance(scale, Tensor) and scale.requires_grad:
        up, scale = up * scale, 1.0
    if not by_hand(w, a, up) or dropout >= 1 or (dropout > 0 and torch.compiler.is_compiling()):
        return reference.lowrank_linear(x, w, b, a, up, scale, dropout=dropout, gain=gain)
    kind = x.device.type
    if (dtype := autocast_dtype(kind)) is not None:
        with no_autocast(kind):
            w = w.to(dtype) if isinstance(w, Tensor) else w
            return _run(x.to(dtype), w, b if b is None else b.to(dtype), a, up, scale, dropout, gain, seed)
    return _run(x, w, b, a, up, scale, dropout, gain, seed)


def _run(
    x: Tensor,
    w: Tensor | Packed,
    b: Tensor | None,
    a: Tensor,
    up: Tensor,
    scale: float | Tensor,
    dropout: float,
    gain: Tensor | None,
    seed: int | None,
) -> Tensor:
    if dropout > 0 and seed is None:
        seed = new_seed(x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, b, a, up, gain)):
        out: Tensor = _LowRankLinear.apply(x, w, b, a, up, scale, dropout, gain, seed or 0)  # type: ignore[no-untyped-call]
        return shaped_like(out, x)
    if dropout == 0 and x.device.type == "cpu" and x.numel() <= FEW * x.shape[-1]:
        return few_rows(x, w, b, a, up, scale, gain)
    return shaped_like(_forward(x, w, b, a, up, scale, dropout, gain, seed or 0)[0], x)


def shaped_like(y: Tensor, x: Tensor) -> Tensor:
    """y (tokens, n_out) with the leading dimensions of x. Not inside of a function of autograd: a view that is made there may not be written into."""
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])


def few_rows(x: Tensor, w: Tensor | Packed, b: Tensor | None, a: Tensor, up: Tensor, scale: float | Tensor, gain: Tensor | None) -> Tensor:
    """`lowrank_linear` for a few rows on the CPU, no gradients, no dropout: there the casts and the set-up of a half-precision product cost more than the
    arithmetic, so the thin products run in the factors' own dtype, if it is no narrower."""
    if a.dtype is not x.dtype and a.itemsize <= x.itemsize:
        a, up = a.to(x.dtype), up.to(x.dtype)
    shift = b if gain is None else None
    y = F.linear(x, w, shift) if isinstance(w, Tensor) else product(x, w, shift)
    thin = F.linear(F.linear(x.to(a.dtype), a), up)
    if isinstance(scale, Tensor):
        y.add_(thin * scale)  # which a compiler makes one pass of
    else:
        y.add_(thin, alpha=scale)
    if gain is not None:
        y = y.mul_(gain) if b is None else y.mul_(gain).add_(b)
    return y


def _forward(
    x: Tensor, w: Tensor | Packed, b: Tensor | None, a: Tensor, up: Tensor, scale: float | Tensor, rate: float, gain: Tensor | None, seed: int,
    trains: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(y (tokens, n_out); h; y before gain)."""
    rows = x.reshape(-1, x.shape[-1])
    a, up = a.to(x.dtype), up.to(x.dtype)
    if isinstance(w, Tensor) and rate == 0 and gain is None and _wide(len(rows), a, up, trains):
        return _times(rows, w, b, mm(up, a).mul_(scale)), None, None
    h = mm(rows if rate == 0 else masked(rows, survivors(rows, rate, seed)), a.mT)
    factor, scaled = (1.0, h * scale) if isinstance(scale, Tensor) else (scale, h)
    u = addmm_(product(rows, w, b if gain is None else None), scaled, up.mT, factor / (1 - rate))
    if gain is None:
        return u, h, None
    y = gained(u, gain)
    if b is not None:
        y += b
    return y, h, u


def _wide(tokens: int, a: Tensor, up: Tensor, trains: bool) -> bool:
    """Whether the rank is so high, and the tokens so many, that forming D costs less than passing the tokens through both factors."""
    (r, n_in), n_out = a.shape, up.shape[0]
    thin, whole = tokens * r * (n_in + n_out), n_in * n_out
    passes = (a.dtype in LOW) + trains * (1 + (a.dtype in LOW))  # of all tokens through a matrix of W's size, beside the frozen layer's
    return 2 * r > min(n_in, n_out) and thin * (1 + trains) > whole * (r * (1 + 2 * trains) + tokens * passes)


def _times(x: Tensor, w: Tensor, b: Tensor | None, d: Tensor) -> Tensor:
    """x (W + D)ᵀ + b; in 16 bits as two products, since a small D added to W would be rounded away."""
    return addmm_(linear(x, w, b), x, d.mT) if x.dtype in LOW else F.linear(x, d.add_(w), b)


def _again(ctx: Any, dy: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
    x, w, a, up, _, gain, _, s = ctx.saved_tensors
    b = stand_in(dy.shape[-1], dy, ctx.b_dtype)
    y = reference.lowrank_linear(
        x, w if ctx.packed is None else ctx.packed, b, a, up, ctx.scale if s is None else s, dropout=ctx.rate, gain=gain, seed=ctx.seed
    )
    return y, (x, None, b, a, up, None, None, gain, None)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor | Packed,
        b: Tensor | None,
        a: Tensor,
        up: Tensor,
        scale: float | Tensor,
        rate: float,
        gain: Tensor | None,
        seed: int,
    ) -> Tensor:
        y, h, u = _forward(x, w, b, a, up, scale, rate, gain, seed, trains=True)
        # u is kept where gain trains: neither y (it may be overwritten) nor a division by gain (it may be 0) gives it back
        wants_gain = gain is not None and ctx.needs_input_grad[7]
        ctx.packed = None if isinstance(w, Tensor) else w
        kept_h, kept_u = h if ctx.needs_input_grad[4] else None, u if wants_gain else None
        s = scale if isinstance(scale, Tensor) else None
        ctx.save_for_backward(x, w if isinstance(w, Tensor) else None, a, up, kept_h, gain, kept_u, s)
        ctx.scale, ctx.rate, ctx.seed, ctx.whole = scale if s is None else 1.0, rate, seed, h is None
        ctx.b_dtype = None if b is None else b.dtype
        return y

    @staticmethod
    @written_out(_again)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, up, h, gain, u, s = ctx.saved_tensors
        scale = ctx.scale if s is None else s
        need_x, _, need_b, need_a, need_up, _, _, need_gain, _ = ctx.needs_input_grad
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        db = dy.sum(0).to(ctx.b_dtype) if need_b else None
        dgain = (dy * u).sum(0).to(gain.dtype) if need_gain else None
        if gain is not None:
            dy = dy * gain.to(dy.dtype)
        if ctx.whole:
            d = mm(dy.mT, rows) if need_a or need_up else None
            da = mm(up.to(dy.dtype).mT, d).mul_(scale).to(a.dtype) if need_a and d is not None else None
            dup = mm(d, a.to(dy.dtype).mT).mul_(scale).to(up.dtype) if need_up and d is not None else None
            dx = _times(dy, w.mT, None, mm(a.to(dy.dtype).mT, up.to(dy.dtype).mT).mul_(scale)).view(x.shape) if need_x else None
            return dx, None, db, da, dup, None, None, None, None
        scale = scale / (1 - ctx.rate)
        dup = mm(dy.mT, h).mul_(scale).to(up.dtype) if need_up else None
        da = dx = None
        if need_a or need_x:
            dh = mm(dy, up.to(dy.dtype)).mul_(scale)
            kept = survivors(rows, ctx.rate, ctx.seed) if ctx.rate > 0 else None
            if need_x:
                dx = mm(dy, w if ctx.packed is None else ctx.packed.whole(dy.dtype))
                if kept is None:
                    addmm_(dx, dh, a.to(dy.dtype))
                else:
                    through = mm(dh, a.to(dy.dtype))
                    through.view(kept.dtype).mul_(kept)
                    dx.add_(through)
                dx = dx.view(x.shape)
            if need_a:
                da = mm(dh.mT, rows if kept is None else masked(rows, kept)).to(a.dtype)
        return dx, None, db, da, dup, None, None, dgain, None
