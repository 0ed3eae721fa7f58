"""One layer over a batch whose rows have adapters of their own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..change import low_rank
from ..errors import RouteError
from ..ops import LowRank
from ..sites.linear import LinearSite
from ..sites.whole import WholeSite
from .route import BASE, Choice

if TYPE_CHECKING:
    from .layer import AdaptedLayer


class Layout:
    """Where the rows of the batch are in what a module takes and gives: in this dimension of every tensor that has so many numbers there."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def place(self, key: int | str, t: Tensor, rows: int) -> tuple[int, int] | None:
        """(dimension, how often each row stands there, one after another) of an argument, by its number or name; None: it is of no row."""
        return (self.dim, 1) if t.ndim > self.dim and t.shape[self.dim] == rows else None

    def place_out(self, number: int) -> int:
        """The dimension in an output."""
        return self.dim


class OfAttention(Layout):
    """The same of nn.MultiheadAttention, whose masks and weights have their rows first, whatever `batch_first` says."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__(0 if module.batch_first else 1)
        self.heads = module.num_heads
        self.names = list(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]

    def place(self, key: int | str, t: Tensor, rows: int) -> tuple[int, int] | None:
        name = self.names[key] if isinstance(key, int) else key
        if name == "attn_mask":
            return (0, self.heads) if t.ndim == 3 else None
        return (0, 1) if name == "key_padding_mask" else super().place(key, t, rows)

    def place_out(self, number: int) -> int:
        return self.dim if number == 0 else 0


def layout_of(module: nn.Module, dim: int = 0) -> Layout:
    """The layout of a module's calls; `dim`: where most have their rows."""
    return OfAttention(module) if isinstance(module, nn.MultiheadAttention) else Layout(dim)


def run_rows(layer: AdaptedLayer, choice: Choice, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The layer's output, each row of the batch with the adapter that `choice.rows` gives it."""
    assert choice.rows is not None
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(choice.rows):
        groups.setdefault(name if name in layer.attached else BASE, []).append(i)
    if len(groups) == 1:
        (name,) = groups
        return layer.run_acting([] if name == BASE else [layer.attached[name]], args, kwargs, choice.facts)

    if isinstance(layer.site, WholeSite):
        _told_apart(choice.rows, layer.site.batch_dim, args, kwargs, layer.name)
        effects = [(layer.change(name, choice.facts), at) for name, at in groups.items() if name != BASE]
        return layer.site.run(layer.base_layer, effects, args, kwargs)

    lows = _lows(layer, groups, choice, args, kwargs)
    if lows:  # these and the rows without an adapter need no product of their own
        thin = [i for name in (BASE, *lows) for i in groups.pop(name, ())]
        order = {name: k for k, name in enumerate(lows)}
        owner = [order.get(name, -1) for name in choice.rows]
        groups = {BASE: sorted(thin), **groups}
        if len(groups) == 1:
            _told_apart(choice.rows, 0, args, kwargs, layer.name)
            return _run_lows(layer, lows, owner, args[0])

    def run(names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any], at: Tensor) -> Any:
        if lows and not names:
            return _run_lows(layer, lows, [owner[i] for i in at.tolist()], args[0])
        mine = {n: {k: t.index_select(0, at) for k, t in choice.facts[n].items()} for n in names if n in choice.facts}
        return layer.run_acting([layer.attached[n] for n in names], args, kwargs, mine)

    layout = layout_of(layer.get_base_layer() if layer.site.kind == "attention" else layer, layer.site.batch_dim)
    return split_rows(groups, choice.rows, layout, args, kwargs, run, layer.name)


def _lows(
    layer: AdaptedLayer, groups: Mapping[str, Any], choice: Choice, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, LowRank]:
    """The adapters of a mixed batch that add a low-rank change and do nothing else, with it: their rows share the frozen product."""
    if not isinstance(layer.site, LinearSite) or not layer.site.splits(layer.frozen, args, kwargs):
        return {}
    found = {}
    for name in groups:
        if name == BASE or name in choice.facts:
            continue
        change = layer.change(name)
        low = low_rank(change)
        if low is not None and change.shift is None and not low.dropout:
            found[name] = low
    return found if len(found) + (BASE in groups) > 1 else {}


def _run_lows(layer: AdaptedLayer, lows: Mapping[str, LowRank], owner: Sequence[int], x: Tensor) -> Tensor:
    assert isinstance(layer.site, LinearSite)
    return layer.site.apply_rows(layer.frozen, list(lows.values()), owner, x, layer.originals_whole())


def split_rows(
    groups: Mapping[str, Sequence[int]],
    rows: Sequence[str],
    layout: Layout,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    run: Any,
    name: str,
) -> Any:
    """Run each group of rows, `run(names, args, kwargs, numbers of the rows)`, with its own adapter and put the outputs back in order.

    Raises:
        RouteError: if the first input has not one row per name.
    """
    size, first = len(rows), _told_apart(rows, layout.dim, args, kwargs, name)
    if any(hasattr(a, "get_seq_length") for a in (*args, *kwargs.values())):
        raise RouteError(
            f"{name!r} writes into a cache of keys and values, which cannot be split into rows with different adapters. Give use_cache=False, "
            "or take one adapter per call (model.using(name))."
        )
    outs: list[Any] = []
    for group, at in groups.items():
        index = torch.tensor(at, device=first.device)

        def part(key: int | str, v: Any, index: Tensor = index) -> Any:
            if isinstance(v, tuple):
                return tuple(part(key, x, index) for x in v)
            where = layout.place(key, v, size) if isinstance(v, Tensor) else None
            if where is None:
                return v
            dim, each = where
            return v.index_select(
                dim, index if each == 1 else (index.unsqueeze(1) * each + torch.arange(each, device=index.device)).flatten()
            )

        mine = tuple(part(k, a) for k, a in enumerate(args)), {k: part(k, v) for k, v in kwargs.items()}
        outs.append(run([] if group == BASE else [group], *mine, index))
    order = torch.tensor([i for at in groups.values() for i in at], device=first.device)
    back = torch.argsort(order)

    def join(parts: Sequence[Any], number: int = 0) -> Any:
        if isinstance(parts[0], Tensor):
            dim = layout.place_out(number)
            return torch.cat([p.to(parts[0].dtype) for p in parts], dim).index_select(dim, back)
        if isinstance(parts[0], tuple):
            return tuple(join(p, i) for i, p in enumerate(zip(*parts, strict=True)))
        return parts[0]

    return join(outs)


def _told_apart(rows: Sequence[str], batch_dim: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Tensor:
    """The first input, which has one row per name."""
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    if first is None or first.ndim <= batch_dim or first.shape[batch_dim] != len(rows):
        got = None if first is None else tuple(first.shape)
        raise RouteError(
            f"adapter_names gives {len(rows)} names, but the layer {name!r} got an input of shape {got}: its rows cannot be told apart. "
            "Give one name per row of the batch; a layer that regroups tokens (a mixture of experts) takes one adapter per call (model.using(name))."
        )
    return first
