"""Layers whose weights accelerate keeps elsewhere (on the CPU, in a file) and brings in for each call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _hook(module: nn.Module) -> Any:
    """accelerate's hook that brings the module's own weights in, or None."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return None
    return next((h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False)), None)


def runs_on(module: nn.Module) -> torch.device | None:
    """The device that the weights of an offloaded module are brought to for a call; None for a module that is not offloaded."""
    hook = _hook(module)
    return torch.device(hook.execution_device) if hook is not None else None


@contextmanager
def brought_in(module: nn.Module) -> Iterator[None]:
    """The module's weights there to be read, for the code inside; written values are lost."""
    hook = _hook(module)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def keep(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let these values, by name, be what is brought in for the module's calls from here on. They are kept on the CPU."""
    kept = _hook(module).weights_map  # the part of a store that begins with the module's name
    store = getattr(kept.dataset, "state_dict", kept.dataset)  # of weights in files: what goes before them
    for name, t in tensors.items():
        store[kept.prefix + name] = t.detach().to("cpu")
