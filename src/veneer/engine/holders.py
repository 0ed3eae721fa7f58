"""Where an adapter's tensors are kept: containers keyed by adapter, under the names that a checkpoint has."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..change import Change, Swap
from ..errors import LoadError
from ..method import Leaf, Method
from ..ops import Diag, LowRank, Vectored
from ..sharding import fill, is_dtensor, is_partitioned, whole
from .offload import fetched, runs_on

if TYPE_CHECKING:
    from .layer import AdaptedLayer
    from .place import Place
    from .traced import Traced

M = TypeVar("M", bound=nn.Module)


@functools.cache
def _empty(kind: type[nn.Module]) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    attributes = kind().__dict__
    return attributes, [(k, type(v)) for k, v in attributes.items() if isinstance(v, (dict, set))]


def made(kind: type[M]) -> M:
    """A module of a kind that takes no arguments and has nothing in it: what `kind()` makes, in less than half the time."""
    attributes, containers = _empty(kind)  # type: ignore[arg-type]  # classes are hashable
    new = kind.__new__(kind)
    new.__dict__.update(attributes)
    for name, container in containers:
        new.__dict__[name] = container()
    return new


class Followed(dict[str, Any]):
    """A table whose entries compiled code reads elsewhere, as attributes without an adapter's name: these follow what is written here."""

    followers: Mapping[str, dict[tuple[Any, str], None]] = MappingProxyType({})

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        for target, name in self.followers.get(key, ()):
            now = getattr(target, name)
            if isinstance(now, Tensor) and isinstance(value, (int, float)):
                now.fill_(value)  # a scaling, which compiled code reads as a tensor
            else:
                setattr(target, name, value)

    def follow(self, key: str, target: Any, name: str) -> None:
        """Keep `target.name` at the entry, from its next change on."""
        if not self.followers:
            self.followers = {}
        self.followers.setdefault(key, {})[target, name] = None  # type: ignore[attr-defined]

    def pop(self, key: str, *default: Any) -> Any:
        """The entry of an adapter that is taken off, with its followers. (`del` keeps them: wrappers put something else in the place.)"""
        if self.followers:
            self.followers.pop(key, None)  # type: ignore[attr-defined]
        return super().pop(key, *default)

    def __getstate__(self) -> None:
        """A copy has no followers: what runs it is compiled anew."""


class Keyed(nn.ModuleDict):
    """What a layer has by adapter: modules, or tensors themselves. Takes any string as an adapter's name."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(_modules=Followed(), _parameters=Followed(), _buffers=Followed())

    def __setitem__(self, key: str, value: Any) -> None:
        (self._modules if isinstance(value, nn.Module) else self._parameters)[key] = value

    def __getitem__(self, key: str) -> Any:
        for store in (self._modules, self._parameters, self._buffers):
            if key in store:
                return store[key]
        raise KeyError(key)

    def __delitem__(self, key: str) -> None:
        for store in (self._modules, self._parameters, self._buffers):
            store.pop(key, None)  # type: ignore[attr-defined]

    def __contains__(self, key: object) -> bool:
        return key in self._modules or key in self._parameters or key in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter([*self._modules, *self._parameters, *self._buffers])

    def __len__(self) -> int:
        return len(self._modules) + len(self._parameters) + len(self._buffers)

    def train(self, mode: bool = True) -> Keyed:
        self.training = mode
        for m in self._modules.values():
            if type(m) is Holder and not m._modules:  # by far the most, and none has a mode to act in
                m.__dict__["training"] = mode
            elif m is not None:
                m.train(mode)
        return self

    def keys(self) -> Any:
        return list(self)

    def values(self) -> Any:
        return [self[k] for k in self]

    def items(self) -> Any:
        return [(k, self[k]) for k in self]


class Holder(nn.Module):
    """Holds the tensors of one adapter under the names they have in a checkpoint."""

    weight: Tensor
    own_dtype: frozenset[str] = frozenset()  # tensors whose dtype is the module's own, whatever a file has

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(_parameters=Followed(), _buffers=Followed())

    @property
    def in_features(self) -> int:
        return self._sides()[1]

    @property
    def out_features(self) -> int:
        return self._sides()[0]

    def _sides(self) -> torch.Size:
        if (shape := self.weight.shape) and len(shape) > 1:
            return shape
        raise AttributeError(f"a tensor of shape {tuple(shape)} is no matrix")  # which hasattr takes for an answer

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={tuple(v.shape)}" for k, v in [*self._parameters.items(), *self._buffers.items()] if v is not None)


def visited(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, in the order of `named_modules`, but those that hold tensors of adapters: however many there are, they cost nothing."""
    seen: set[int] = set()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if not module._modules:
            continue
        start = f"{path}." if path else ""
        for name, child in reversed(module._modules.items()):
            if child is not None and not (type(child) is Keyed and _holds_tensors(child)):
                stack.append((start + name, child))


