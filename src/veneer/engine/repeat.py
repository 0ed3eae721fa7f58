"""A call like the last one: where a linear layer's one adapter acts as its leaves stand and no gradient is wanted, what was found out is used again.

For one token the questions that lead to a product (what acts, what it is, how the layer holds its weight) cost as much as the product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..change import Change, Stacking
from ..kernels.autograd import autocast_dtype, transformed
from ..kernels.products import FEW
from ..sites.base import hooked
from .holders import Attached, Kept
from .route import Choice

if TYPE_CHECKING:
    from .layer import AdaptedLayer


@dataclass(frozen=True, eq=False)
class Repeat:
    """What was found out in a call without gradients, and what has to be as it was for the next one to be answered from it."""

    choice: Choice
    attached: Attached
    kept: Kept
    change: tuple[Change, Stacking]
    base: nn.Module
    weight: nn.Parameter
    bias: Tensor | None
    few: Callable[[Tensor], Tensor] | None

    @staticmethod
    def of(layer: AdaptedLayer, choice: Choice) -> Repeat | None:
        """After a call of the layer; None if the next one has to ask everything anew."""
        acting = [a for n in choice.names or () if (a := layer.attached.get(n)) is not None]
        if len(acting) != 1 or (kept := acting[0].kept) is None or not isinstance(kept.change, Change):
            return None
        (a,), site = acting, layer.site
        if not site.ordinary or choice.rows is not None or choice.facts or not choice.enabled:
            return None
        base: Any = layer._modules["base_layer"]
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        if type(weight) is not nn.Parameter or type(bias) not in (nn.Parameter, type(None)) or "bias" in base.__dict__:
            return None
        few = cast(Any, site).for_few(weight, bias, kept.change)
        return Repeat(choice, a, kept, (kept.change, a.config.stacking), base, weight, bias, few)

    def run(self, layer: AdaptedLayer, choice: Choice, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The layer's output, or None if anything is not as it was."""
        if choice is not self.choice or torch.is_grad_enabled() or layer.training or kwargs or len(args) != 1:
            return None
        base, x = self.base, args[0]
        own = base._parameters
        same = own.get("weight") is self.weight and own.get("bias") is self.bias and layer._modules["base_layer"] is base
        if not same or layer.merged_adapters or layer.originals or layer.packed is not None or layer.assumed is not None or hooked(base):
            return None
        a, place = self.attached, self.attached.place
        if type(x) is not Tensor or a.kept is not self.kept or place is None or layer.attached.get(place.adapter) is not a:
            return None
        if not self.kept.holds(place.scaling) or "_original_parameters" in layer.__dict__ or autocast_dtype(x.device.type) is not None:
            return None
        if self.few is not None and x.numel() <= FEW * x.shape[-1] and x.device.type == "cpu" and not transformed():
            return self.few(x)
        site: Any = layer.site
        return site.times(self.weight, self.bias, (self.change,), x)  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the layer, or one from a file, finds out for itself
