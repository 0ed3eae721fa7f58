"""Where a method acts: what it may know of the layer."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import RouteError
from .route import Facts, apart

if TYPE_CHECKING:
    from .layer import AdaptedLayer


class Place:
    """What a method may know of where it acts: one adapter on one layer."""

    def __init__(self, layer: AdaptedLayer, adapter: str, name: str) -> None:
        self.layer, self.adapter, self.name = layer, adapter, name
        site = layer.site
        self.kind, self.n_out, self.n_in = site.kind, site.n_out, site.n_in
        self.kernel, self.groups, self.experts = site.kernel, site.groups, site.experts
        self.channels = site.channels
        self.storage = site.codec.name  # how the weight is packed, None for a plain one
        self.index, self.count = 0, 1  # which of the adapter's layers this is, and how many there are
        self.memory: dict[str, Any] = {}  # what a method that acts at optimizer steps remembers here; see `Method.carried`
        self.new_base: Tensor | None = None  # a start that is defined by another base (LoftQ) leaves it here; W (n_out, n_in)
        self.facts: Facts = {}
        self.told = False  # whether the method has been asked about the call (see `Method.facts`)
        self.read = False  # whether W has been asked for where gradients are wanted
        self.asked = False  # whether W, or anything else of the frozen module, has been asked for
        self.called = name  # what the patterns of a config match
        self.resting = False
        self.follows = False  # whether its tensors are those of an embedding that the weight is tied to

    def at_rest(self) -> Place:
        """The same place outside training, whatever the layer's mode: for what is to hold for good, such as a merge."""
        here = copy.copy(self)
        here.resting = True
        return here

    def during(self, facts: Facts) -> Place:
        """The same place in one call of the model."""
        here = copy.copy(self)
        here.facts, here.told = facts, True
        return here

    def fact(self, name: str) -> Any:
        """What the adapter's method has found out about this call (see `Method.facts`).

        Raises:
            RouteError: if the call did not come through the model that knows.
        """
        if name not in self.facts:
            raise RouteError(
                f"The adapter {self.adapter!r} needs to know `{name}` of each call, and nothing told {self.name!r}. Call the PeftModel itself"
                + (f", with {name}=..." if name in self.layer.attached[self.adapter].config.takes else "")
                + ", not the model inside it."
            )
        return self.facts[name]

    def other(self, adapter: str) -> Change | None:
        """What another adapter does to the frozen weight here; None where it is not on this layer."""
        return self.layer.change(adapter) if adapter in self.layer.attached else None

    @property
    def module(self) -> nn.Module:
        """The adapted module itself."""
        return self.layer.get_base_layer() if self.layer.packed is None else self.layer.packed

    def weight(self) -> Tensor:
        """The frozen W (n_out, n_in), also while adapters are merged into the layer; of a packed one, dequantised for this use."""
        if not torch.compiler.is_compiling():  # which would be compiled anew for what was noted
            self.read, self.asked = self.read or torch.is_grad_enabled(), True
        return self.layer.frozen_weight()

    def bias(self) -> Tensor | None:
        """The frozen bias (n_out,), also while adapters are merged into the layer."""
        site = self.layer.weight_site
        return self.layer.originals_whole().get(site.bias_name, site.bias(self.layer.frozen))

    def tensors(self) -> dict[str, Tensor]:
        """The module's frozen tensors by name, as far as adapters may change them, also while adapters are merged into it."""
        return self.layer.frozen_tensors()

    def tensor(self, leaf: str) -> Tensor:
        """One of the adapter's tensors here, with its gradient: for what acts at optimizer steps."""
        return self.layer.leaf(self.adapter, leaf)

    @property
    def scaling(self) -> Any:
        return self.layer.scaling[self.adapter] * self.layer.factor

    @property
    def dropout(self) -> float:
        """The probability of input dropout that acts now: 0 outside training."""
        drop = self.layer._modules[f"{self.layer.attached[self.adapter].config.prefix}dropout"]._modules[self.adapter]  # type: ignore[union-attr]
        return float(drop.p) if isinstance(drop, nn.Dropout) and drop.training and not self.resting else 0.0

    @property
    def training(self) -> bool:
        return self.layer.training and not self.resting

    @property
    def apart(self) -> bool:
        """Whether the layer is being recomputed with a graph of its own: what was computed outside of it must be computed again inside."""
        return apart()
