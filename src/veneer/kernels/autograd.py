"""What functions of autograd that are written by hand have in common: keeping out of autocast and of torch.func, and derivatives of their gradients."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype in which autocast wants products on this kind of device; None where it is off, or where there is none of it (meta)."""
    return None if kind == "meta" or not torch.is_autocast_enabled(kind) else torch.get_autocast_dtype(kind)


def no_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    """A block in which products keep the dtypes of what they are of."""
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


Again = Callable[[Any, Tensor], tuple[Tensor, Sequence[Tensor | None]]]


def written_out(again: Again | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a `backward` that is written by hand: it computes in the dtypes of its forward, also where somebody calls it under autocast, and where a graph of
    the gradients is asked for (`create_graph=True`), they are taken of the forward by ordinary functions instead.

    Args:
        again: makes of `ctx` and the output's gradient the output by ordinary functions, and the inputs it is made of, one for each of the forward's
            arguments; None where the backward is no derivative, which then nothing can be the derivative of.
    """

    def of(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, grad: Tensor) -> Any:
            kind = grad.device.type
            with contextlib.nullcontext() if autocast_dtype(kind) is None else no_autocast(kind):
                if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                    return _once_more(again, ctx, grad)
                return backward(ctx, grad)

        return run

    return of


def _once_more(again: Again | None, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if again is None:
        raise RuntimeError(
            "The gradients of this layer have no derivatives: its method takes something else in their place (VeLoRA compresses what they are made of). "
            "Take them without create_graph=True, or use plain LoRA."
        )
    y, inputs = again(_Apart(ctx), grad)
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed and t is not None]
    found = iter(torch.autograd.grad(y.reshape(grad.shape), wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


class _Apart:
    """A `ctx` whose saved tensors are each a view of its own: what is differentiated by one is not also reached through another that was made of it, as
    where a layer runs on its own output, nor by the same tensor in another place."""

    def __init__(self, ctx: Any) -> None:
        self.ctx = ctx
        self.saved_tensors = tuple(t if t is None or not t.requires_grad else t.view_as(t) for t in ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


def stand_in(n: int, like: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Zeros (n,) in the place of a bias that is added, whose gradient does not depend on it; None without a dtype."""
    return None if dtype is None else torch.zeros(n, dtype=dtype, device=like.device, requires_grad=True)


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp …) or torch's forward mode is on its way, or the call is written down as a graph for elsewhere
    (torch.export, torch.jit.trace, ONNX), which is to hold for any number of rows: ordinary functions alone go through these."""
    if torch.compiler.is_compiling():
        return _exporting()
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch._C._is_tracing()


_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 has none


def by_hand(w: Any, *parts: Tensor) -> bool:
    """Whether a fused function, which has no gradient for W and goes through no transform of torch.func, is to be taken."""
    if isinstance(w, Tensor) and w.requires_grad and torch.is_grad_enabled():
        return False
    return not transformed() and all(map(ordinary, (w, *parts)))


def ordinary(t: Any) -> bool:
    """Whether the fused functions know how to handle it: no sharded or otherwise special tensor."""
    return type(t) in (Tensor, torch.nn.Parameter, FakeTensor) or not isinstance(t, Tensor) or torch.compiler.is_compiling()
