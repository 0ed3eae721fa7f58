"""Methods that act when an optimizer steps: schedules, penalties and projections of gradients, by themselves in any training loop."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..errors import ConfigError
from ..sharding import stepped_flat
from .holders import Attached, Tensors, opened

if TYPE_CHECKING:
    from ..method import Method
    from .place import Place
    from .route import Switch


@dataclass(eq=False)
class Watched:
    """One adapter whose method acts at every step of an optimizer that trains it.

    Attributes:
        config: the adapter's own, which is saved; a layer's may be a copy with other values.
        step: how many steps have been made.
    """

    config: Method
    attached: list[Attached]
    step: int = 0

    @property
    def places(self) -> list[Place]:
        return [a.place for a in self.attached if a.place is not None]

    def leaves(self) -> dict[str, tuple[Attached, str]]:
        return {f"{a.place.name}.{n}": (a, n) for a in self.attached if a.place is not None for n in a.leaves if n not in a.derived}

    def parameters(self) -> set[int]:
        return {id(a.tensor(n)) for a in self.attached for n in a.leaves if n not in a.derived and a.tensor(n).requires_grad}


_switches: weakref.WeakSet[Switch] = weakref.WeakSet()
_installed = False
_paused: ContextVar[bool] = ContextVar("paused", default=False)


def watch(switch: Switch, adapter: str, config: Method, attached: Sequence[Attached]) -> None:
    """Let the method of these attached adapters act at each optimizer step, if it has something to do there."""
    if attached and config.acts():
        switch.watched[adapter] = Watched(config, list(attached))
        enlist(switch)


def ask(switch: Switch, name: str, *args: Any) -> None:
    """Call a method of the config of every adapter that trains, with its places: what a schedule offers to a loop of the user's own."""
    with torch.no_grad():
        for w in switch.watched.values():
            if hasattr(w.config, name) and w.parameters():
                getattr(w.config, name)(w.places, *args)


def check_saving(switch: Switch | None, adapter: str) -> None:
    """Let a method that acts at steps bring its config up to date, and refuse, before it is saved.

    Raises:
        SaveError: if what would be saved is not what the method promises.
    """
    w = switch.watched.get(adapter) if switch is not None else None
    if w is not None:
        w.config.check_saving(w.places, w.step)


def carried(switch: Switch | None, *, leaves: bool = False) -> dict[str, Tensor]:
    """What the methods of a model's adapters remember from step to step, and how many steps they have made. All processes have to call this.

    Args:
        leaves: the adapters' own tensors as well, where what is saved of them is a part (AdaLoRA's live ranks).

    Returns:
        "<adapter>/<name>" -> a tensor, whole on every process; numbers have no dimension.
    """
    out: dict[str, Tensor] = {}
    for adapter, w in switch.watched.items() if switch is not None else ():
        with opened(w.attached), torch.no_grad():
            found = {"step": w.step, **w.config.carried(w.places)} if w.step else {}
            if found and leaves:
                found |= {k: a.tensor(n).detach().clone() for k, (a, n) in w.leaves().items()}
        out.update({f"{adapter}/{name}": torch.as_tensor(value) for name, value in found.items()})
    return out


def carry_on(switch: Switch | None, given: Mapping[str, Tensor]) -> None:
    """Let the methods of a model's adapters remember what `carried` gave and nothing else. All processes have to call this.

    Raises:
        LoadError: if it is not of these layers.
    """
    for adapter, w in switch.watched.items() if switch is not None else ():
        mine: dict[str, Any] = {
            k.rpartition("/")[2]: v if v.ndim else v.item() for k, v in given.items() if k.rpartition("/")[0] == adapter
        }
        step = int(mine.pop("step", 0))
        with opened(w.attached), torch.no_grad():
            w.config.carry_on(w.places, mine)
            for key, (a, n) in w.leaves().items():
                if key in mine:
                    a.tensor(n).copy_(mine[key])
        w.step = step


def enlist(switch: Switch) -> None:
    """Hook into every optimizer, once for all models."""
    global _installed
    _switches.add(switch)
    if not _installed:
        register_optimizer_step_pre_hook(_before)
        register_optimizer_step_post_hook(_after)
        _installed = True


@contextmanager
def paused() -> Iterator[None]:
    """Within the block, optimizers make no steps that count: torch makes one with a rate of zero to find out what state an optimizer has."""
    before = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(before)


def _trained_by(optimizer: Optimizer) -> list[tuple[Switch, Watched]]:
    if _paused.get():
        return []
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]} if _switches else set()
    return [(s, w) for s in list(_switches) for w in s.watched.values() if ids & w.parameters()]


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _check_flat(optimizer)
    for _, w in _trained_by(optimizer):
        w.step = w.step or _made_before(optimizer, w)
        with opened(w.attached):
            _penalise(w)
            with torch.no_grad():
                w.config.before_step(w.places, w.step)


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for _, w in _trained_by(optimizer):
        w.step += 1
        with opened(w.attached), torch.no_grad():
            w.config.after_step(w.places, w.step)


def _check_flat(optimizer: Optimizer) -> None:
    """Raise ConfigError if DeepSpeed or FSDP1 keeps the gradients of a method that acts on each of them in flat pieces, which this optimizer steps."""
    pieces = [p for group in optimizer.param_groups for p in group["params"]] if _switches else []
    if not pieces or any(p.ndim != 1 for p in pieces):
        return
    for w in (w for s in list(_switches) for w in s.watched.values() if w.config.hooks_in()):
        for a in w.attached:
            for n, leaf in a.leaves.items():
                t = a.tensor(n) if n not in a.derived else None
                if t is not None and t.requires_grad and stepped_flat(t, len(leaf.shape), optimizer, pieces):
                    raise ConfigError(
                        f"{type(w.config).__name__} acts at every optimizer step on the gradient of each tensor, which DeepSpeed's ZeRO and FSDP1 keep in "
                        "flat pieces instead. Train it with DistributedDataParallel or FSDP2 (veneer.distributed.shard)."
                    )


def _made_before(optimizer: Optimizer, w: Watched) -> int:
    """How many steps an optimizer that goes on from a checkpoint has made."""
    ids = w.parameters()
    states = (optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"] if id(p) in ids)
    return max((int(s["step"]) for s in states if "step" in s), default=0)


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
