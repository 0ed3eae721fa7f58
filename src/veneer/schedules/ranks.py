"""Files of adapters whose layers have lost ranks: only what lives is written, and it finds its place again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Pattern = Mapping[str, Sequence[bool]]  # "<layer>.<leaf>" -> which ranks live


def cut(tensors: Mapping[str, Tensor], axes: Mapping[str, int], pattern: Pattern, leaf: str) -> dict[str, Tensor]:
    """The tensors of a file without dead ranks.

    Args:
        axes: leaf name -> the dimension that counts ranks.
        leaf: the one that the pattern's keys name.
    """
    out = dict(tensors)
    for key, t in tensors.items():
        path, name = _split(key)
        live = pattern.get(f"{path}.{leaf}", ())
        if name in axes and t.shape[axes[name]] == len(live):
            out[key] = t.index_select(axes[name], torch.tensor(live, device=t.device).nonzero().flatten())
    return out


def widen(
    tensors: Mapping[str, Tensor], axes: Mapping[str, int], pattern: Pattern, leaf: str, ranks: Mapping[str, int]
) -> dict[str, Tensor]:
    """The tensors of a file for layers with more ranks than it has: its own go where the pattern has them, or first; the others are zero.

    Args:
        ranks: layer -> the rank it has in the model.
    """
    out = dict(tensors)
    for key, t in tensors.items():
        path, name = _split(key)
        rank = ranks.get(path, 0)
        if name not in axes or (n := t.shape[axes[name]]) >= rank:
            continue
        live = pattern.get(f"{path}.{leaf}", ())
        at = torch.tensor(live).nonzero().flatten() if (len(live), sum(live)) == (rank, n) else torch.arange(n)
        shape = [rank if d == axes[name] else size for d, size in enumerate(t.shape)]
        out[key] = t.new_zeros(shape).index_copy(axes[name], at.to(t.device), t)
    return out


def _split(key: str) -> tuple[str, str]:
    path, _, name = key.removeprefix("base_model.model.").rpartition(".")
    return path, name
