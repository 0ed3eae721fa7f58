"""Where an adapter's tensors are kept: containers keyed by adapter, under the names that a checkpoint has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..change import Change
from ..method import Leaf, Method
from ..ops import LowRank

if TYPE_CHECKING:
    from .layer import Place


class Keyed(nn.ModuleDict):
    """A ModuleDict that takes any string as an adapter's name."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


class KeyedTensors(nn.ParameterDict):
    """A ParameterDict that takes any string as an adapter's name."""

    def __setitem__(self, key: str, value: Any) -> None:
        self._keys[key] = None
        self._parameters[key] = value

    def __getitem__(self, key: str) -> Any:
        return self._parameters[key] if key in self._parameters else self._buffers[key]

    def __delitem__(self, key: str) -> None:
        self._keys.pop(key, None)
        self._buffers.pop(key, None)
        self._parameters.pop(key, None)  # a tied table has taken it out already


class Holder(nn.Module):
    """Holds the tensors of one adapter under the names they have in a checkpoint."""

    weight: Tensor

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={tuple(v.shape)}" for k, v in [*self._parameters.items(), *self._buffers.items()] if v is not None)


@dataclass(eq=False)
class Attached:
    """One adapter in one place: its config as it holds there, its leaves and where their tensors are.

    `derived` leaves are another place's, transposed or not: tied weights, and tensors that all places share.
    """

    config: Method
    leaves: Mapping[str, Leaf]
    place: Place | None
    source: dict[str, tuple[dict[str, Any], str]] = field(default_factory=dict)
    derived: dict[str, tuple[Attached, str, bool]] = field(default_factory=dict)
    kept: Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}

    def tensor(self, leaf: str) -> Tensor:
        """The tensor of a leaf as it is now."""
        if leaf in self.derived:
            other, name, transposed = self.derived[leaf]
            return other.tensor(name).T if transposed else other.tensor(name)
        store, key = self.source[leaf]
        t: Tensor = store[key]
        return t


@dataclass(frozen=True, eq=False)
class Kept:
    """A change made of the leaves themselves and nothing computed: it stays true however their numbers are written."""

    change: Change
    scaling: float
    tensors: tuple[tuple[dict[str, Any], str, Tensor], ...]

    def holds(self, scaling: float) -> bool:
        """Whether the leaves are still the very tensors it was made of."""
        return self.scaling == scaling and all(store.get(key) is t for store, key, t in self.tensors)

    @staticmethod
    def of(change: Change, attached: Attached, scaling: float) -> Kept | None:
        """The change, kept, if it is made of nothing but leaves."""
        add = change.add
        if type(add) is not LowRank or add.dropout or attached.derived or not change.additive or change.shift is not None:
            return None
        tensors = tuple((store, key, store[key]) for store, key in attached.source.values())
        mine = {id(t) for _, _, t in tensors}
        return Kept(change, scaling, tensors) if {id(add.up), id(add.down)} <= mine else None


class Tensors:
    """The tensors of one adapter in one place, by leaf name."""

    def __init__(self, attached: Attached) -> None:
        for name in (*attached.leaves, *attached.derived):
            setattr(self, name, attached.tensor(name))

    def __getattr__(self, name: str) -> Tensor:  # for the type checker; leaves are plain attributes
        raise AttributeError(name)


class TiedHolder(nn.Module):
    """Stands where a layer has a tensor that is another layer's, or its transpose."""

    def __init__(self, attached: Attached, leaf: str) -> None:
        super().__init__()
        self.attached, self.leaf = attached, leaf

    @property
    def weight(self) -> Tensor:
        return self.attached.tensor(self.leaf)


