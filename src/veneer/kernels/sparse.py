"""y = x (W + D)ᵀ + b, D zero but for some entries: one autograd function that keeps x and those entries, and no matrix of W's size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import reference

_LOW = (torch.float16, torch.bfloat16)


def sparse_linear(x: Tensor, w: Tensor | None, b: Tensor | None, index: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A frozen linear layer with some entries changed; without w, the changes alone.

    In float16 and bfloat16 the two products stay apart: added to W, small values would be rounded away.

    Args:
        x: (..., n_in);  w: W (n_out, n_in), frozen: it never gets a gradient;  b: (n_out,) or None.
        index: (k,) positions in the flattened W, none twice;  values: (k,), in any floating dtype.
        shape: (n_out, n_in).
    """
    if not all(type(t) in (Tensor, torch.nn.Parameter) for t in (w, values) if t is not None) and not torch.compiler.is_compiling():
        return reference.sparse_linear(x, w, b, index, values, shape)
    kind = x.device.type
    with torch.autocast(kind, enabled=False):
        if torch.is_autocast_enabled(kind):
            x, w, b = (t if t is None else t.to(torch.get_autocast_dtype(kind)) for t in (x, w, b))  # type: ignore[assignment]
        out: Tensor = _SparseLinear.apply(x, w, b, index.long(), values, shape)  # type: ignore[no-untyped-call]
    return out


def _placed(w: Tensor | None, index: Tensor, values: Tensor, x: Tensor, shape: tuple[int, int]) -> Tensor:
    """W + D, or D, in the dtype of x."""
    m = x.new_zeros(shape) if w is None else torch.empty(shape, dtype=x.dtype, device=x.device).copy_(w)
    m.view(-1).scatter_add_(0, index, values.to(x.dtype))
    return m


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, index: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, w, index, values)
        ctx.shape, ctx.b_dtype = shape, None if b is None else b.dtype
        if w is None or x.dtype not in _LOW:
            return F.linear(x, _placed(w, index, values, x, shape), b)
        return F.linear(x, w, b).add_(F.linear(x, _placed(None, index, values, x, shape)))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, index, values = ctx.saved_tensors
        dx = db = dvalues = None
        if ctx.needs_input_grad[0]:
            if w is None or x.dtype not in _LOW:
                dx = dy @ _placed(w, index, values, x, ctx.shape)
            else:
                dx = (dy @ w).add_(dy @ _placed(None, index, values, x, ctx.shape))
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[2]:
            db = rows.sum(0).to(ctx.b_dtype)
        if ctx.needs_input_grad[4]:
            dvalues = (rows.mT @ x.reshape(-1, x.shape[-1])).flatten()[index].to(values.dtype)
        return dx, None, db, None, dvalues, None
