"""Places where an adapter acts before and after a whole module, which runs once for all rows of the batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Adaptable

Rows = Sequence[int] | None  # the rows of the batch that an adapter acts on; None: all


class WholeSite(Adaptable):
    """Abstract. No tensor of the module changes, so nothing can be merged; and a module that writes into a cache must not run in parts."""

    @abstractmethod
    def run(self, module: nn.Module, effects: Sequence[tuple[Any, Rows]], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The module's output with each effect on its own rows."""

    def where(self, module: nn.Module) -> tuple[torch.device, torch.dtype]:
        first = next((p for p in module.parameters() if p.is_floating_point()), None)
        if first is not None:
            return first.device, first.dtype
        return next((p.device for p in module.parameters()), torch.device("cpu")), torch.float32

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        return {}

    def substituted(self, module: nn.Module, changes: Any, frozen: Mapping[str, Any]) -> dict[str, Any]:
        return dict(frozen)

    def apply(self, module: nn.Module, changes: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], frozen: Mapping[str, Any]) -> Any:
        return self.run(module, [(change, None) for change, _ in changes], args, kwargs)


def taken(x: Tensor, rows: Rows) -> Tensor:
    """These rows of x."""
    return x if rows is None else x.index_select(0, torch.tensor(rows, device=x.device))


def put(x: Tensor, rows: Rows, new: Tensor) -> Tensor:
    """x with these rows replaced."""
    return new if rows is None else x.index_copy(0, torch.tensor(rows, device=x.device), new)


def added(x: Tensor, rows: Rows, d: Tensor) -> Tensor:
    """x with d added to these rows."""
    d = d.to(x.dtype)
    return x + d if rows is None else x.index_add(0, torch.tensor(rows, device=x.device), d)


def with_first(output: Any, first: Tensor) -> Any:
    """A module's output with another first tensor."""
    return (first, *output[1:]) if isinstance(output, tuple) else first


def first_of(output: Any) -> Tensor:
    """The first tensor of a module's output."""
    y: Tensor = output[0] if isinstance(output, tuple) else output
    return y
