"""Λ A Γ for many pairs of diagonals around one frozen matrix. Kept for the backward are the three, and nothing of the size of the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import transformed, written_out


def scaled_bases(a: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(r, N, m), entry (k, n, j) = rows[k, n] · a[k, 0, j] · columns[n, j].

    Args:
        a: (r, 1, m), frozen.  rows: (r, N).  columns: (N, m).
    """
    if transformed():
        return _ordinary(a, rows, columns)
    out: Tensor = _ScaledBases.apply(a, rows, columns)  # type: ignore[no-untyped-call]
    return out


def _ordinary(a: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return rows.unsqueeze(-1) * a * columns


def _again(ctx: Any, _: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
    a, rows, columns = ctx.saved_tensors
    return _ordinary(a, rows, columns), (None, rows, columns)


class _ScaledBases(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(a, rows, columns)
        return (rows.unsqueeze(-1) * a).mul_(columns)

    @staticmethod
    @written_out(_again)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, rows, columns = ctx.saved_tensors
        part = grad * a
        return None, torch.einsum("knj,nj->kn", part, columns), torch.einsum("knj,kn->nj", part, rows)
