"""y = x (W + D)ᵀ + b, D zero but for some entries: one autograd function that keeps x and those entries, and no matrix of W's size."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .autograd import autocast_dtype, by_hand, no_autocast, stand_in, transformed, written_out
from .products import LOW, linear, mm

_FEW = 8  # rows for which the entries are gone through one by one
_MKL = torch.backends.mkl.is_available()
_PART = 160  # tokens that are multiplied at a time, so that their transposes stay in the cache
_PARTS = 8  # so many are turned over in one pass, which several threads share
_THIN = 0.05  # the share of entries below which a product of sparse matrices beats a dense one on the CPU

Shape = tuple[int, int]


def sparse_linear(x: Tensor, w: Tensor | None, b: Tensor | None, index: Tensor, values: Tensor, shape: Shape) -> Tensor:
    """A frozen linear layer with some entries changed; without w, the changes alone.

    In float16 and bfloat16 the two products stay apart: added to W, small values would be rounded away.

    Args:
        x: (..., n_in);  w: W (n_out, n_in), frozen, or autograd's own functions are taken;  b: (n_out,) or None.
        index: (k,) positions in the flattened W, none twice;  values: (k,), in any floating dtype.
        shape: (n_out, n_in).
    """
    if not by_hand(w, values):
        return reference.sparse_linear(x, w, b, index, values, shape)
    kind = x.device.type
    dtype = autocast_dtype(kind)
    with no_autocast(kind):
        if dtype is not None:
            x, w, b = (t if t is None else t.to(dtype) for t in (x, w, b))  # type: ignore[assignment]
        out: Tensor = _SparseLinear.apply(x.reshape(-1, x.shape[-1]), w, b, index.long(), values, shape)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], shape[0])


def _again(ctx: Any, dy: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
    x, w, index, values = ctx.saved_tensors
    b = stand_in(dy.shape[-1], dy, ctx.b_dtype)
    return reference.sparse_linear(x, w, b, index, values, ctx.shape), (x, None, b, None, values, None)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, index: Tensor, values: Tensor, shape: Shape) -> Tensor:
        ctx.save_for_backward(x, w, index, values)
        ctx.shape, ctx.b_dtype = shape, None if b is None else b.dtype
        if w is None:
            y = _times(x, index, values, shape)
            return y if b is None else y.add_(b)
        if _apart(x):
            return linear(x, w, b).add_(_times(x, index, values, shape))
        return F.linear(x, _whole(w, index, values), b)

    @staticmethod
    @written_out(_again)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, index, values = ctx.saved_tensors
        dx = db = dvalues = None
        if ctx.needs_input_grad[0]:
            if w is not None and not _few(x):  # also in 16 bits: what W + D rounds away of D is less than what dx itself is rounded by
                dx = mm(dy, _whole(w, index, values))
            else:
                dx = _times(dy, _turned(index, ctx.shape), values, ctx.shape[::-1])
                dx = dx if w is None else mm(dy, w).add_(dx)
        if ctx.needs_input_grad[2]:
            db = dy.sum(0).to(ctx.b_dtype)
        if ctx.needs_input_grad[4]:
            dvalues = _at(dy, x, index, ctx.shape).to(values.dtype)
        return dx, None, db, None, dvalues, None


def sparse_left(index: Tensor, values: Tensor, shape: Shape, z: Tensor) -> Tensor:
    """D z, D (n, m) = shape zero but for `values` (k,) at `index` (k,), z (m, tokens): what `sparse_linear` does without w, where z and the result
    lie the way products of sparse matrices want them."""
    if transformed():
        return reference.sparse_linear(z.mT, None, None, index, values, shape).mT
    with no_autocast(z.device.type):
        out: Tensor = _SparseLeft.apply(index.long(), values, shape, z)  # type: ignore[no-untyped-call]
    return out


def _again_left(ctx: Any, _: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
    index, values, z = ctx.saved_tensors
    return reference.sparse_linear(z.mT, None, None, index, values, ctx.shape).mT, (None, values, None, z)


class _SparseLeft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, values: Tensor, shape: Shape, z: Tensor) -> Tensor:
        ctx.save_for_backward(index, values, z)
        ctx.shape = shape
        return _left(z, index, values, shape)

    @staticmethod
    @written_out(_again_left)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, values, z = ctx.saved_tensors
        dvalues = _at(grad.T, z.T, index, ctx.shape).to(values.dtype) if ctx.needs_input_grad[1] else None
        dz = _left(grad, _turned(index, ctx.shape), values, ctx.shape[::-1]) if ctx.needs_input_grad[3] else None
        return None, dvalues, None, dz


def _whole(w: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """W + D."""
    m = torch.empty(w.shape, dtype=w.dtype, device=w.device).copy_(w)
    flat = m.view(-1)
    flat[index] += values.to(w.dtype)
    return m


def _apart(x: Tensor) -> bool:
    """Whether x Wᵀ and x Dᵀ are two products."""
    return x.dtype in LOW or _few(x)


def _few(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and len(x) <= _FEW


def _thin(x: Tensor, index: Tensor, shape: Shape) -> bool:
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not _MKL or len(index) >= _THIN * shape[0] * shape[1]:
        return False
    _no_word_of_beta()
    return True


@functools.cache
def _no_word_of_beta() -> None:
    """Torch warns once of sparse matrices; here they are used for two products that are tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _compressed(torch.zeros(1, dtype=torch.long), torch.zeros(1), (1, 1))


