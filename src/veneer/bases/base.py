"""The contract of a codec: how a frozen weight is stored, read, multiplied and written back."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Codec(Protocol):
    """One kind of storage. `plain` codecs keep a floating tensor in the layer's own layout."""

    plain: bool

    def matches(self, module: nn.Module) -> bool:
        """Whether the module's weight is stored in this way; never imports the library that made it."""

    def weight(self, module: nn.Module, name: str) -> Tensor:
        """The weight in the module's layout, dequantised if need be."""

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        """The floating dtype that the layer computes in."""

    def linear(self, module: nn.Module, x: Tensor) -> Tensor:
        """x Wᵀ + b as the layer itself computes it."""


def codec_for(module: nn.Module) -> Codec:
    """The codec of a module's storage; the first that matches, plain floating tensors last."""
    return next(c for c in _codecs() if c.matches(module))


def _codecs() -> tuple[Codec, ...]:
    from .plain import Plain

    return (Plain(),)
