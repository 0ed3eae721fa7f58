"""Singular values of what an adapter does to a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..change import Change
from ..deltas.thin import of_product, wide
from ..engine.layer import AdaptedLayer


@torch.no_grad()
def singular_values(layer: AdaptedLayer, adapter: str) -> Tensor | None:
    """Of ΔW = W' - W, falling, in float64; (r,) where ΔW is of rank r by its form, else (min(n_out, n_in),). Experts: of all of them together.

    Returns:
        None where the adapter's change is no ΔW.
    """
    a = layer.attached[adapter]
    if a.config.unmergeable or not layer.supports_lora_conversion(adapter):
        return None
    change = layer.change(adapter, at_rest=True)
    if isinstance(change, Change) and change.add is not None and change.additive:
        thin = change.add.thin()
        if thin is not None:
            up, down, scale = thin
            return (of_product(up, down).s * abs(scale)).flatten().sort(descending=True).values
    return values(layer.get_delta_weight(adapter))


def values(d: Tensor) -> Tensor:
    """Of a matrix, or of one with more dimensions after the first, by the Gram matrix of its smaller side in float64."""
    m = wide(d.flatten(1))
    gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
    s: Tensor = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)
    return s


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of s / Σ s: between 1 and the number of singular values; 0 for a change that is zero. Roy & Vetterli 2007."""
    total = s.sum()
    if not float(total) > 0:
        return 0.0
    p = s / total
    return float(torch.special.entr(p).sum().exp())
