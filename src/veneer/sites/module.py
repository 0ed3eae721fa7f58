"""A module of any kind as a whole: what is changed are all of its tensors, parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..engine.substitute import call_with
from .base import Adaptable

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # no forward of their own


class ModuleSite(Adaptable):
    """The module runs with other tensors in the place of its own: a copy of it without a second module."""

    kind: ClassVar[str] = "module"

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return not isinstance(module, CONTAINERS) and next(module.parameters(), None) is not None

    def where(self, module: nn.Module) -> tuple[torch.device, torch.dtype]:
        first = next((p for p in module.parameters() if p.is_floating_point()), next(module.parameters()))
        return first.device, first.dtype if first.is_floating_point() else torch.float32

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}

    def substituted(self, module: nn.Module, changes: Any, frozen: Mapping[str, Any]) -> dict[str, Any]:
        ((swap, _),) = changes
        return {**frozen, **{name: t.clone() for name, t in swap.tensors.items()}}

    def apply(self, module: nn.Module, changes: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], frozen: Mapping[str, Any]) -> Any:
        ((swap, _),) = changes
        return call_with(module, {**frozen, **swap.tensors}, args, kwargs)
