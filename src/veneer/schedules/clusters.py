"""The rows of an adapter in clusters: how a file holds them, how much each matters, and which go on training."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_SIZES = re.compile(r"(?:^|_)sizes$")
_PART = re.compile(r"(?<=_)[AB]\.\d+$")


def cluster_of(sizes: Tensor, n: int) -> Tensor:
    """The cluster (n,) of each row, from the sizes (clusters, 2): rows and rank of each."""
    return torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes[:, 0], output_size=n)


def means(a: Tensor, b: Tensor, sizes: Tensor) -> Tensor:
    """Per cluster, the mean over its part of A (clusters, rank, r) plus that over its part of B (rows, rank)."""
    rows, ranks = sizes.T
    of_b = b.new_zeros(len(a)).index_add(0, cluster_of(sizes, len(b)), b.sum(1))
    each: Tensor = a.sum((1, 2)) / (ranks * a.shape[2]) + of_b / (rows * ranks).clamp_min(1)
    return each


def compete(scores: Sequence[Tensor], live: Sequence[Tensor], least: int, left: float) -> None:
    """Let the best of the live clusters of all layers live on, in place: `least` and the share `left` of the others."""
    alive = torch.cat([t.to(scores[0].device) for t in live])
    target = int(least + (len(alive) - least) * left)
    if target >= int(alive.sum()):
        return
    best = torch.cat([t.to(alive.device) for t in scores]).where(alive, float("-inf")).topk(target).indices
    alive = torch.zeros_like(alive).index_fill(0, best, True)
    for t, part in zip(live, alive.split([len(t) for t in live]), strict=True):
        t.copy_(part)


def parted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with one A and one B a cluster, `..._A.0`, in the place of `..._A`, `..._B` and `..._sizes`."""
    out = dict(tensors)
    for key in tensors:
        if not _SIZES.search(key):
            continue
        at = key.removesuffix("sizes")
        counts, ranks = out.pop(key).T.tolist()
        a, b = out.pop(f"{at}A"), out.pop(f"{at}B").split(counts)
        for c, rank in enumerate(ranks):
            out[f"{at}A.{c}"], out[f"{at}B.{c}"] = a[c, :rank].contiguous(), b[c][:, :rank].contiguous()
    return out


def whole(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The inverse of `parted`, for clusters of up to `rank` (more if the file has more)."""
    out = {k: t for k, t in tensors.items() if not _PART.search(k)}
    for at in dict.fromkeys(k[: m.start()] for k in tensors if (m := _PART.search(k))):
        a, b = ([tensors[f"{at}{x}.{c}"] for c in range(len(tensors)) if f"{at}{x}.{c}" in tensors] for x in "AB")
        if len(a) != len(b) or not a:
            out |= {k: t for k, t in tensors.items() if k.startswith(at)}  # loading will say that they fit nowhere
            continue
        q = max(min(rank, a[0].shape[1]), *(len(t) for t in a))
        out[f"{at}A"] = torch.stack([torch.cat([t, t.new_zeros(q - len(t), t.shape[1])]) for t in a])
        out[f"{at}B"] = torch.cat([torch.cat([t, t.new_zeros(len(t), q - t.shape[1])], 1) for t in b])
        out[f"{at}sizes"] = torch.tensor([[len(y), len(x)] for x, y in zip(a, b, strict=True)], dtype=torch.int32)
    return out


class AdamssAsaCallback:
    """For transformers' Trainer: hands its count of steps to `update_and_allocate`. Without it the schedule runs just as well, by its own count."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        update = getattr(getattr(model, "base_model", model), "update_and_allocate", None)
        if update is not None:
            update(state.global_step)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("on_"):  # the Trainer's other events
            return lambda *args, **kwargs: None
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
