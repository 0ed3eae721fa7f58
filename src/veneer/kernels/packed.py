"""x Wᵀ with a W that is stored packed: it is multiplied by its storage, dequantised again in the backward, and never kept whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .autograd import autocast_dtype, no_autocast, written_out
from .products import linear, mm


class Packed(Protocol):
    """A packed weight W (n_out, n_in)."""

    def times(self, x: Tensor) -> Tensor:
        """x Wᵀ in the dtype of x; called without gradients."""

    def whole(self, dtype: torch.dtype) -> Tensor:
        """W in a floating dtype, made for this one use."""


def product(x: Tensor, w: Tensor | Packed, b: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, without gradients for a packed W."""
    if isinstance(w, Tensor):
        return linear(x, w, b)
    y = w.times(x)
    return y if b is None else y + b.to(y.dtype)


def packed_linear(x: Tensor, w: Packed) -> Tensor:
    """x Wᵀ; its gradient for x is dy W. What the storage itself rounds in its product counts as not rounded.

    Args:
        x: (..., n_in);  w: it gets no gradient.
    """
    kind = x.device.type
    if (dtype := autocast_dtype(kind)) is not None:
        x = x.to(dtype)
    with no_autocast(kind):
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _PackedLinear.apply(x, w)  # type: ignore[no-untyped-call]
            return y
        with torch.no_grad():
            return w.times(x)


def _again(ctx: Any, dy: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
    w = ctx.w.whole(dy.dtype)
    x = dy.new_zeros(*dy.shape[:-1], w.shape[1]).requires_grad_()  # in its place: dy W does not depend on it
    return F.linear(x, w), (x, None)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Packed) -> Tensor:
        ctx.w, ctx.shape = w, x.shape
        return w.times(x)

    @staticmethod
    @written_out(_again)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return mm(dy.reshape(-1, dy.shape[-1]), ctx.w.whole(dy.dtype)).view(ctx.shape), None
