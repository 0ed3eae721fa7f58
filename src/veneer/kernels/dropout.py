"""Dropout whose mask takes few random numbers and is drawn again where it is wanted again: nothing of it is kept for the backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from .autograd import transformed

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers, by the bytes of a floating number


def dropped(x: Tensor, rate: float) -> Tensor:
    """Entries of x (..., n) dropped with probability `rate` and the others divided by 1 - rate, like `torch.nn.functional.dropout`, which is taken itself
    on accelerators, in compiled code and for tensors of special kinds."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.is_floating_point() and x.element_size() in _BITS
    if not plain or not 0 < rate < 1 or torch.compiler.is_compiling() or transformed():
        return F.dropout(x, rate)
    return dropped_by(x, rate, new_seed(x))


def dropped_by(x: Tensor, rate: float, seed: int) -> Tensor:
    """The same by the mask of a seed."""
    out: Tensor = _Dropped.apply(x, rate, seed)  # type: ignore[no-untyped-call]
    return out


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, seed: int) -> Tensor:
        ctx.rate, ctx.seed = rate, seed
        return masked(x, survivors(x, rate, seed)).mul_(1 / (1 - rate))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _Dropped.apply(dy, ctx.rate, ctx.seed), None, None  # type: ignore[no-untyped-call]


def new_seed(x: Tensor) -> int:
    """A seed from the global generator."""
    return 0 if isinstance(x, FakeTensor) else int(torch.randint(0, 2**62, ()))  # shapes alone hold no number to draw


def survivors(x: Tensor, rate: float, seed: int) -> Tensor:
    """Which entries of x (..., n) survive, as 1 and 0 in integers of its width.

    Drawing is what dropout costs on a CPU, and generators run on one thread. So tokens stand in a square, and a token's number for a feature is the product,
    modulo 2³², of one that is drawn for its row and one for its column: √tokens numbers for each feature, not tokens. (In 16 bits, each half of a product is
    the number of one of two features.) Any two entries are dropped independently of each other, and so are several, but for dependences between four
    tokens at the corners of a rectangle, which products modulo 2³² hide.
    """
    n, kind = x.shape[-1], _BITS[x.element_size()]
    wide, halves = (torch.int32, 2) if kind == torch.int16 else (kind, 1)
    bits, tokens, numbers = torch.iinfo(kind).bits, x.numel() // max(n, 1), -(-n // halves)
    rows = math.isqrt(max(tokens - 1, 0)) + 1
    columns = -(-tokens // rows)
    count = (rows + columns) * numbers
    generator = torch.Generator(x.device).manual_seed(seed)
    some = torch.empty(-(-count * wide.itemsize // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None, generator=generator)
    left, right = some.view(wide)[:count].split([rows * numbers, columns * numbers])
    odd = 65537 if halves == 2 else 1  # in each half: multiplied by an odd number, all numbers are different ones
    drawn = (left.view(rows, 1, numbers) | odd) * right.view(1, columns, numbers)
    least = min(round(rate * 2**bits), 2**bits - 1) - 2 ** (bits - 1)
    kept: Tensor = drawn.view(kind).view(rows * columns, halves * numbers)[:tokens, :n].ge_(least)
    return kept.reshape(x.shape)


def masked(x: Tensor, kept: Tensor) -> Tensor:
    """x where `kept` is 1, 0 where it is 0, written over `kept`: in integers, which is faster than in 16-bit numbers, and in no new memory."""
    out: Tensor = kept.mul_(x.view(kept.dtype)).view(x.dtype)
    return out
