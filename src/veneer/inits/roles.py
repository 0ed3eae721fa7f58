"""Layers of one role in different blocks, and the basis that their weights have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor


def category(name: str) -> str:
    """The role of a module in its block: its name and that of the module it is in, unless that is a number."""
    parts = name.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    return "attention_output" if parts[-3:] == ["attention", "output", "dense"] else f"{parts[-2]}_{parts[-1]}"


def block_of(name: str, otherwise: int) -> int:
    """The number of the block a module is in: after `layers`, or the first there is."""
    parts = name.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return int(next((p for p in [*after, *parts] if p.isdigit()), otherwise))


def common_basis(weights: Sequence[Tensor], alpha: float) -> Tensor:
    """V (n_in, n_in) for weights (n_out, n_in) each, in their dtype."""
    stacked = torch.cat(list(weights))
    if stacked.shape[0] < stacked.shape[1]:
        right: Tensor = torch.linalg.svd(stacked, full_matrices=True).Vh
        return right.T
    q, r = torch.linalg.qr(stacked)
    eye, mean = torch.eye(r.shape[1]), torch.zeros(r.shape[1], r.shape[1])
    for part in q.split([w.shape[0] for w in weights]):
        mean += torch.linalg.inv(part.T @ part + alpha * eye)
    basis: Tensor = r.T @ torch.linalg.eigh(mean / len(weights)).eigenvectors
    return basis


def solver(v: Tensor) -> Callable[[Tensor], Tensor]:
    """W -> W V⁻ᵀ in float64; V is factored once for all layers that share it."""
    device = torch.device("cpu") if v.device.type == "mps" else v.device
    v = v.detach().to(device, torch.float64)
    lu, pivots, singular = torch.linalg.lu_factor_ex(v)
    inverse = torch.linalg.pinv(v, rtol=1e-6) if int(singular) else None

    def solve(w: Tensor) -> Tensor:
        right = w.T.to(device, torch.float64)
        out = torch.linalg.lu_solve(lu, pivots, right) if inverse is None else inverse @ right
        return cast(Tensor, out.T)

    return solve


class Places:
    """Where a sparse matrix has entries, beside the diagonal: drawn for one role after another from one generator, when the first is asked for."""

    def __init__(self, rate: float, seed: int, sides: Mapping[str, int]) -> None:
        self.rate, self.seed, self.sides = rate, seed, sides
        self.drawn: dict[str, Tensor] = {}

    @staticmethod
    def number(rate: float, n: int) -> int:
        there = n * n - n
        return max(min(int(n * n * rate), there), 1 if rate > 0 and there else 0)

    def count(self, n: int) -> int:
        return self.number(self.rate, n)

    def of(self, role: str) -> Callable[[Tensor], Tensor]:
        def fill(t: Tensor) -> Tensor:
            if not self.drawn:
                generator = torch.Generator().manual_seed(self.seed)
                for name, n in self.sides.items():
                    if k := self.count(n):
                        at = torch.randperm(n * n - n, generator=generator)[:k]
                        i, j = at // (n - 1), at % (n - 1)
                        self.drawn[name] = torch.stack([i, j + (j >= i)])  # the diagonal is passed over
            return t.copy_(self.drawn.pop(role)) if t.numel() else t

        return fill
