"""Autocast, as far as the fused functions have to know of it: which dtype it asks for, and keeping it out of where they chose theirs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype in which autocast wants products on this kind of device; None where it is off, or where there is none of it (meta)."""
    return None if kind == "meta" or not torch.is_autocast_enabled(kind) else torch.get_autocast_dtype(kind)


def no_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    """A block in which products keep the dtypes of what they are of."""
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def backward_as_is(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A `backward` that can be gone through once, and computes in the dtypes of its forward also where somebody calls it under autocast."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        kind = grads[0].device.type
        if autocast_dtype(kind) is None:
            return backward(ctx, *grads)
        with no_autocast(kind):
            return backward(ctx, *grads)

    out: Callable[..., Any] = once_differentiable(run)  # type: ignore[no-untyped-call]
    return out


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp …) is on its way, which ordinary functions alone go through."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
