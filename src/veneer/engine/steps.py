"""Methods that act when an optimizer steps: schedules, penalties and projections of gradients, by themselves in any training loop."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .holders import Attached, Tensors

if TYPE_CHECKING:
    from .route import Switch


@dataclass(eq=False)
class Watched:
    """One adapter whose method acts at every step of an optimizer that trains it."""

    attached: list[Attached]
    step: int = 0

    def parameters(self) -> set[int]:
        return {id(a.tensor(n)) for a in self.attached for n, leaf in a.leaves.items() if leaf.trainable and n not in a.derived}


_switches: weakref.WeakSet[Switch] = weakref.WeakSet()
_installed = False


def watch(switch: Switch, adapter: str, attached: Sequence[Attached]) -> None:
    """Let the method of these attached adapters act at each optimizer step, if it has something to do there."""
    from ..method import Method

    cls = type(attached[0].config) if attached else Method
    if all(getattr(cls, name) is getattr(Method, name) for name in ("before_step", "after_step", "penalty")):
        return
    switch.watched[adapter] = Watched(list(attached))
    enlist(switch)


def enlist(switch: Switch) -> None:
    """Hook into every optimizer, once for all models."""
    global _installed
    _switches.add(switch)
    if not _installed:
        register_optimizer_step_pre_hook(_before)
        register_optimizer_step_post_hook(_after)
        _installed = True


def _trained_by(optimizer: Optimizer) -> list[tuple[Switch, Watched]]:
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]} if _switches else set()
    return [(s, w) for s in list(_switches) for w in s.watched.values() if ids & w.parameters()]


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for _, w in _trained_by(optimizer):
        places = [a.place for a in w.attached if a.place is not None]
        _penalise(w)
        with torch.no_grad():
            w.attached[0].config.before_step(places, w.step)


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for _, w in _trained_by(optimizer):
        w.step += 1
        with torch.no_grad():
            w.attached[0].config.after_step([a.place for a in w.attached if a.place is not None], w.step)


def _penalise(w: Watched) -> None:
    """Add the gradient of the method's penalty to the gradients, as if it had stood in the loss."""
    with torch.enable_grad():
        terms = [a.config.penalty(Tensors(a), a.place) for a in w.attached]
        total = sum((t for t in terms if t is not None), start=torch.zeros(()))
        leaves = [t for a in w.attached for n in a.leaves if n not in a.derived and (t := a.tensor(n)).requires_grad and t.grad is not None]
        if not total.requires_grad or not leaves:
            return
        for t, g in zip(leaves, torch.autograd.grad(total, leaves, allow_unused=True), strict=True):
            if g is not None and t.grad is not None:
                t.grad.add_(g.to(t.grad.dtype))