def _holds_tensors(table: Keyed) -> bool:
    """Whether a container has no modules of its own kind to look into: one kind stands in it for all adapters."""
    for first in table._modules.values():
        return isinstance(first, (Holder, TiedHolder, nn.Dropout, nn.Identity))
    return True


def keep_dtypes(module: nn.Module) -> None:
    """Let no file change the dtypes of a whole module's tensors: it computes in them."""
    for owner in module.modules():
        owner.own_dtype = frozenset([*owner._parameters, *owner._buffers])  # type: ignore[assignment]


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
    cached: tuple[Any, Change] | None = None
    recalled: Recalled | None = None
    trains: tuple[tuple[dict[str, Any], str], ...] = ()  # those of `source` that get gradients while the adapter trains
    traced: Traced | None = None  # what compiled code reads instead, once there is any
    lean: bool | None = (
        None  # on a quantised layer: whether the change is applied without anything of the weight's size; None: not known yet
    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None, "cached": None, "recalled": None, "traced": None}

    def replica(self, layer: AdaptedLayer) -> Attached:
        """The same on a copy of the layer that nn.DataParallel runs on another device; its tensors are brought there, with their gradients."""
        place = copy.copy(self.place)
        if place is not None:
            place.layer = layer
        return Replica(**{**vars(self), "place": place, "kept": None, "cached": None, "recalled": None, "traced": None})

    def tensor(self, leaf: str) -> Tensor:
        """The tensor of a leaf as it is now."""
        if leaf in self.derived:
            other, name, transposed = self.derived[leaf]
            t = other.tensor(name)
            if not transposed:
                return t
            return (whole(t) if is_partitioned(t) else t).T  # a view of what ZeRO-3 has emptied would have nothing
        store, key = self.source[leaf]
        own: Tensor = store[key]
        return own

    def place_of(self, leaf: str) -> tuple[dict[str, Any], str] | None:
        """The table and the key of the tensor that `tensor` gives; None where it is another's transpose."""
        if leaf not in self.derived:
            return self.source[leaf]
        other, name, transposed = self.derived[leaf]
        return None if transposed else other.place_of(name)


class Replica(Attached):
    """An adapter on a copy of its layer, on another device."""

    def tensor(self, leaf: str) -> Tensor:
        t = super().tensor(leaf)
        return t if self.place is None else t.to(self.place.layer.home())


@dataclass(frozen=True, eq=False)
class Kept:
    """A change made of the leaves themselves and nothing computed: it stays true however their numbers are written."""

    change: Change | Swap
    scaling: float
    tensors: tuple[tuple[dict[str, Any], str, Tensor], ...]

    def holds(self, scaling: float) -> bool:
        """Whether the leaves are still the very tensors it was made of."""
        if self.scaling != scaling:
            return False
        for store, key, t in self.tensors:  # noqa: SIM110 - a generator costs more than all it asks, at every token
            if store.get(key) is not t:
                return False
        return True

    @staticmethod
    def of(change: Any, attached: Attached, scaling: float | Tensor) -> Kept | None:
        """The change, kept, if it is made of nothing but leaves."""
        if isinstance(scaling, Tensor):
            return None
        used = list(change.tensors.values()) if isinstance(change, Swap) else _made_of(change)
        if used is None:
            return None
        places = [attached.place_of(name) for name in (*attached.leaves, *attached.derived)]
        tensors = tuple((*place, place[0][place[1]]) for place in places if place is not None)
        if len(tensors) < len(places):
            return None
        mine = {id(t) for _, _, t in tensors}
        return Kept(change, scaling, tensors) if {id(t) for t in used} <= mine else None


