"""What a start is: first values of LoRA's factors, from the frozen weight and, for some, from data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Weight = Callable[[], Tensor]


@dataclass(frozen=True)
class Start:
    """First values of A (r, n_in) and B (n_out, r).

    Attributes:
        A0, B0: if given, the change is counted from them: D = s (B A - B0 A0), so the frozen weight stays as it is
            and the start is the identity.
        base: if given, the weight that the start is defined on (LoftQ's dequantised one), which takes the frozen one's place.
    """

    A: Tensor
    B: Tensor
    A0: Tensor | None = None
    B0: Tensor | None = None
    base: Tensor | None = None


def counted(a: Tensor, b: Tensor) -> Start:
    """A start whose change is counted from itself."""
    return Start(a, b, a.clone(), b.clone())


def split(u: Tensor, s: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A = √(S / s) V, B = U √(S / s): so that s · B A = U S V.   u (n_out, r), s (r,), v (r, n_in).

    Where S is zero, A has V itself, as with both zero neither would get a gradient.
    """
    root = (s / abs(scaling)).sqrt()
    return torch.where(root > 0, root, 1.0).unsqueeze(1) * v, (u * root) * math.copysign(1.0, scaling)


def wide(w: Tensor) -> Tensor:
    """The weight in float32, or float64 if it is that."""
    return w.detach() if w.dtype == torch.float64 else w.detach().to(torch.float32)


def kaiming(*shape: int) -> Tensor:
    """Kaiming-uniform with a = √5, over the last dimension."""
    return nn.init.kaiming_uniform_(torch.empty(*shape), a=math.sqrt(5))


def kaiming_(t: Tensor) -> Tensor:
    """Fill a tensor so, in place."""
    return nn.init.kaiming_uniform_(t, a=math.sqrt(5))


def singular(w: Tensor, k: int, last: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest (or smallest) singular triples of w (n_out, n_in): u (n_out, k), s (k,) falling, v (k, n_in).

    From the eigenvectors of the smaller Gram matrix in float64: quicker than an SVD in float32, and more exact for every value
    above 1e-8 of the largest.
    """
    m = (w.cpu() if w.device.type == "mps" else w).double()  # MPS has no float64
    tall = m.shape[0] > m.shape[1]
    flat = m.T if tall else m
    _, vectors = torch.linalg.eigh(flat @ flat.T)  # by rising value
    short = vectors[:, :k].flip(1) if last else vectors.flip(1)[:, :k]
    long, upper = torch.linalg.qr(flat.T @ short)  # orthogonal already; QR gives unit columns where s is 0, too
    s = upper.diagonal()
    long = long * torch.where(s < 0, -1.0, 1.0)
    u, v = (long, short) if tall else (short, long)
    return u.to(w), s.abs().to(w), v.T.contiguous().to(w)


def sketched(w: Tensor, k: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """About the k largest singular triples, shaped as by `singular`, from 2k random directions and `niter` power iterations.

    The directions come from a generator of their own, so that a weight has one answer, at whatever time and on whatever device.
    Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    width = min(2 * k, *w.shape)
    sketch = torch.randn(w.shape[1], width, generator=torch.Generator().manual_seed(0)).to(w)
    q, _ = torch.linalg.qr(w @ sketch)
    for _ in range(niter):
        q, _ = torch.linalg.qr(w @ torch.linalg.qr(w.T @ q)[0])
    u, s, v = torch.linalg.svd(q.T @ w, full_matrices=False)
    return (q @ u)[:, :k], s[:k], v[:k]
