"""How the two factors of a LoRA lie in its tensors, on each kind of site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.norms import row_norm_sq
from ..ops import LowRank
from ..ops.grouped import spread


def names(site: Any) -> tuple[str, str]:
    """What A and B are called."""
    return ("lora_embedding_A", "lora_embedding_B") if site.kind == "embedding" else ("lora_A", "lora_B")


def product(p: Any, site: Any) -> LowRank:
    """s B A as a matrix; of experts (E, n_out, r) and (E, r, n_in)."""
    a, b = (getattr(p, n) for n in names(site))
    if site.kind == "embedding":
        return LowRank(b, a, site.scaling)
    if site.experts:
        e = site.experts  # rows of A are expert by expert, columns of B rank by rank
        return LowRank(b.view(site.n_out, -1, e).permute(2, 0, 1), a.view(e, -1, site.n_in), site.scaling)
    if site.kind == "conv":
        return LowRank(spread(b.flatten(1), site.groups), a.flatten(1), site.scaling, site.dropout)
    return LowRank(b, a, site.scaling, site.dropout)


def tensors(up: Tensor, down: Tensor, site: Any) -> dict[str, Tensor]:
    """A and B from factors: (n_out, r) and (r, n_in), with experts or the groups of a convolution as a leading dimension."""
    r = down.shape[-2]
    if site.kind == "conv":
        one = (1,) * len(site.kernel)
        down, up = down.reshape(-1, site.channels, *site.kernel), up.reshape(site.n_out, r, *one)
    elif site.experts:
        down, up = down.reshape(-1, site.n_in), up.permute(1, 2, 0).reshape(site.n_out, -1)
    return dict(zip(names(site), (down, up), strict=True))


def row_norms(total: Any, site: Any) -> Tensor:
    """The lengths (n_out,) of the rows of W + B A, A and B being the factors of a `veneer.engine.parts.Total`."""
    up = total.up if site.groups == 1 else torch.block_diag(*total.up)
    w = spread(site.weight(), site.groups).to(up.dtype)
    return row_norm_sq(w, total.down.flatten(0, -2), up, 1.0).sqrt()
