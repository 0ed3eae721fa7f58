"""Layers whose weights accelerate keeps elsewhere (on the CPU, in a file) and brings in for each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


def fetched(module: nn.Module, read: Callable[[], Tensor]) -> Tensor:
    """What `read` gives of the module's tensors, which are brought in for that if need be."""
    t = read()
    if not t.is_meta or _hook(module) is None:
        return t
    with brought_in(module):
        return read()


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate has put a forward of its own into the module, which moves inputs, brings in weights, and runs this very module."""
    return "_hf_hook" in module.__dict__


def around_call(module: nn.Module, call: Callable[[Any, Any], Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What `call` makes of a call's arguments, with the module's weights there and all else done that its hook does around a call."""
    hook: Any = module.__dict__["_hf_hook"]
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return hook.post_forward(module, call(args, kwargs))


def forget_hook(module: nn.Module, state: dict[str, Any]) -> None:
    """Take that forward out of a copy of the module's attributes."""
    if not is_hooked(module):
        return
    del state["_hf_hook"], state["forward"]
    old = state.pop("_old_forward")
    if getattr(old, "__func__", None) is not type(module).forward:
        state["forward"] = old


def stay(new: nn.Module, old: nn.Module) -> None:
    """Let the weights of a copy be its own, which stay where they are used: nothing is brought in over them."""
    for module, copy in zip(old.modules(), new.modules(), strict=True):
        hook = _hook(copy)
        if hook is None:
            continue
        with brought_in(module):
            for name, t in module.named_parameters(recurse=hook.place_submodules):
                path, _, key = name.rpartition(".")
                copy.get_submodule(path)._parameters[key] = nn.Parameter(t.detach().clone(), requires_grad=t.requires_grad)
            for name, b in module.named_buffers(recurse=hook.place_submodules):
                path, _, key = name.rpartition(".")
                copy.get_submodule(path)._buffers[key] = b.detach().clone()
        hook.offload, hook.weights_map = False, None


def kept(module: nn.Module, name: str, t: Tensor) -> Tensor:
    """One of the module's own tensors, wherever it is kept; `t`: as it stands in the module."""
    hook = _hook(module) if t.is_meta else None
    if hook is None or hook.weights_map is None:
        return t
    value: Tensor = hook.weights_map[name]
    return value


def keep(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let these values, by name, be what is brought in for the module's calls from here on. They are kept on the CPU."""
    kept = _hook(module).weights_map  # the part of a store that begins with the module's name
    store = getattr(kept.dataset, "state_dict", kept.dataset)  # of weights in files: what goes before them
    for name, t in tensors.items():
        store[kept.prefix + name] = t.detach().to("cpu")
