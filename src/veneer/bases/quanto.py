"""optimum-quanto's quantised modules: integers of 8, 4 and 2 bits, and float8."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .base import Codec, class_names, twin


class Quanto(Codec):
    """QLinear and QConv2d: `weight` is a QTensor once the module was frozen (`optimum.quanto.freeze`)."""

    name: ClassVar[str | None] = "quanto"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})

    def matches(self, module: nn.Module) -> bool:
        return ("QModuleMixin", "optimum") in class_names(module) and module._parameters.get("weight") is not None

    def check(self, module: Any) -> None:
        if not module.frozen:
            raise ConfigError("A model of optimum-quanto has to be frozen before it is adapted: call optimum.quanto.freeze(model) first.")
        if module.activation_qtype is not None:
            raise ConfigError(
                f"Layers of optimum-quanto that quantise their activations ({module.activation_qtype.name}) cannot be adapted: their outputs are no "
                "plain tensors. Quantise the weights alone: quantize(model, weights=...), QuantoConfig(activations=None)."
            )

    def weight(self, module: Any, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        with torch.no_grad():
            w: Tensor = module.qweight.dequantize()
        return w.detach() if dtype is None else w.detach().to(dtype)

    def dtype(self, module: Any, name: str = "weight") -> torch.dtype:
        found: torch.dtype = module.weight.dtype
        return found

    def multiply(self, module: Any, x: Tensor) -> Tensor:
        return F.linear(x.to(module.weight.dtype), module.qweight).to(x.dtype)

    @torch.no_grad()
    def written(self, module: Any, w: Tensor) -> nn.Module:
        new = twin(module, weight=nn.Parameter(w.to(module.weight.device, module.weight.dtype), requires_grad=False))
        new.freeze()
        new.weight.requires_grad_(False)
        out: nn.Module = new
        return out
