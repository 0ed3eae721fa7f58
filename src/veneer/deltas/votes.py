"""Adding up changes after pruning them and letting them vote on signs: task arithmetic, TIES, DARE, under PEFT's names.

Each function is pure. Changes are tensors of one shape, one per task; weights (tasks,) may be negative. Random choices come from `generator`, or from
torch's global one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

from ..errors import ConfigError, PeftWarning, hint

Rows = Callable[[int, int], Tensor]  # rows i to j of a matrix that is never there as a whole
Voting = Literal["total", "frequency"]
KINDS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_BLOCK = 1 << 22  # entries that are formed at a time


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """The weights (tasks,), shaped so that they multiply stacked changes (tasks, ...)."""
    return weights.reshape(*weights.shape, *[1] * (task_tensors.ndim - weights.ndim))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """Zero but for the `density` · numel entries of the largest magnitude."""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view(tensor.shape)


def random_pruning(tensor: Tensor, density: float, rescale: bool, *, generator: Generator | None = None) -> Tensor:
    """Each entry kept with probability `density`; `rescale`: and divided by it, which keeps the expected value."""
    kept = tensor * _drawn(tensor, density, generator)
    return kept / density if rescale and density > 0 else kept


def _drawn(like: Tensor, density: float, generator: Generator | None) -> Tensor:
    """Entries 1 with probability `density`, else 0; drawn where the generator is, so that a seed means the same on every device."""
    device = like.device if generator is None else generator.device
    return torch.bernoulli(torch.full(like.shape, density, dtype=like.dtype, device=device), generator=generator).to(like.device)


def check_density(density: float) -> bool:
    """Whether there is anything to prune.

    Raises:
        ConfigError: if the density is negative.
    """
    if density < 0:
        raise ConfigError(f"Density should be >= 0, got {density}")
    if density >= 1:
        warnings.warn(f"The density {density} is greater than or equal to 1, no pruning will be performed.", PeftWarning, stacklevel=3)
    return density < 1


def prune(
    tensor: Tensor,
    density: float,
    method: Literal["magnitude", "random"],
    rescale: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """The change with a share of `density` of its entries left.

    Args:
        method: "magnitude": the largest are kept; "random": any.
        rescale: of random pruning: divide what is kept by the density.

    Raises:
        ConfigError: for another method, or a negative density.
    """
    if method not in ("magnitude", "random"):
        raise ConfigError(f"Unknown method {method}: it is 'magnitude' or 'random'.{hint(str(method), ('magnitude', 'random'))}")
    if not check_density(density):
        return tensor
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    return random_pruning(tensor, density, rescale, generator=generator)


def calculate_majority_sign_mask(tensor: Tensor, method: Voting = "total") -> Tensor:
    """Which entries of the stacked changes (tasks, ...) have the sign of the majority.

    Args:
        method: "total": the sign of their sum; "frequency": that of most of them. In a draw it is plus.

    Raises:
        ConfigError: for another method.
    """
    if method not in ("total", "frequency"):
        raise ConfigError(f'Unimplemented mask method "{method}": it is "total" or "frequency".{hint(str(method), ("total", "frequency"))}')
    signs = tensor.sign()
    votes = (tensor if method == "total" else signs).sum(0)
    return signs == torch.where(votes >= 0, 1, -1)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """Entry by entry the mean of the changes (tasks, ...) that the mask lets through; zero where it lets none."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp(min=1)


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ wᵢ Dᵢ.   Ilharco et al. 2022, arXiv:2212.04089."""
    stacked = torch.stack(list(task_tensors))
    return (stacked * reshape_weight_task_tensors(stacked, weights)).sum(0)


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """Σ wᵢ · Dᵢ pruned by magnitude."""
    return task_arithmetic([prune(t, density, "magnitude") for t in task_tensors], weights)


def ties(task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: Voting = "total") -> Tensor:
    """Pruned by magnitude, a sign elected for each entry, and the mean of the wᵢ Dᵢ that have it.   Yadav et al. 2023, arXiv:2306.01708."""
    return _elected(torch.stack([prune(t, density, "magnitude") for t in task_tensors]), weights, majority_sign_method)


def _elected(stacked: Tensor, weights: Tensor, voting: Voting) -> Tensor:
    mask = calculate_majority_sign_mask(stacked, voting)
    return disjoint_merge(stacked * reshape_weight_task_tensors(stacked, weights), mask)


def dare_linear(task_tensors: Sequence[Tensor], weights: Tensor, density: float, *, generator: Generator | None = None) -> Tensor:
    """Σ wᵢ · Dᵢ pruned at random and rescaled.   Yu et al. 2023, arXiv:2311.03099."""
    return task_arithmetic([prune(t, density, "random", True, generator=generator) for t in task_tensors], weights)


def dare_ties(
    task_tensors: Sequence[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: Voting = "total",
    *,
    generator: Generator | None = None,
) -> Tensor:
    """As `ties`, but pruned at random and rescaled."""
    pruned = [prune(t, density, "random", True, generator=generator) for t in task_tensors]
    return _elected(torch.stack(pruned), weights, majority_sign_method)


def mix(
    kind: str, task_tensors: Sequence[Tensor], weights: Tensor, density: float, voting: Voting = "total", generator: Generator | None = None
) -> Tensor:
    """One of `KINDS` by name."""
    if kind == "linear":
        return task_arithmetic(task_tensors, weights)
    if kind == "magnitude_prune":
        return magnitude_prune(task_tensors, weights, density)
    if kind == "dare_linear":
        return dare_linear(task_tensors, weights, density, generator=generator)
    if kind == "ties":
        return ties(task_tensors, weights, density, voting)
    return dare_ties(task_tensors, weights, density, voting, generator=generator)


def mix_by_blocks(
    kind: str,
    changes: Sequence[Rows],
    shape: tuple[int, int],
    weights: Tensor,
    density: float,
    voting: Voting = "total",
    generator: Generator | None = None,
) -> Tensor:
    """What `mix` gives for changes that are formed some rows at a time: beside the result there is never more than one of them whole.

    Args:
        changes: each gives its rows i to j, in float32.
        shape: that of a change.
    """
    rows, columns = shape
    step = max(_BLOCK // max(columns, 1), 1)
    if (prunes := kind != "linear" and density < 1) and not kind.startswith("dare"):
        limits = [_threshold(change(0, rows), density) for change in changes]
    out = []
    for i in range(0, rows, step):
        stacked = torch.stack([change(i, min(i + step, rows)) for change in changes])
        if prunes and kind.startswith("dare"):
            stacked = stacked * _drawn(stacked, density, generator) / (density or 1.0)
        elif prunes:
            stacked = torch.where(stacked.abs() >= torch.stack(limits).view(-1, 1, 1), stacked, 0)
        weighted = weights.to(stacked)
        out.append(_elected(stacked, weighted, voting) if kind.endswith("ties") else task_arithmetic(list(stacked), weighted))
    return torch.cat(out)


def _threshold(d: Tensor, density: float) -> Tensor:
    """The least magnitude among the `density` · numel largest."""
    kept = int(density * d.numel())
    return d.abs().flatten().kthvalue(d.numel() - kept + 1).values if kept else d.new_tensor(torch.inf)
