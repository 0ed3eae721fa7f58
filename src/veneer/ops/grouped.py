"""Weights of grouped layers as the block-diagonal matrices over all channels that they act as."""

from __future__ import annotations

import torch
from torch import Tensor


def spread(m: Tensor, groups: int) -> Tensor:
    """M (n_out, k), whose rows see the columns of their own group alone, as (n_out, groups · k)."""
    whole: Tensor = m if groups == 1 else torch.block_diag(*m.chunk(groups))
    return whole
