"""An ordinary floating tensor."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..sharding import whole
from .base import Codec, codecs


class Plain(Codec):
    """The weight is a parameter of the module, in its own layout."""

    plain: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        return True

    def weight(self, module: nn.Module, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        w = whole(getattr(module, name))
        return w if dtype is None else w.to(dtype)

    def dtype(self, module: nn.Module, name: str = "weight") -> torch.dtype:
        w: Tensor = getattr(module, name)
        return w.dtype if w.is_floating_point() else torch.float32

    def device(self, module: nn.Module, name: str = "weight") -> torch.device:
        w: Tensor = getattr(module, name)
        return w.device

    def check(self, module: nn.Module) -> None:
        w = module._parameters.get("weight")
        if w is not None and not w.is_floating_point():
            known = ", ".join(str(c.name) for c in codecs() if not c.plain)
            raise ConfigError(
                f"The weight of a {type(module).__name__} is stored in {str(w.dtype).removeprefix('torch.')}, in a way that veneer does not know. It reads "
                f"{known}; load the model with one of these, or unquantised."
            )
