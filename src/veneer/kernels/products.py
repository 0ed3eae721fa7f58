"""Products of 16-bit numbers. A processor that has none of its own takes several times as long for them as in 32 bits, the casts included: there they are
taken in 32 bits, what comes out is rounded once, and nothing else is kept for the backward than otherwise."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .autograd import autocast_dtype, by_hand, no_autocast, ordinary, stand_in, transformed, written_out

LOW = (torch.float16, torch.bfloat16)
_THICK = 16  # each of the three dimensions, below which the casts cost more than they save …
_WORTH = 1 << 22  # … and multiplications, below which the calls do
FEW = 8  # rows for which numbers of 32 bits cost less than casts, and calls more
_BLOCK = 1 << 20  # entries of the second factor that are widened at a time: they stay in the cache, and W is never held twice

_BELOW = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


def _missing() -> frozenset[torch.dtype]:
    """The 16-bit dtypes that the processor has no products of. What `ONEDNN_MAX_CPU_ISA` keeps from torch's library of products counts as missing."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit in _BELOW or not torch.backends.mkldnn.is_available():
        return frozenset(LOW)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    halves = limit != "AVX512_CORE_BF16" and (capabilities.get("avx512_fp16") or capabilities.get("amx_fp16"))
    brains = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return frozenset(dtype for dtype, there in zip(LOW, (halves, brains), strict=True) if not there)


_MISSING = _missing()  # once: compiled code asks too


def slow(t: Tensor) -> bool:
    """Whether products of it are better taken in 32 bits."""
    return t.dtype in _MISSING and t.device.type == "cpu"


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, with gradients for all three.

    Args:
        x: (..., n_in);  w: W (n_out, n_in);  b: (n_out,) or None.
    """
    if x.device.type != "cpu" or transformed() or x.numel() < _THICK * x.shape[-1]:
        return F.linear(x, w, b)
    dtype = autocast_dtype("cpu") or x.dtype
    if dtype not in _MISSING or x.dtype != w.dtype or not (ordinary(x) and ordinary(w)):
        return F.linear(x, w, b)
    if dtype != x.dtype:
        with no_autocast("cpu"):
            return linear(x.to(dtype), w.to(dtype), b if b is None else b.to(dtype))
    rows = x.reshape(-1, x.shape[-1])
    if not wide(rows, w.mT):
        return F.linear(x, w, b)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b))
    y: Tensor = _Linear.apply(rows, w, b) if wanted else times(rows, w.mT, b)  # type: ignore[no-untyped-call]
    return y if x.ndim == 2 else y.view(*x.shape[:-1], w.shape[0])  # no view inside a function of autograd: see `lowrank.shaped_like`


def gained(z: Tensor, d: Tensor) -> Tensor:
    """z ⊙ d on the last axis, in the dtype of z. In 16 bits as z + z ⊙ (d - 1): a d near one, where gains start, would be rounded to one."""
    if z.dtype not in LOW or d.dtype in LOW:
        return z * d.to(z.dtype)
    if z.numel() <= FEW * d.numel():
        return (z * d).to(z.dtype)
    e = (d - 1).to(z.dtype)
    if torch.is_grad_enabled() and (z.requires_grad or e.requires_grad) and by_hand(None, z, e) and not torch.compiler.is_compiling():
        out: Tensor = _Gained.apply(z, e)  # type: ignore[no-untyped-call]
        return out
    return torch.addcmul(z, z, e)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """A B, of matrices; without gradients."""
    return times(a, b) if wide(a, b) else a @ b


def addmm_(y: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """y += alpha · A B, of matrices; without gradients."""
    return y.add_(a.float() @ b.float(), alpha=alpha) if wide(a, b) else y.addmm_(a, b, alpha=alpha)


def wide(a: Tensor, b: Tensor) -> bool:
    """Whether A B is taken in 32 bits."""
    if not slow(a):
        return False
    (m, k), n = a.shape, b.shape[1]
    return min(m, k, n) >= _THICK and m * k * n >= _WORTH


def times(a: Tensor, b: Tensor, shift: Tensor | None = None) -> Tensor:
    """A B + shift in 32 bits, rounded to the dtype of A; some columns of B, which may be of 32 bits, at a time. Without gradients."""
    left, step = a.float(), max(_BLOCK // b.shape[0], 1)

    def part(i: int) -> Tensor:
        some = b[:, i : i + step].float()
        return left @ some if shift is None else torch.addmm(shift[i : i + step].float(), left, some)

    n = b.shape[1]
    if n <= step:
        return part(0).to(a.dtype)
    y = a.new_empty(len(a), n)
    for i in range(0, n, step):
        y[:, i : i + step] = part(i)
    return y


def _again(ctx: Any, dy: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
    x, w = ctx.saved_tensors
    b = stand_in(dy.shape[-1], dy, ctx.b_dtype)
    if x is None:  # it was not kept: dy W does not depend on it
        x = dy.new_zeros(len(dy), w.shape[1]).requires_grad_()
    return F.linear(x, w, b), (x, w, b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        ctx.b_dtype = None if b is None else b.dtype
        return times(x, w.mT, b)

    @staticmethod
    @written_out(_again)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad
        return mm(dy, w) if need_x else None, mm(dy.mT, x) if need_w else None, dy.sum(0).to(ctx.b_dtype) if need_b else None


def _gained_again(ctx: Any, dy: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
    z, e = ctx.saved_tensors
    if z is None:  # it was not kept: dy ⊙ d does not depend on it
        z = torch.zeros_like(dy).requires_grad_()
    return torch.addcmul(z, z, e), (z, e)


class _Gained(torch.autograd.Function):
    """z + z ⊙ e, with one pass for the gradient of z where autograd takes three."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, e: Tensor) -> Tensor:
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, e)
        return torch.addcmul(z, z, e)

    @staticmethod
    @written_out(_gained_again)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, e = ctx.saved_tensors
        need_z, need_e = ctx.needs_input_grad
        return torch.addcmul(dy, dy, e) if need_z else None, (dy * z).sum_to_size(e.shape) if need_e else None
