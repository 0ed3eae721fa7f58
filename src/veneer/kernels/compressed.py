"""h = x Aᵀ that keeps, for the gradient of A, only what each group of inputs is along one direction. Miles et al. 2024, arXiv:2405.17991."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .autograd import no_autocast, written_out


def grouped(x: Tensor, size: int) -> Tensor:
    """x (..., n) in groups of `size`, the last one filled with zeros: (tokens, groups, size)."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = F.pad(rows, (0, -x.shape[-1] % size)).unflatten(1, (-1, size))
    return out


def compressed_linear(x: Tensor, a: Tensor, v: Tensor, scale: float) -> Tensor:
    """x Aᵀ, in the backward of which A sees scale · v (v · x_g) in the place of every group x_g of x.

    Args:
        x: (..., n_in);  a: A (r, n_in) in the dtype of x;  v: (size,) a unit vector.
    """
    out: Tensor = _Compressed.apply(x, a, v, scale)  # type: ignore[no-untyped-call]
    return out


class _Compressed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, v: Tensor, scale: float) -> Tensor:
        with no_autocast(x.device.type):
            v = v.to(x.dtype)
            ctx.save_for_backward(grouped(x, len(v)) @ v, a, v)
            ctx.scale, ctx.shape = scale, x.shape
            return F.linear(x, a)

    @staticmethod
    @written_out(None)
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        along, a, v = ctx.saved_tensors  # (tokens, groups)
        rows = dh.reshape(-1, dh.shape[-1])
        dx = (rows @ a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        da = None
        if ctx.needs_input_grad[1]:  # rowsᵀ · (along ⊗ v), the groups never written out
            da = ((rows.mT @ along).unsqueeze(-1) * (v * ctx.scale)).flatten(1)[:, : a.shape[1]]
        return dx, da, None, None
