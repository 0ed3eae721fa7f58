"""How much each trained number matters: |p · ∂loss/∂p|, smoothed, times how much it varies. Zhang et al. 2023, arXiv:2303.10512, eq. 8-10."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LoadError

_AVERAGES = ("mean", "spread")


class Importance:
    """The running importance of the numbers of some tensors, in the order in which they are given at every update.

    Args:
        beta1, beta2: smoothing of the sensitivity, and of its deviation from the smoothed one.
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.mean: list[Tensor] = []
        self.spread: list[Tensor] = []

    def update(self, tensors: Sequence[Tensor]) -> bool:
        """Take in the gradients of one step; those without a gradient stay as they were. Returns whether there were any."""
        at = [i for i, t in enumerate(tensors) if t.grad is not None and t.numel()]
        if not at:
            return False
        if not self.mean:
            self.mean, self.spread = [torch.zeros_like(t) for t in tensors], [torch.zeros_like(t) for t in tensors]
        now = torch._foreach_mul([tensors[i] for i in at], [g for i in at if (g := tensors[i].grad) is not None])
        torch._foreach_abs_(now)
        mean, spread = [self.mean[i] for i in at], [self.spread[i] for i in at]
        torch._foreach_lerp_(mean, now, 1 - self.beta1)
        torch._foreach_sub_(now, mean)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(spread, now, 1 - self.beta2)
        return True

    def named(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The averages, by the names of the tensors."""
        each = zip(names, self.mean, self.spread, strict=False)  # none before the first update
        return {f"{n}.{what}": t for n, *pair in each for what, t in zip(_AVERAGES, pair, strict=True)}

    def take(self, given: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on with averages that `named` gave, if it gave any.

        Raises:
            LoadError: if one is missing or is not of its tensor's shape.
        """
        keys = [f"{n}.{what}" for n in tensors for what in _AVERAGES]
        if not any(k in given for k in keys):
            return
        for key in keys:
            held, want = given.get(key), tensors[key.rpartition(".")[0]]
            if held is None or held.shape != want.shape:
                what = f"has shape {tuple(held.shape)}" if held is not None else "is missing"
                raise LoadError(f"The state's {key!r}, shape {tuple(want.shape)}, {what}: it is damaged, or of other layers. Take another.")
        self.mean, self.spread = ([given[f"{n}.{what}"].to(t, copy=True) for n, t in tensors.items()] for what in _AVERAGES)

    def scores(self) -> Sequence[Tensor]:
        """The importance of every number, of each tensor; empty before the first update."""
        return torch._foreach_mul(self.mean, self.spread) if self.mean else []


def row_means(matrices: Sequence[Tensor], device: torch.device) -> Tensor:
    """The mean of every row of several matrices, one after another; matrices of one width go in one reduction."""
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, t in enumerate(matrices):
        alike[t.shape[1], t.device].append(i)
    out: list[Tensor] = [*matrices]
    for at in alike.values():
        means = torch.cat([matrices[i] for i in at]).mean(1).split([matrices[i].shape[0] for i in at])
        for i, m in zip(at, means, strict=True):
            out[i] = m.to(device)
    return torch.cat(out)


def by_rank(scores: Sequence[Tensor], n: int) -> Tensor:
    """The importance of every rank of n layers: of its factor, plus the means over its row of A and its column of B.

    Args:
        scores: those of all A, then of all B, then of all factors.
    """
    device = scores[2 * n].device
    of_e = torch.cat([e.flatten().to(device) for e in scores[2 * n :]])
    return of_e + row_means(scores[:n], device) + row_means([b.mT for b in scores[n : 2 * n]], device)
