"""torch's encoders in eval mode: one fused function of all weights, which passes by what stands in a module's place. With adapters they go the long way."""

from __future__ import annotations

from typing import Any

from torch import nn

from .holders import visited
from .route import Switch
from .wrapper import Wrapper

_SHORT: dict[type[nn.Module], tuple[str, Any]] = {  # what a module asks before it goes the short way, and what makes it not
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def close_shortcuts(model: nn.Module, switch: Switch) -> None:
    """Let every encoder with an adapter inside call its modules."""
    for path, module in visited(model):
        for kind, (name, off) in _SHORT.items():
            if isinstance(module, kind) and getattr(module, name, off) and any(isinstance(m, Wrapper) for _, m in visited(module)):
                switch.shortcuts[path] = name, getattr(module, name)
                setattr(module, name, off)


def open_shortcuts(model: nn.Module, switch: Switch) -> None:
    """The short ways are as they were before the first adapter."""
    for path, module in visited(model) if switch.shortcuts else ():
        if path in switch.shortcuts:
            setattr(module, *switch.shortcuts[path])
    switch.shortcuts = {}
