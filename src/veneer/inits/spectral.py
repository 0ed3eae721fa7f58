"""Starts from a decomposition of the frozen weight: PiSSA, OLoRA, MiCA."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Start, counted, split, wide


def pissa(w: Tensor, r: int, scaling: float, niter: int | None) -> Start:
    """The r largest singular triples of W. `niter`: by a randomised method with so many iterations. Meng et al. 2024, arXiv:2404.02948."""
    if niter is None:
        u, s, v = torch.linalg.svd(wide(w), full_matrices=False)
        u, s, v = u[:, :r], s[:r], v[:r]
    else:
        u, s, vt = torch.svd_lowrank(wide(w), q=r, niter=niter)
        v = vt.T
    a, b = split(u, s, v, scaling)
    return counted(a, b)


def olora(w: Tensor, r: int) -> Start:
    """B, A = the first r columns of Q and rows of R in W = Q R. Büyükakyüz 2024, arXiv:2406.01775."""
    q, upper = torch.linalg.qr(wide(w))
    return counted(upper[:r].contiguous(), q[:, :r].contiguous())


def mica(w: Tensor, r: int) -> Start:
    """B = the r last left singular vectors of W, frozen; A = 0. arXiv:2604.01694."""
    u, _, _ = torch.linalg.svd(wide(w), full_matrices=False)
    return Start(torch.zeros(r, w.shape[1]), u[:, -r:].contiguous())
