"""An ordinary floating tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Plain:
    """The weight is a parameter of the module, in its own layout."""

    plain = True

    def matches(self, module: nn.Module) -> bool:
        return True

    def weight(self, module: nn.Module, name: str) -> Tensor:
        w: Tensor = getattr(module, name)
        return w

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        w: Tensor = getattr(module, name)
        return w.dtype if w.is_floating_point() else torch.float32

    def linear(self, module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module(x)
        return y
