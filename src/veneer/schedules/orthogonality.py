"""Keeping the rows of small matrices orthonormal, by a term of the loss whose gradient is known in closed form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def add_gradient(matrices: Sequence[tuple[Tensor, Tensor]], weight: float) -> None:
    """Add the gradient of weight · Σ ‖Q Qᵀ - I‖ to what is there.

    With P = Q Qᵀ - I it is 2 P Q / ‖P‖. Matrices of one shape go in one product.

    Args:
        matrices: (Q (r, n), its gradient, which is changed in place) of each.
    """
    alike: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for q, grad in matrices:
        alike[q.shape, q.device, grad.dtype].append((q, grad))
    for ((r, _), device, dtype), pairs in alike.items():
        with torch.autocast(device.type, enabled=False):
            q = torch.stack([q for q, _ in pairs]).float()
            p = q @ q.mT - torch.eye(r, device=device)
            p /= p.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
            torch._foreach_add_([g for _, g in pairs], list((p @ q).to(dtype)), alpha=2 * weight)
