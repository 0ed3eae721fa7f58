"""Starts from a decomposition of the frozen weight: PiSSA, OLoRA, MiCA."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Start, counted, singular, sketched, split, wide


def pissa(w: Tensor, r: int, scaling: float, niter: int | None) -> Start:
    """The r largest singular triples of W. `niter`: by a randomised method with so many iterations. Meng et al. 2024, arXiv:2404.02948."""
    full = wide(w)
    a, b = split(*(singular(full, r) if niter is None else sketched(full, r, niter)), scaling)
    return counted(a, b)


def olora(w: Tensor, r: int) -> Start:
    """B, A = the first r columns of Q and rows of R in W = Q R. Büyükakyüz 2024, arXiv:2406.01775.

    The first columns of Q follow from those of W alone, and then R = Qᵀ W: no more of the decomposition is computed.
    """
    full = wide(w)
    q, _ = torch.linalg.qr(full[:, :r])
    return counted(q.T @ full, q.contiguous())


def mica(w: Tensor, r: int) -> Start:
    """B = the r last left singular vectors of W, frozen; A = 0. arXiv:2604.01694."""
    u, _, _ = singular(wide(w), r, last=True)
    return Start(u.new_zeros(r, w.shape[1]), u.contiguous())
