"""What mixtures of LoRA adapters have in common: the adapters' factors on one layer, one after another, kept while nothing about them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops import LowRank

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Kept:
    value: Any
    sources: Sequence[tuple[Tensor, int]]
    numbers: Sequence[float]


def kept(site: Any, names: Sequence[str], make: Callable[[], T]) -> T:
    """What `make` makes of these adapters' tensors on a layer, without a graph; made anew when one of them has changed."""
    old: _Kept | None = site.memory.get("experts")
    if old is not None and torch.compiler.is_compiling():
        value: T = old.value
        return value
    tensors = tensors_of(site, names)
    numbers = [n for a in names for n in (site.layer.attached[a].place.scaling, site.layer.attached[a].place.dropout)]
    if old is None or not _holds(old, tensors, numbers):
        with torch.no_grad():
            made = make()
        old = site.memory["experts"] = _Kept(made, [(t, t._version) for t in tensors], numbers)
    value = old.value
    return value


def _holds(old: _Kept, tensors: Sequence[Tensor], numbers: Sequence[float]) -> bool:
    same = numbers == old.numbers and len(tensors) == len(old.sources)
    return same and all(t is was and t._version == version for t, (was, version) in zip(tensors, old.sources, strict=True))


def tensors_of(site: Any, names: Sequence[str]) -> list[Tensor]:
    """All tensors of these adapters on a layer."""
    attached = [site.layer.attached[n] for n in names]
    return [a.tensor(leaf) for a in attached for leaf in a.leaves]


def trained(site: Any, names: Sequence[str]) -> bool:
    """Whether a graph has to lead to these adapters."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(site, names))


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
