"""y = gain ⊙ (x Wᵀ + s · (drop(x) Aᵀ) Bᵀ) + b as one autograd function: it keeps x and h = drop(x) Aᵀ, and nothing else of the tokens' size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import reference


def lowrank_linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    a: Tensor,
    up: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    gain: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """A frozen linear layer with a low-rank change.

    Args:
        x: (..., n_in);  w: W (n_out, n_in), frozen: it never gets a gradient;  b: (n_out,) or None.
        a: A (r, n_in);  up: B (n_out, r), in any floating dtype: the factors are cast to the dtype of x, never x to theirs.
        dropout: the probability with which entries of x are dropped before A.
        gain: (n_out,) or None.
        seed: of the dropout mask, for tests; drawn from the global generator if not given.
    """
    if not _ordinary(w) or not _ordinary(a) or not _ordinary(up) or (dropout > 0 and torch.compiler.is_compiling()):
        return reference.lowrank_linear(x, w, b, a, up, scale, dropout=dropout, gain=gain)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            cast = [t if t is None else t.to(dtype) for t in (x, w, b)]
            return _run(cast[0], cast[1], cast[2], a, up, scale, dropout, gain, seed)  # type: ignore[arg-type]
    return _run(x, w, b, a, up, scale, dropout, gain, seed)


def _ordinary(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling()


def _run(
    x: Tensor, w: Tensor, b: Tensor | None, a: Tensor, up: Tensor, scale: float, dropout: float, gain: Tensor | None, seed: int | None
) -> Tensor:
    if dropout > 0 and seed is None:
        seed = int(torch.randint(0, 2**62, ()))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, b, a, up, gain)):
        out: Tensor = _LowRankLinear.apply(x, w, b, a, up, scale, dropout, gain, seed or 0)  # type: ignore[no-untyped-call]
        return out
    return _forward(x, w, b, a, up, scale, dropout, gain, seed or 0)[0]


def _dropped(x: Tensor, rate: float, seed: int) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    mask = torch.empty(x.shape, dtype=torch.uint8, device=x.device).bernoulli_(1 - rate, generator=generator)
    return (x * mask).mul_(1 / (1 - rate))


def _forward(
    x: Tensor, w: Tensor, b: Tensor | None, a: Tensor, up: Tensor, scale: float, rate: float, gain: Tensor | None, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    rows = x.reshape(-1, x.shape[-1])
    a, up = a.to(x.dtype), up.to(x.dtype)
    h = (rows if rate == 0 else _dropped(rows, rate, seed)) @ a.mT
    u = F.linear(rows, w, b if gain is None else None).addmm_(h, up.mT, alpha=scale)
    if gain is None:
        return u.view(*x.shape[:-1], u.shape[-1]), h, None
    y = u * gain.to(u.dtype)
    if b is not None:
        y += b
    return y.view(*x.shape[:-1], y.shape[-1]), h, u


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, a: Tensor, up: Tensor, scale: float, rate: float, gain: Tensor | None, seed: int
    ) -> Tensor:
        y, h, u = _forward(x, w, b, a, up, scale, rate, gain, seed)
        # u is kept where gain trains: neither y (it may be overwritten) nor a division by gain (it may be 0) gives it back
        wants_gain = gain is not None and ctx.needs_input_grad[7]
        ctx.save_for_backward(x, w, a, up, h, gain, u if wants_gain else None)
        ctx.scale, ctx.rate, ctx.seed = scale, rate, seed
        ctx.b_dtype = None if b is None else b.dtype
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, up, h, gain, u = ctx.saved_tensors
        need_x, _, need_b, need_a, need_up, _, _, need_gain, _ = ctx.needs_input_grad
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        db = dy.sum(0).to(ctx.b_dtype) if need_b else None
        dgain = (dy * u).sum(0).to(gain.dtype) if need_gain else None
        if gain is not None:
            dy = dy * gain.to(dy.dtype)
        dup = (dy.mT @ h).mul_(ctx.scale).to(up.dtype) if need_up else None
        da = dx = None
        if need_a or need_x:
            dh = (dy @ up.to(dy.dtype)).mul_(ctx.scale)
            if need_a:
                da = (dh.mT @ (rows if ctx.rate == 0 else _dropped(rows, ctx.rate, ctx.seed))).to(a.dtype)
            if need_x:
                dx = dy @ w
                if ctx.rate == 0:
                    dx.addmm_(dh, a.to(dy.dtype))
                else:
                    dx += _dropped(dh @ a.to(dy.dtype), ctx.rate, ctx.seed)
                dx = dx.view(x.shape)
        return dx, None, db, da, dup, None, None, dgain, None
