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


def checksum(w: Tensor) -> Tensor | None:
    """A number for each row (or column, of a transposed W) that tells whether W was written to, by whatever means: the sum of its bits in 64-bit words,
    which passes over W at the speed of memory; None where W does not lie so. Followed by its version, which ordinary writes count up."""
    if type(w) not in (Tensor, torch.nn.Parameter) or w.ndim != 2:
        return None
    v = w if w.stride(-1) == 1 else w.mT
    words = 8 // v.element_size()
    if v.stride(-1) != 1 or v.shape[-1] % words or v.stride(0) % words or v.storage_offset() % words:
        return None
    sums = v.detach().view(torch.int64).sum(1)
    return torch.cat([sums, sums.new_tensor([0 if w.is_inference() else w._version])])
