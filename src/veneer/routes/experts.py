"""What mixtures of LoRA adapters have in common: the adapters' factors on one layer, one after another, kept while nothing about them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops import LowRank

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Kept(Generic[T]):
    """What was made of some adapters' tensors on a layer, without a graph, and which values they had."""

    value: T
    sources: Sequence[tuple[Tensor, int]]
    numbers: Sequence[float]

    @property
    def trained(self) -> bool:
        """Whether a graph has to lead to the adapters, so that their part of it has to be made anew."""
        return torch.is_grad_enabled() and any(t.requires_grad for t, _ in self.sources)

    def holds(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> bool:
        same = numbers == self.numbers and len(tensors) == len(self.sources)
        return same and all(t is was and t._version == version for t, (was, version) in zip(tensors, self.sources, strict=True))


def kept(site: Any, names: Callable[[], Sequence[str]], make: Callable[[], T]) -> Kept[T]:
    """What `make` makes of these adapters' tensors on a layer; made anew when one of them has changed. `facts` asks it of every place first, so that
    `change` finds it made, also where compiled code could not make it."""
    old: Kept[T] | None = site.memory.get("experts")
    if old is not None and (site.told or torch.compiler.is_compiling()):
        return old
    attached = {n: site.layer.attached[n] for n in names()}
    tensors = [a.tensor(leaf) for a in attached.values() for leaf in a.leaves]
    numbers = [site.layer.training, *(site.layer.scaling[n] for n in attached)]  # dropout acts in training
    if old is None or not old.holds(tensors, numbers):
        with torch.no_grad():
            old = Kept(make(), [(t, t._version) for t in tensors], numbers)
        site.memory["experts"] = old
    return old


def plain(site: Any, name: str) -> LowRank:
    """The low-rank change that an adapter makes on a layer.

    Raises:
        ConfigError: if it is more than that (DoRA, a bias of its own, ...).
    """
    change = site.other(name)
    if not change.additive or type(change.add) is not LowRank or change.shift is not None:
        raise ConfigError(
            f"{site.adapter!r} mixes plain LoRA adapters, and {name!r} does more on {site.name!r}: {site.layer.attached[name].config!r}."
        )
    low: LowRank = change.add
    return low


def stacked(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(n_out, Σ r) and (Σ r, n_in) of pairs of factors."""
    return torch.cat([up for up, _ in parts], 1), torch.cat([down for _, down in parts])
