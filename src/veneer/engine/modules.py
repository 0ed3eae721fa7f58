"""Whole modules that belong to an adapter and act outside the model's layers: the tuner keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .holders import Keyed, keep_dtypes


@dataclass(eq=False)
class Part:
    """One module of one adapter.

    Attributes:
        name: in the file; its first part is the name of the container in memory.
        trained: the names of its parameters that train.
    """

    name: str
    module: nn.Module
    trained: frozenset[str]

    @property
    def container(self) -> str:
        return self.name.partition(".")[0]

    def set_requires_grad(self, requires_grad: bool) -> None:
        """Let what trains of it get gradients, or not."""
        for name, p in self.module.named_parameters():
            p.requires_grad_(requires_grad and name in self.trained)

    def slots(self, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """(name in the file, name in memory, key, owner) of each tensor that is saved."""
        for name, key, owner in saved_tensors(self.module):
            yield f"{self.name}.{name}", f"{self.container}.{adapter}.{name}", key, owner


def saved_tensors(module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(name, last part of it, owner) of each parameter and each buffer that a state dict has."""
    for path, owner in module.named_modules():
        for key in [*owner._parameters, *(b for b in owner._buffers if b not in owner._non_persistent_buffers_set)]:
            if getattr(owner, key) is not None:
                yield f"{path}.{key}" if path else key, key, owner


def parts_of(modules: Mapping[str, nn.Module], *, meta: bool = False) -> list[Part]:
    """The modules made ready to be kept; `meta`: their parameters on the meta device, for a file to fill."""
    out = []
    for name, module in modules.items():
        trained = frozenset(n for n, p in module.named_parameters() if p.requires_grad)
        for owner in module.modules() if meta else ():
            for key, p in owner._parameters.items():
                if p is not None:
                    owner._parameters[key] = nn.Parameter(p.to(torch.device("meta")), requires_grad=p.requires_grad)
        keep_dtypes(module)
        out.append(Part(name, module, trained))
    return out


def hold_parts(owner: nn.Module, adapter: str, parts: list[Part]) -> None:
    """Put an adapter's modules into `owner`'s containers."""
    for part in parts:
        if part.container not in owner._modules:
            owner._modules[part.container] = Keyed()
        owner._modules[part.container]._modules[adapter] = part.module  # type: ignore[union-attr]


def drop_parts(owner: nn.Module, adapter: str, parts: list[Part]) -> None:
    """Take them out, and containers that are then empty."""
    for part in parts:
        container = owner._modules[part.container]
        assert container is not None
        container._modules.pop(adapter, None)
        if not container._modules:
            del owner._modules[part.container]
