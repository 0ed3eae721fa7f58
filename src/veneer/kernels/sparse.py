"""y = x (W + D)ᵀ + b, D zero but for some entries: one autograd function that keeps x and those entries, and no matrix of W's size."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import reference

_LOW = (torch.float16, torch.bfloat16)
_FEW = 8  # rows for which the entries are gone through one by one
_MKL = torch.backends.mkl.is_available()
_THIN = 0.05  # the share of entries below which a product of sparse matrices beats a dense one on the CPU

Shape = tuple[int, int]


def sparse_linear(x: Tensor, w: Tensor | None, b: Tensor | None, index: Tensor, values: Tensor, shape: Shape) -> Tensor:
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
        out: Tensor = _SparseLinear.apply(x.reshape(-1, x.shape[-1]), w, b, index.long(), values, shape)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], shape[0])


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, index: Tensor, values: Tensor, shape: Shape) -> Tensor:
        ctx.save_for_backward(x, w, index, values)
        ctx.shape, ctx.b_dtype = shape, None if b is None else b.dtype
        if w is None:
            y = _times(x, index, values, shape)
            return y if b is None else y.add_(b)
        if _apart(x):
            return F.linear(x, w, b).add_(_times(x, index, values, shape))
        return F.linear(x, _whole(w, index, values), b)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, index, values = ctx.saved_tensors
        dx = db = dvalues = None
        if ctx.needs_input_grad[0]:
            if w is not None and not _few(x):  # also in 16 bits: what W + D rounds away of D is less than what dx itself is rounded by
                dx = dy @ _whole(w, index, values)
            else:
                dx = _times(dy, index, values, ctx.shape, transposed=True)
                dx = dx if w is None else (dy @ w).add_(dx)
        if ctx.needs_input_grad[2]:
            db = dy.sum(0).to(ctx.b_dtype)
        if ctx.needs_input_grad[4]:
            dvalues = _at(dy, x, index, ctx.shape).to(values.dtype)
        return dx, None, db, None, dvalues, None


def _whole(w: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """W + D."""
    m = torch.empty(w.shape, dtype=w.dtype, device=w.device).copy_(w)
    m.view(-1).scatter_add_(0, index, values.to(w.dtype))
    return m


def _apart(x: Tensor) -> bool:
    """Whether x Wᵀ and x Dᵀ are two products."""
    return x.dtype in _LOW or _few(x)


def _few(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and len(x) <= _FEW


def _thin(x: Tensor, index: Tensor, shape: Shape) -> bool:
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not _MKL or len(index) >= _THIN * shape[0] * shape[1]:
        return False
    _no_word_of_beta()
    return True


def _rows_of(i: Tensor, j: Tensor, values: Tensor, shape: Shape) -> Tensor:
    """D as torch's matrix of compressed rows; i, j (k,) in order."""
    starts = F.pad(torch.bincount(i, minlength=shape[0]).cumsum(0), (1, 0))
    return torch.sparse_csr_tensor(starts, j, values, shape, check_invariants=False)


@functools.cache
def _no_word_of_beta() -> None:
    """Torch warns once of sparse matrices; here they are used for two products that are tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _rows_of(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(1), (1, 1))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _LOW else x


def _times(x: Tensor, index: Tensor, values: Tensor, shape: Shape, transposed: bool = False) -> Tensor:
    """x Dᵀ (or x D), in the dtype of x."""
    i, j = index // shape[1], index % shape[1]
    (n, m), (i, j) = (shape[::-1], (j, i)) if transposed else (shape, (i, j))
    if _few(x):
        z = _wide(x)
        return z.new_zeros(len(x), n).index_add_(1, i, z[:, j] * values.to(z.dtype)).to(x.dtype)
    if _thin(x, index, shape):
        z = _wide(x)
        order = torch.argsort(i * m + j)
        return (_rows_of(i[order], j[order], values.to(z.dtype)[order], (n, m)) @ z.T).to(x.dtype).T.contiguous()
    d = x.new_zeros(n, m)
    d.view(-1).scatter_add_(0, i * m + j, values.to(x.dtype))
    return x @ d.T


def _at(dy: Tensor, x: Tensor, index: Tensor, shape: Shape) -> Tensor:
    """The entries of dyᵀ x at these positions, (k,)."""
    i, j = index // shape[1], index % shape[1]
    if _few(x):
        return (_wide(dy)[:, i] * _wide(x)[:, j]).sum(0)
    if _thin(x, index, shape):
        order = torch.argsort(index)
        zero = _rows_of(i[order], j[order], _wide(x).new_zeros(len(index)), shape)
        some = torch.sparse.sampled_addmm(zero, _wide(dy).T.contiguous(), _wide(x).T.contiguous().T, beta=0.0).values()
        return torch.empty_like(some).index_copy_(0, order, some)
    return (dy.mT @ x).flatten()[index]
