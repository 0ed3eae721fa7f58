"""Row norms of W + s B A without forming B A."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 4096 * 1024  # entries of a 16-bit W that are widened at a time


def row_norm_sq(w: Tensor, a: Tensor, up: Tensor, scale: float | Tensor) -> Tensor:
    """‖w_i + s b_i A‖² = ‖w_i‖² + 2 s b_i · (A w_iᵀ) + s² b_i (A Aᵀ) b_iᵀ.

    Args:
        w: (n_out, n_in);  a: (r, n_in);  up: B (n_out, r).

    Returns:
        (n_out,) in float32, or float64 for float64 weights; never negative.
    """
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    a, up = a.to(wide), up.to(wide) * scale
    gram = a @ a.mT
    step = max(_CHUNK // max(w.shape[1], 1), 1) if w.dtype != wide else w.shape[0]
    out = []
    for rows, b in zip(w.split(step), up.split(step), strict=True):
        rows = rows.to(wide)
        out.append(rows.square().sum(1) + ((2 * (rows @ a.mT) + b @ gram) * b).sum(1))
    return torch.cat(out).clamp_min(0) if out else up.new_zeros(0)
