"""Singular values of changes: of products of two thin factors without ever forming the product, and of whole matrices no further than needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

_SMALL = 512  # sides up to which a matrix is decomposed whole
_LOST = 1e-13  # share of the squares below which float32 holds no difference


def wide(t: Tensor) -> Tensor:
    """In float64, where decompositions lose nothing that float32 holds; float32 where the device has no other (MPS)."""
    return t.detach().to(torch.float32 if t.device.type == "mps" else torch.float64)


@dataclass(frozen=True, eq=False)
class Thin:
    """U S V, the leading part of a matrix, or of a stack of them.

    Attributes:
        u: (..., n_out, k) with orthonormal columns;  v: (..., k, n_in) with orthonormal rows.
        s: (..., k), falling.
        left: the sum of the squares of what is not in U S V, all matrices together.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    left: float = 0.0

    @property
    def total(self) -> float:
        """The sum of the squares of the whole."""
        return float(self.s.square().sum()) + self.left

    def rank(self, wanted: float) -> int:
        """The rank that is meant: a whole number as it is, as far as there are singular values; a share in (0, 1] of the sum of the squares as
        the least rank, 1 or more, that keeps it in every matrix of a stack. The share 1.0 keeps whatever float32 can tell from nothing."""
        check_rank(wanted)
        if isinstance(wanted, int):
            return min(wanted, self.s.shape[-1])
        squares = self.s.square()
        rest = squares.flip(-1).cumsum(-1).flip(-1)  # what is lost with the ranks 0, 1, …
        total = rest[..., :1] + self.left
        enough = rest + self.left <= (1 - wanted + _LOST) * total
        needed = torch.where(enough.any(-1), enough.int().argmax(-1), self.s.shape[-1])
        return max(int(needed.max()), 1)

    def error(self, rank: int) -> float:
        """‖what the first `rank` triples leave out‖ / ‖the whole‖."""
        total = self.total
        return ((float(self.s[..., rank:].square().sum()) + self.left) / total) ** 0.5 if total else 0.0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(U S, V) of the first `rank` triples."""
        return self.u[..., :rank] * self.s[..., None, :rank], self.v[..., :rank, :]


def check_rank(rank: float) -> None:
    """Raise ConfigError for what is neither a positive whole number nor a share in (0, 1]."""
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise ConfigError(
            f"The rank is a positive int, or a float in (0, 1]: the share of the squared singular values to keep; got {rank!r}."
        )
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ConfigError(f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}.")
    if rank == 0:
        raise ConfigError("Passing a rank of 0 doesn't make sense, please pass a valid value.")
    if rank < 0:
        raise ConfigError(f"The rank has to be positive, got {rank}.")


def of_product(up: Tensor, down: Tensor, driver: str | None = None) -> Thin:
    """The whole decomposition of up @ down: two QR decompositions of thin matrices and an SVD of k x k.

    Args:
        up: (..., n_out, k);  down: (..., k, n_in).
        driver: of the SVD on CUDA, as in `torch.linalg.svd`.
    """
    qu, ru = torch.linalg.qr(wide(up))
    qv, rv = torch.linalg.qr(wide(down).mT)
    u, s, v = torch.linalg.svd(ru @ rv.mT, full_matrices=False, driver=driver if up.is_cuda else None)
    return Thin((u.mT @ qu.mT).mT, s, v @ qv.mT)  # Q lies column by column: its transpose multiplies six times as fast


def norm_of_product(up: Tensor, down: Tensor) -> float:
    """‖up @ down‖, also where its parts nearly cancel."""
    return float((torch.linalg.qr(wide(up)).R @ torch.linalg.qr(wide(down).mT).R.mT).norm())


def of_matrix(d: Tensor, rank: float) -> Thin:
    """So much of the decomposition of d (..., n_out, n_in) as `rank` asks for (see `Thin.rank`).

    Small matrices, and ranks that are no small part of the sides, take a whole SVD; others a subspace that is multiplied by d dᵀ until it no longer
    gains (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4). What is left out is measured, not estimated.
    """
    check_rank(rank)
    if d.ndim > 2:
        parts = [of_matrix(m, rank) for m in d]
        k = max(p.s.shape[-1] for p in parts)
        if any(p.s.shape[-1] < k for p in parts):
            parts = [of_matrix(m, k) for m in d]
        u, s, v = (torch.stack([getattr(p, n) for p in parts]) for n in "usv")
        return Thin(u, s, v, sum(p.left for p in parts))
    side = min(d.shape)
    k = rank if isinstance(rank, int) else 16
    while side > _SMALL and 4 * k < side:
        found = _leading(d, k)
        if isinstance(rank, int) or found.rank(rank) < found.s.shape[-1]:
            return found
        k *= 2
    u, s, v = torch.linalg.svd(wide(d), full_matrices=False)
    return Thin(u, s, v)


def _leading(d: Tensor, k: int) -> Thin:
    """The k leading triples."""
    d = d.detach() if d.dtype == torch.float64 else d.detach().float()
    width = min(2 * k + 8, *d.shape)
    q = torch.randn(d.shape[1], width, generator=torch.Generator().manual_seed(0)).to(d)
    q, before = torch.linalg.qr(d @ q)[0], 0.0
    for _ in range(50):
        low = q.mT @ d
        now = float(torch.linalg.svdvals(low)[:k].square().sum())
        if now - before <= 1e-6 * now:
            break
        before = now
        q = torch.linalg.qr(d @ torch.linalg.qr(low.mT)[0])[0]
    u, s, v = torch.linalg.svd(q.mT @ d, full_matrices=False)
    noise = 2e-6 if d.dtype == torch.float32 else 0.0  # below that it is rounding
    s = torch.where(s > noise * s[0], s, 0)
    u, s, v = (q @ u)[:, :k], s[:k], v[:k]
    left, whole = (float(torch.linalg.vector_norm(m, dtype=torch.float64)) for m in (d - (u * s) @ v, d))
    return Thin(wide(u), wide(s), wide(v), left**2 if left > noise * whole else 0.0)
