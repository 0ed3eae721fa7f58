"""Riemannian preconditioning of LoRA's gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError
from .pairs import damped, gram, pairs, solved


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: Callable[..., Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimizer of the class asked for, before whose steps the gradients of A and B are divided by the metric of the other factor:

    ∇A ← (BᵀB + reg · 1)⁻¹ ∇A,  ∇B ← ∇B (A Aᵀ + reg · 1)⁻¹.  Zhang & Pilanci 2024, arXiv:2402.02347, algorithm 1.

    What trains and is no such factor keeps its gradient. Differs from PEFT's: it is the optimizer itself, no wrapper around it, and a gradient scaler or a
    schedule takes it as it is.

    Args:
        model: with a LoRA that trains.
        optimizer_cls: a class of torch.optim, or any other with its hooks;  kwargs: further arguments for it.
        lr: the learning rate.
        reg: the damping, which keeps the inverse finite while B is zero.

    Raises:
        ConfigError: if no pair of LoRA factors trains, or the learning rate or the damping is not positive; when stepping with a closure, which makes the
            gradients only inside the step.
    """
    for name, value in (("lr", lr), ("reg", reg)):
        if not value > 0:
            raise ConfigError(f"{name} has to be positive, got {value}.")
    held = pairs(model, "Riemannian preconditioning")
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)

    @torch.no_grad()
    def precondition(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(a is not None for a in (*args[1:], kwargs.get("closure"))):  # the first is the optimizer
            raise ConfigError("A Riemannian optimizer steps without a closure: run the backward first, then step().")
        for pair in held:
            a, b = pair.a, pair.b
            if a.grad is not None:
                a.grad.copy_(solved(a.grad, damped(gram(b, 1), reg), 0))
            if b.grad is not None:
                b.grad.copy_(solved(b.grad, damped(gram(a, 0), reg), 1))

    optimizer.register_step_pre_hook(precondition)
    return optimizer