def _made_of(change: Any) -> list[Tensor] | None:
    """The tensors of a change that computes nothing of them before it sees an input; None for others."""
    if not isinstance(change, Change) or change.shift is not None or change.base is not None or change.gain is not None:
        return None
    ends, add = [op for op in (change.left, change.right) if op is not None], change.add
    if not ends and isinstance(add, (LowRank, Vectored)) and not add.dropout:
        return [add.up, add.down, *((add.outer, add.inner) if isinstance(add, Vectored) else ())]
    if ends and add is None and all(isinstance(op, Diag) for op in ends):
        return [op.d for op in ends if isinstance(op, Diag)]
    return None


@dataclass(frozen=True, eq=False)
class Recalled:
    """A change computed from leaves, and copies of what it was computed of: it is true while they are equal, number by number.

    Comparing costs a pass over small tensors, where computing (rotations from skew matrices, norms of a whole W) costs many, or wide ones.
    """

    change: Change
    scaling: float
    tensors: Mapping[str, Tensor]
    weight: Tensor | None  # the check sum of W, where W was asked for
    autocast: torch.dtype | None

    def holds(self, scaling: float, now: Mapping[str, Tensor], weight: Callable[[], Tensor | None], autocast: torch.dtype | None) -> bool:
        """Whether it would be computed again of the very same numbers."""
        if self.scaling != scaling or self.autocast != autocast:
            return False
        same = all(_same(t, now[k]) for k, t in self.tensors.items())
        return same and (self.weight is None or ((w := weight()) is not None and _same(self.weight, w)))

    @staticmethod
    def worth(change: Any, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a change is worth it: something is done to W, by small matrices that are made once. On the CPU alone: an accelerator would have to
        be waited for to compare."""
        if any(t.device.type != "cpu" or type(t) not in (Tensor, nn.Parameter) for t in tensors.values()):
            return False
        if not isinstance(change, Change) or change.base is not None or change.additive or change.shift is not None:
            return False
        ops = [op for op in (change.left, change.right, change.add) if op is not None]
        return all(op.fixed and op.lean for op in ops)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class Tensors:
    """The tensors of one adapter in one place, by leaf name."""

    def __init__(self, attached: Attached, detached: bool = False) -> None:
        for name in (*attached.leaves, *attached.derived):
            t = attached.tensor(name)
            if t.is_meta:
                t = _filled(attached, name, t)
            setattr(self, name, t.detach() if detached else t)

    def __getattr__(self, name: str) -> Tensor:  # for the type checker; leaves are plain attributes
        raise AttributeError(name)


def _filled(attached: Attached, name: str, t: Tensor) -> Tensor:
    """A tensor on the meta device, brought in if accelerate keeps it elsewhere. As it is it may act where the whole model is; in other places torch
    multiplies by it without an error, and gives noise."""
    if attached.place is None or (layer := attached.place.layer).home().type == "meta":
        return t
    at = attached.place_of(name)
    for module in layer.modules() if at is not None else ():
        if at is not None and (at[0] is module._parameters or at[0] is module._buffers) and runs_on(module) is not None:
            return fetched(module, lambda: at[0][at[1]])
    where = f"{layer.name}: {name!r} of the adapter {attached.place.adapter!r}"
    raise LoadError(
        f"{where} is on the meta device and holds nothing (low_cpu_mem_usage=True). Fill it first, from a file (load_adapter, "
        "set_peft_model_state_dict) or from data (initialize_lora_eva_weights)."
    )


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
                tied, (same, key) = container_of(owner, container), source
                setattr(tied, "_parameters" if isinstance(same[key], nn.Parameter) else "_buffers", same)
                if leaf.saved is not True:
                    tied._non_persistent_buffers_set.add(adapter)
            continue
        if name in attached.derived:
            container_of(owner, container)[adapter] = TiedHolder(attached, name)
            continue
        value: Any = tensors[name]
        store = "_buffers" if leaf.running or leaf.saved == "start" or (leaf.saved is False and not leaf.trainable) else "_parameters"
        if store == "_parameters" and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=leaf.trainable)
        table = container_of(owner, container)
        if leaf.attr is None:
            holder, key = table, adapter
        else:
            holder, key = _holder(table, adapter, leaf.attr)
        getattr(holder, store)[key] = value
        if store == "_buffers" and leaf.saved is not True:
            holder._non_persistent_buffers_set.add(key)
        if leaf.dtype is not None and isinstance(holder, Holder):
            holder.own_dtype |= {key}
        attached.source[name] = (getattr(holder, store), key)
    attached.trains = tuple(at for name, at in attached.source.items() if attached.leaves[name].trainable)


def container_of(owner: nn.Module, name: str) -> Any:
    """The container of this name in `owner`, made if it is missing."""
    if name not in owner._modules:
        owner._modules[name] = made(Keyed)
    return owner._modules[name]


def _holder(table: Keyed, adapter: str, attr: str) -> tuple[Holder, str]:
    """The holder for `attr` (dotted where a module inside holds it), made if need be, and the last part of the name."""
    *path, key = attr.split(".")
    holder: Any = table
    for name in (adapter, *path):
        if name not in holder._modules:
            holder._modules[name] = made(Holder)
        holder = holder._modules[name]
    return holder, key


def drop(owner: nn.Module, adapter: str, attached: Attached) -> None:
    """Take the tensors of an adapter out of `owner`, and containers that are then empty."""
    for name in {leaf.container or n for n, leaf in attached.leaves.items()}:
        container: Any = owner._modules[name]
        del container[adapter]  # a tied table has taken it out already
        if not len(container):
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
            path, _, key = leaf.attr.rpartition(".")
            at, memory = at._modules[adapter].get_submodule(path), f"{memory}.{leaf.attr}"
        yield leaf.on_disk or (container if leaf.attr is None else f"{container}.{leaf.attr}"), memory, key, at


def spare_slots(owner: nn.Module, adapter: str, attached: Attached) -> Iterator[tuple[str, str, str, nn.Module]]:
    """The same for tensors of another place that stand here too and are not saved once more, which PEFT may have done."""
    for name, leaf in attached.leaves.items() if attached.derived else ():
        if leaf.saved is False and leaf.attr is None and name in attached.derived:
            container = leaf.container or name
            yield container, f"{container}.{adapter}", adapter, owner._modules[container]  # type: ignore[misc]


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


@contextmanager
def opened(attached: Iterable[Attached]) -> Iterator[None]:
    """Within the block, adapters' tensors that are spread over processes, and their gradients, are whole; what is written to them stays."""
    sources = [s for a in attached for s in (*a.source.values(), *(o.source[n] for o, n, _ in a.derived.values() if n in o.source))]
    spread = [(store, key, store[key]) for store, key in {id(s[k]): (s, k) for s, k in sources}.values()]
    spread = [(store, key, t) for store, key, t in spread if is_dtensor(t) or is_partitioned(t)]
    before = []
    for store, key, t in spread:
        full = whole(t)
        store[key] = new = nn.Parameter(full, t.requires_grad) if isinstance(t, nn.Parameter) else full
        new.grad = whole(t.grad).clone() if t.grad is not None else None
        before.append((new._version, new.grad._version if new.grad is not None else 0))
    try:
        yield
        for (store, key, t), (version, of_grad) in zip(spread, before, strict=True):
            new = store[key]
            if new._version != version:
                fill(t, new.detach())
            if t.grad is not None and new.grad is not None and new.grad._version != of_grad:
                fill(t.grad, new.grad)
    finally:
        for store, key, t in spread:
            store[key] = t
