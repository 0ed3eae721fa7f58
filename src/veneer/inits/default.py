"""The starts without the weight: A random and B zero, or both random."""

from __future__ import annotations

import torch

from .base import Start, kaiming


def default(r: int, n_out: int, n_in: int, kind: bool | str, embedding: bool) -> Start:
    """True: A Kaiming-uniform, B zero (an embedding's A zero, B normal). "gaussian": A normal with deviation 1 / r. False: none is zero."""
    if embedding:
        a = torch.zeros(r, n_in) if kind is not False else torch.randn(r, n_in)
        return Start(a, torch.randn(n_out, r))
    if kind == "gaussian":
        return Start(torch.randn(r, n_in) / r, torch.zeros(n_out, r))
    a = kaiming(r, n_in)
    return Start(a, torch.zeros(n_out, r) if kind is True else kaiming(n_out, r))


def orthogonal(r: int, n_out: int, n_in: int) -> Start:
    """A and B mixed from the odd and the even rows of one random orthogonal matrix: both are full, and B A = 0.

    r has to be even, which the caller has checked.
    """
    q, _ = torch.linalg.qr(torch.randn(r, r))
    a = (torch.randn(n_in, r // 2) @ q[1::2]).T / 10
    b = torch.randn(n_out, r // 2) @ q[0::2] / 10
    return Start(a.contiguous(), b)
