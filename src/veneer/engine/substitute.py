"""Run a module with some of its tensors replaced for this one call, without touching the module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .offload import around_call, brought_in, forget_hook, is_hooked


def call_with(module: nn.Module, tensors: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], **attributes: Any) -> Any:
    """`module(*args, **kwargs)` with parameters, buffers or attributes replaced.

    A shallow copy is called, so other threads that run the same module never see the replacement (`torch.func.functional_call` swaps in
    place); while compiling, where copies cannot be traced, functional_call it is. What the module's forward writes into the module (a counter, a loss
    to be picked up) is written into the module itself, unless `attributes` make another one of it.

    Args:
        tensors: by dotted name inside the module; a value may be any object that stands for a tensor, or None.
        attributes: plain attributes of the module itself, such as `groups=1`.
    """
    if is_hooked(module):
        return around_call(module, lambda args, kwargs: _run(module, tensors, attributes, args, kwargs), args, kwargs)
    if torch.compiler.is_compiling() and not attributes and all(isinstance(t, torch.Tensor) for t in tensors.values()):
        if _computed(module, tensors):
            return _uncompiled(module, tensors, args, kwargs)
        return torch.func.functional_call(module, dict(tensors), args, dict(kwargs))
    return _run(module, tensors, attributes, args, kwargs)


@torch._disable_dynamo  # type: ignore[attr-defined]
def _uncompiled(module: nn.Module, tensors: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return _run(module, tensors, {}, args, kwargs)


def _run(
    module: nn.Module, tensors: Mapping[str, Any], attributes: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    copies: list[tuple[nn.Module, nn.Module]] = []
    copy = _replaced(module, tensors, attributes, copies)
    before = [] if attributes else [(m, c, dict(c.__dict__), dict(c._buffers)) for m, c in copies]
    out = copy(*args, **kwargs)
    for original, run, state, buffers in before:
        for name, value in run.__dict__.items():
            if state.get(name, before) is not value and name not in original._parameters and name not in original._buffers:
                original.__dict__[name] = value
        for name, b in run._buffers.items():
            if buffers.get(name) is not b:
                original._buffers[name] = b
    return out


def _replaced(
    module: nn.Module, tensors: Mapping[str, Any], attributes: Mapping[str, Any], copies: list[tuple[nn.Module, nn.Module]]
) -> nn.Module:
    state = dict(module.__dict__)
    computed = _computed(module, tensors)
    copy: nn.Module = object.__new__(_holding(type(module), computed) if computed else type(module))
    forget_hook(module, state)
    state.pop("_compiled_call_impl", None)  # which runs the original
    state["_parameters"], state["_modules"] = dict(module._parameters), dict(module._modules)
    state["_buffers"] = dict(module._buffers)
    bound: Any = state.get("forward")
    if getattr(bound, "__self__", None) is module:
        # an instance's own forward (some wrappers put one there) would run on the original
        state["forward"] = bound.__func__.__get__(copy)
    copy.__dict__ = state
    inner: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        head, dot, tail = name.partition(".")
        if dot:
            inner.setdefault(head, {})[tail] = value
        elif name not in computed:
            for store in (state["_parameters"], state["_buffers"]):
                store.pop(name, None)
            state[name] = value
    for head, rest in inner.items():
        child = state["_modules"][head]
        assert child is not None
        with brought_in(child):
            state["_modules"][head] = _replaced(child, rest, {}, copies)
    state.update(attributes)
    copies.append((module, copy))
    return copy


def _computed(module: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the module's own tensors that are no tensors it holds: a property or a hook computes them in each call."""
    return {n: t for n, t in tensors.items() if "." not in n and n not in module._parameters and n not in module._buffers}


def _holding(kind: type[nn.Module], tensors: Mapping[str, Any]) -> type[nn.Module]:
    """The class with these values, whatever its property (a parametrization) or a hook (weight_norm's, pruning's) would compute in their place."""
    fixed = {n: property(lambda _, t=t: t, lambda _, computed: None) for n, t in tensors.items()}  # type: ignore[misc]
    return type(kind.__name__, (kind,), fixed)
