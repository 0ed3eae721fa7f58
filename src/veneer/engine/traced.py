"""What compiled code reads of an adapter on a layer.

A program that torch.compile makes holds for the very names, numbers and shared objects that were met on the way to a tensor. So that one program serves all
adapters of a shape, and all layers of a shape, compiled code comes to an adapter without any: a layer's seat has who acts there in this thread (its
`shown`, who acts by default), and the adapter's tensors are attributes that follow the tables which checkpoints know.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..sites.base import hooked
from ..sites.linear import LinearSite
from .holders import Attached, Followed, Tensors
from .place import Place
from .route import Choice, chosen_here

if TYPE_CHECKING:
    from .layer import AdaptedLayer

Acting = tuple["weakref.ref[Attached]", ...] | Literal[False]  # (a thread is not to keep a model alive); False: names have to be asked


class Seat(threading.local):
    """Which adapters act on one layer in this thread; None: it has made no choice."""

    def __init__(self, layer: AdaptedLayer) -> None:  # in every thread anew, when it first looks
        choice = chosen_here(layer.switch)
        self.acting: Acting | None = None if choice is None else acting(layer, choice)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the layer is seated when it is compiled


def acting(layer: AdaptedLayer, choice: Choice) -> Acting:
    """The adapters that act on a layer; False where more has to be known than these."""
    if choice.rows is not None or choice.facts:
        return False
    return tuple(weakref.ref(a) for n in choice.acting if (a := layer.attached.get(n)) is not None)


def seen(layer: AdaptedLayer) -> list[Attached] | None:
    """Who acts on a layer, for compiled code; None if it has to ask by name."""
    if layer.seat is None or layer.own is not None:
        return None
    refs = layer.seat.acting
    if refs is None:
        refs = layer.shown
    return None if refs is None or refs is False else [a for a in [ref() for ref in refs] if a is not None]


def direct(layer: AdaptedLayer, a: Attached, x: Tensor) -> Tensor | None:
    """What an ordinary linear layer gives under one adapter, by a short way: whatever compiled code has looked at, it looks at before every call.
    None where the way is longer."""
    base: Any = layer._modules["base_layer"]
    w, b = base._parameters["weight"], base._parameters["bias"]
    if a.traced is None or a.traced.held is None or layer.training or layer.merged_adapters or hooked(base) or type(w) is not nn.Parameter:
        return None
    change: Any = a.traced.config.change(a.traced.held, a.traced)
    return LinearSite.times(w, b, [(change, "sum")], x)


class Traced(Place):
    """A place as compiled code sees it; of a layer with a factor of its own there is none.

    Attributes:
        config: a face of its own for each layer, with the one config's attributes.
        held: the adapter's tensors; None where a leaf is another place's, transposed.
    """

    scaling: Any = None

    def __init__(self, attached: Attached, place: Place) -> None:
        self.__dict__.update(place.__dict__)
        self.leaves: Tensors = object.__new__(Tensors)
        self.read_from(attached)

    def read_from(self, a: Attached) -> None:
        """Take everything as it is now, and follow it."""
        layer, name = self.layer, self.adapter
        self.config = object.__new__(type(a.config))
        object.__setattr__(self.config, "__dict__", a.config.__dict__)
        at = {leaf: a.place_of(leaf) for leaf in (*a.leaves, *a.derived)}
        stores = {leaf: (here[0], here[1]) for leaf, here in at.items() if here is not None and isinstance(here[0], Followed)}
        for leaf, (store, key) in stores.items():
            assert isinstance(store, Followed)
            setattr(self.leaves, leaf, store[key])
            store.follow(key, self.leaves, leaf)
        self.held = self.leaves if len(stores) == len(at) else None
        scaling = layer.scaling[name]
        if len(layer.attached) > 1 and not isinstance(scaling, Tensor) and stores:  # of one alone, the number is part of the program
            some = next(iter(vars(self.leaves).values()))
            dtype = torch.float64 if some.dtype == torch.float64 else torch.float32
            scaling = torch.tensor(float(scaling), dtype=dtype, device=some.device)
        self.scaling = scaling
        layer.scaling.follow(name, self, "scaling")
        dropouts: Any = layer._modules[f"{a.config.prefix}dropout"]
        self.drop = dropouts._modules[name]
        dropouts._modules.follow(name, self, "drop")

    @property
    def dropout(self) -> float:
        return float(self.drop.p) if isinstance(self.drop, nn.Dropout) and self.drop.training and not self.resting else 0.0
