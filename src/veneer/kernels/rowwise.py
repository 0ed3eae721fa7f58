"""y_i += s_k (x_i A_kᵀ) B_kᵀ, k the adapter of row i of a batch: the low-rank changes of all adapters as two batched products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .autograd import no_autocast
from .products import slow

Factors = tuple[Tensor, Tensor, float | Tensor]  # A (r, n_in), B (n_out, r), s

_FEW = 256  # tokens for which the products are taken in the factors' own dtype: there, casts cost more than the arithmetic


def add_rowwise(y: Tensor, x: Tensor, factors: Sequence[Factors], owner: Sequence[int]) -> Tensor:
    """y, which is written into, with what each row's adapter adds.

    Args:
        y: (batch, tokens, n_out), contiguous;  x: (batch, tokens, n_in).
        factors: of each adapter; their ranks may differ.
        owner: which adapter each row has, -1 for none.
    """
    rows = sorted((i for i, k in enumerate(owner) if k >= 0), key=owner.__getitem__)
    if not rows:
        return y
    used = list(dict.fromkeys(owner[i] for i in rows))
    each, left = divmod(len(rows), len(used))
    if left or any(owner[rows[i * each]] != k or owner[rows[(i + 1) * each - 1]] != k for i, k in enumerate(used)):
        used, each = [owner[i] for i in rows], 1  # of unequal shares: each row by itself
    every = rows == list(range(len(owner)))
    at = None if every else torch.tensor(rows, device=x.device)
    z = x if at is None else x.index_select(0, at)
    own = slow(y) or (not torch.is_grad_enabled() and x.device.type == "cpu" and x.numel() <= _FEW * x.shape[-1])
    dtype = (torch.float32 if slow(y) else torch.promote_types(factors[used[0]][0].dtype, y.dtype)) if own else y.dtype
    a, up, scale = _stacked([factors[k] for k in used], dtype)
    with no_autocast(x.device.type):
        h = torch.bmm(z.reshape(len(used), -1, z.shape[-1]).to(dtype), a.mT)
        if isinstance(scale, Tensor):
            h, scale = h * scale.to(dtype), 1.0
        if at is None and not own:
            y.view(len(used), -1, y.shape[-1]).baddbmm_(h, up.mT, alpha=scale)
            return y
        d = torch.bmm(h, up.mT).view(len(rows), *y.shape[1:])
        if at is None:
            return y.add_(d, alpha=scale)
        return y.index_add_(0, at, d.to(y.dtype), alpha=scale)


def _stacked(factors: Sequence[Factors], dtype: torch.dtype) -> tuple[Tensor, Tensor, float | Tensor]:
    """A (k, r, n_in), B (k, n_out, r), and s: one number, or (k, 1, 1). Smaller ranks are filled with zeros."""
    r = max(a.shape[0] for a, _, _ in factors)
    downs = [a if a.shape[0] == r else F.pad(a, (0, 0, 0, r - a.shape[0])) for a, _, _ in factors]
    ups = [b if b.shape[1] == r else F.pad(b, (0, r - b.shape[1])) for _, b, _ in factors]
    scales = [s for _, _, s in factors]
    first = scales[0]
    if isinstance(first, Tensor) or any(isinstance(s, Tensor) or s != first for s in scales):
        scale: float | Tensor = torch.stack([torch.as_tensor(s, dtype=torch.float32, device=downs[0].device) for s in scales]).view(
            -1, 1, 1
        )
    else:
        scale = first
    return _one(downs).to(dtype), _one(ups).to(dtype), scale


def _one(tensors: Sequence[Tensor]) -> Tensor:
    dtype = tensors[0].dtype
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack([t if t.dtype is dtype else t.to(dtype) for t in tensors])