def _rows_and_columns(index: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    return index // shape[1], index % shape[1]


def _turned(index: Tensor, shape: Shape) -> Tensor:
    """Where the entries at these positions are in the transpose."""
    i, j = _rows_and_columns(index, shape)
    return j * shape[0] + i


def _at_least_32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in LOW else dtype


def _wide(x: Tensor) -> Tensor:
    return x.to(_at_least_32(x.dtype))


def _parts(x: Tensor) -> Iterator[Tensor]:
    """x (tokens, n) in order, as views (parts, tokens of each, n)."""
    for some in x.split(_PARTS * _PART):
        whole = len(some) // _PART * _PART
        if whole:
            yield some[:whole].unflatten(0, (-1, _PART))
        if whole < len(some):
            yield some[whole:].unsqueeze(0)


def _columns(x: Tensor) -> Tensor:
    """Of parts (parts, tokens, n) their transposes, in at least 32 bits: the layout in which the library of sparse products is fastest."""
    return _wide(x.transpose(1, 2).contiguous())


def _order(at: Tensor) -> Tensor | None:
    """What sorts these positions; None if they are in order, as they mostly are: seeing that is a tenth of sorting."""
    return None if bool((at[1:] > at[:-1]).all()) else torch.argsort(at)


def _times(x: Tensor, index: Tensor, values: Tensor, shape: Shape) -> Tensor:
    """x Dᵀ, in the dtype of x."""
    if not _thin(x, index, shape):
        return _left(x.T, index, values, shape).T
    d, y = _compressed(index, values.to(_at_least_32(x.dtype)), shape)[0], x.new_empty(len(x), shape[0])
    for out, some in zip(_parts(y), _parts(x), strict=True):
        columns = _columns(some)
        made = columns.new_empty(len(columns), shape[0], columns.shape[2])
        for one, part in zip(made, columns, strict=True):
            torch.mm(d, part, out=one)
        out.copy_(made.to(x.dtype).transpose(1, 2))
    return y


def _left(z: Tensor, index: Tensor, values: Tensor, shape: Shape) -> Tensor:
    """D z, z (m, tokens), in the dtype of z."""
    n, m = shape
    if _few(z.T):
        w, (i, j) = _wide(z), _rows_and_columns(index, shape)
        return w.new_zeros(n, w.shape[1]).index_add_(0, i, w[j] * values.to(w.dtype).unsqueeze(1)).to(z.dtype)
    if _thin(z, index, shape):
        return (_compressed(index, values.to(_at_least_32(z.dtype)), shape)[0] @ _wide(z.contiguous())).to(z.dtype)
    return mm(z.new_zeros(n * m).index_put_((index,), values.to(z.dtype)).view(n, m), z)


def _compressed(index: Tensor, values: Tensor, shape: Shape) -> tuple[Tensor, Tensor | None]:
    """D as torch's matrix of compressed rows, and what has sorted the positions where they were out of order."""
    if (order := _order(index)) is not None:
        index, values = index[order], values[order]
    n, m = shape
    starts = torch.searchsorted(index, torch.arange(0, n * m + 1, m, device=index.device))
    return torch.sparse_csr_tensor(starts, index % m, values, shape, check_invariants=False), order


def _at(dy: Tensor, x: Tensor, index: Tensor, shape: Shape) -> Tensor:
    """The entries of dyᵀ x at these positions, (k,)."""
    if _few(x):
        i, j = _rows_and_columns(index, shape)
        return (_wide(dy)[:, i] * _wide(x)[:, j]).sum(0)
    if _thin(x, index, shape):
        sums, order = _compressed(index, x.new_zeros(len(index), dtype=_at_least_32(x.dtype)), shape)
        for lefts, rights in zip(_parts(dy), _parts(x), strict=True):
            for left, right in zip(_columns(lefts), _columns(rights), strict=True):
                sums = torch.sparse.sampled_addmm(sums, left, right.T)
        some = sums.values()
        return some if order is None else torch.empty_like(some).index_copy_(0, order, some)
    return mm(dy.mT, x).flatten()[index]