def hold(owner: nn.Module, adapter: str, attached: Attached, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of an adapter into `owner`'s containers. Nothing here can fail half-way."""
    for name, leaf in attached.leaves.items():
        container = leaf.container or name
        if name in attached.derived and leaf.attr is None and not attached.derived[name][2]:
            source = attached.derived[name][0].source.get(name)
            if source is not None:  # the very tensor of the other place, under this one's name as well
                tied: Any = owner._modules.setdefault(container, KeyedTensors())
                same, key = source
                setattr(tied, "_parameters" if isinstance(same[key], nn.Parameter) else "_buffers", same)
                tied._keys.update(dict.fromkeys(same))
                if leaf.saved is not True:
                    tied._non_persistent_buffers_set.add(adapter)
            continue
        if name in attached.derived:
            if container not in owner._modules:
                owner._modules[container] = Keyed()
            owner._modules[container]._modules[adapter] = TiedHolder(attached, name)  # type: ignore[union-attr]
            continue
        value: Any = tensors[name]
        store = "_buffers" if leaf.running or leaf.saved == "start" or (leaf.saved is False and not leaf.trainable) else "_parameters"
        if store == "_parameters" and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=leaf.trainable)
        if leaf.attr is None:
            if container not in owner._modules:
                owner._modules[container] = KeyedTensors()
            table: Any = owner._modules[container]
            if store == "_buffers":
                table._buffers[adapter] = value
                if leaf.saved is not True:
                    table._non_persistent_buffers_set.add(adapter)
            else:
                table[adapter] = value
            attached.source[name] = (getattr(table, store), adapter)
            continue
        if container not in owner._modules:
            owner._modules[container] = Keyed()
        holders = owner._modules[container]._modules  # type: ignore[union-attr]
        holder = holders.get(adapter)
        if holder is None:
            holders[adapter] = holder = Holder()
        getattr(holder, store)[leaf.attr] = value
        if store == "_buffers" and leaf.saved is not True:
            holder._non_persistent_buffers_set.add(leaf.attr)
        attached.source[name] = (getattr(holder, store), leaf.attr)


def drop(owner: nn.Module, adapter: str, attached: Attached) -> None:
    """Take the tensors of an adapter out of `owner`, and containers that are then empty."""
    for name in {leaf.container or n for n, leaf in attached.leaves.items()}:
        container: Any = owner._modules[name]
        if isinstance(container, KeyedTensors):
            del container[adapter]
        else:
            container._modules.pop(adapter, None)
        if not (container._modules or container._parameters or container._buffers):
            del owner._modules[name]


def slots(owner: nn.Module, adapter: str, attached: Attached, start: bool) -> Iterator[tuple[str, str, str, nn.Module]]:
    """(name in the file, name in memory, key, owner) of each saved tensor (or, `start`, each frozen start value), relative to `owner`."""
    for name, leaf in attached.leaves.items():
        if leaf.saved is False or (leaf.saved == "start") != start:
            continue
        container = leaf.container or name
        at: Any = owner._modules[container]
        memory, key = f"{container}.{adapter}", adapter
        if leaf.attr is not None:
            at, memory, key = at._modules[adapter], f"{memory}.{leaf.attr}", leaf.attr
        yield leaf.on_disk or (container if leaf.attr is None else f"{container}.{leaf.attr}"), memory, key, at


def get_slot(owner: nn.Module, key: str) -> Tensor:
    """The tensor in a checkpoint slot."""
    for store in (owner._parameters, owner._buffers):
        t = store.get(key)
        if t is not None:
            return t
    tied: Tensor = getattr(owner, key)
    return tied


def set_slot(owner: nn.Module, key: str, tensor: Tensor) -> None:
    """Put a tensor into a checkpoint slot: a new parameter in the place of the old one, with the same requires_grad."""
    if isinstance(owner, TiedHolder):
        other, leaf, transposed = owner.attached.derived[owner.leaf]
        store, name = other.source[leaf]
        store[name] = nn.Parameter(tensor.T.contiguous() if transposed else tensor, requires_grad=store[name].requires_grad)
    elif key in owner._buffers:
        owner._buffers[key] = tensor
    else:
        old = owner._parameters[key]
        owner._parameters[key] = nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad)
