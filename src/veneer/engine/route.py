"""Which adapters act in a call. The choice travels with the call and its thread, never as state of the layers.

From the strongest: a choice made for a block of code (`using`, `mixed`, `disabled`), a choice made for one layer, the last `set_adapter` of this
thread, the last `set_adapter` of any thread.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RouteError, hint
from .holders import visited
from .steps import Watched, enlist

BASE = "__base__"  # in a mixed batch: this row takes no adapter
_tokens = itertools.count()


Facts = Mapping[str, Tensor]  # what one adapter's change needs to know of a call, a row of each tensor for a row of the batch


@dataclass(frozen=True)
class Choice:
    """`names`: the adapters that act, in order;  `rows`: instead, one name per row of the batch;  `enabled`: False for none at all;
    `facts`: by adapter, what a change that depends on the call has to know of it;  `within`: the backward that it was made in, -1 for none."""

    names: tuple[str, ...] | None = None
    rows: tuple[str, ...] | None = None
    enabled: bool = True
    facts: Mapping[str, Facts] = field(default_factory=dict)
    within: int = -1

    @property
    def acting(self) -> tuple[str, ...]:
        """The adapters that act on any row, in order."""
        if not self.enabled:
            return ()
        return self.names or () if self.rows is None else tuple(n for n in dict.fromkeys(self.rows) if n != BASE)


History = deque[tuple[int, Callable[[], Choice | None], bool]]  # (autograd's clock, from then on this choice, whether a block's)


class Switch:
    """What all adapted layers of one model share: which adapters act by default."""

    def __init__(self, names: Sequence[str] = (), enabled: bool = True) -> None:
        self.token = next(_tokens)
        self.default = Choice(tuple(names), None, enabled)
        self.trained: History | None = None  # that of the last thread to run with gradients: for recomputation in another thread
        self.frozen_before: dict[str, bool] = {}  # requires_grad of the base's parameters before the first adapter
        self.shortcuts: dict[str, tuple[str, Any]] = {}  # what encoders had set before their short ways were closed, by path
        self.watched: dict[str, Watched] = {}  # adapters whose methods act when an optimizer steps
        self.untied: list[Any] = []  # configs whose tie_word_embeddings a merge has set False
        self.off: dict[nn.Module, None] = {}  # what was switched off by itself, in order
        self.layers: list[weakref.ref[Any]] = []  # the adapted layers
        self.replaced: Any = None  # the model's stack of layers before it was rebuilt from ranges of itself
        self.compiled = False  # whether compiled code may run them: who acts is then shown to each
        _switches.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("token", "trained", "layers", "compiled")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.trained = None
        self.token = next(_tokens)  # a copy of a model has choices of its own
        self.compiled = False
        self.__dict__.setdefault("replaced", None)
        self.__dict__.setdefault("layers", [])  # its layers may have come before it
        _switches.add(self)
        if self.watched:
            enlist(self)

    def set(self, names: Sequence[str]) -> None:
        """Make `names` act from now on in this thread, and in threads that have made no choice."""
        self.default = replace(self.default, names=tuple(names))
        _thread.set({**_thread.get(), self.token: self.default})
        self.show()
        _mirror(self)

    def enable(self, enabled: bool) -> None:
        """Switch all adapters on or off from now on in this thread, and in threads that have made no choice."""
        self.default = replace(self.default, enabled=enabled)
        mine = _thread.get().get(self.token)
        if mine is not None:
            _thread.set({**_thread.get(), self.token: replace(mine, enabled=enabled)})
        self.show()
        _mirror(self)

    def show(self) -> None:
        """Let compiled code know who acts by default."""
        for layer in self.shown():
            layer.show(self.default)

    def alive(self) -> list[Any]:
        """The adapted layers that there are."""
        found = [layer for ref in self.layers if (layer := ref()) is not None]
        if len(found) < len(self.layers):
            self.layers[:] = map(weakref.ref, found)
        return found

    def shown(self) -> list[Any]:
        """Those that compiled code may run, which have to know of each choice."""
        return self.alive() if self.compiled else []

    def chosen(self) -> Choice:
        """The choice that holds here and now, single layers' own aside."""
        return self.holds()[0]

    def lasting(self) -> Choice:
        """The choice that holds here outside of any block."""
        return _thread.get().get(self.token) or self.default

    def current(self, own: Choice | None) -> Choice:
        """The choice for a layer that is being run; `own`: what was set on that layer alone."""
        if torch.compiler.is_compiling():
            choice, block = _local.mirror.get(self.token, (self.default, False))
            return choice if own is None or block else own
        made, task = _call.get().get(self.token), torch._C._current_graph_task_id()
        if task != -1 and (made is None or made.within != task):
            choice, block = self._recalled()
            return choice if own is None or block else own
        choice = made or _thread.get().get(self.token) or self.default
        history = _local.history.get(self.token)
        if history is None or history[-1][1]() is not choice:
            self.note(choice, made is not None)
        elif torch.is_grad_enabled():
            self.trained = history
        return choice if own is None or made is not None else own

    def recalls(self) -> bool:
        """Whether what holds here is what held in a forward that a backward is recomputing; a block inside of what is recomputed holds as any other."""
        made, task = _call.get().get(self.token), torch._C._current_graph_task_id()
        return task != -1 and (made is None or made.within != task)

    def holds(self) -> tuple[Choice, bool]:
        """(the choice that holds here and now, whether a block made it)."""
        if self.recalls():
            return self._recalled()
        made = _call.get().get(self.token)
        return made or _thread.get().get(self.token) or self.default, made is not None

    def _recalled(self) -> tuple[Choice, bool]:
        """The same for a recomputation in a backward, whatever holds now: as when the node was made that is being run."""
        history, node = _local.history.get(self.token) or self.trained, torch._C._current_autograd_node()
        if not history or node is None:
            return self.default, False
        at = node._sequence_nr()
        _, choice, block = next((entry for entry in reversed(history) if entry[0] <= at), history[0])
        then = choice()
        if then is None:
            raise RouteError(
                "What was known of a call is gone, and its layers are being recomputed in a backward. Keep the model's output until then."
            )
        return then, block

    def note(self, choice: Choice, block: bool) -> None:
        """Remember that the choice holds from now on in this thread."""
        history = _local.history.get(self.token)
        task = torch._C._current_graph_task_id()
        if history is None:
            if task != -1:  # a thread of autograd's own: its clock is not that of the forward
                return
            history = _local.history[self.token] = deque(maxlen=1024)
        if not history or history[-1][1]() is not choice:
            now = torch._C._autograd._get_sequence_nr()
            if history and history[-1][0] == now:
                history.pop()  # nothing was made meanwhile that could be recomputed
            history.append((now, weakref.ref(choice) if choice.facts else lambda: choice, block))
        if torch.is_grad_enabled() and task == -1:
            self.trained = history


def apart() -> bool:
    """Whether this is a recomputation with a graph of its own (reentrant checkpointing), which ends where it begins."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    node = torch._C._current_autograd_node()
    return node is not None and torch.is_grad_enabled() and node.name().startswith("CheckpointFunction")


class _Local(threading.local):
    def __init__(self) -> None:
        self.history: dict[int, History] = {}
        self.mirror: dict[int, tuple[Choice, bool]] = {}  # compiled code cannot read context variables


_empty: Mapping[int, Choice] = {}
_call: ContextVar[Mapping[int, Choice]] = ContextVar("veneer_call", default=_empty)
_thread: ContextVar[Mapping[int, Choice]] = ContextVar("veneer_thread", default=_empty)
_local = _Local()
_switches: weakref.WeakSet[Switch] = weakref.WeakSet()


def _mirror(switch: Switch) -> None:
    choice, block = holds = switch.holds()
    switch.note(*holds)
    if here := block or switch.token in _thread.get() or switch.recalls():
        _local.mirror[switch.token] = holds
    else:  # the thread goes by the default, which another one may change
        _local.mirror.pop(switch.token, None)
    for layer in switch.shown():
        layer.show_here(choice if here else None)


def chosen_here(switch: Switch) -> Choice | None:
    """What holds in this thread for compiled code; None if the thread has made no choice."""
    held = _local.mirror.get(switch.token)
    return None if held is None else held[0]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def ready() -> bool:
    """Runs while something is being compiled, and is no part of what is compiled: lay out what compiled code reads, from now on."""
    for switch in [s for s in _switches if not s.compiled]:
        switch.compiled = True
        for layer in switch.alive():
            layer.lay_out()
    return True


@contextmanager
def choosing(switch: Switch, choice: Choice) -> Iterator[None]:
    """Let `choice` hold for the code inside, in this thread (and asyncio task) only."""
    task, before = torch._C._current_graph_task_id(), _local.mirror.get(switch.token)
    reset = _call.set({**_call.get(), switch.token: choice if task == choice.within else replace(choice, within=task)})
    _mirror(switch)
    try:
        yield
    finally:
        _call.reset(reset)
        _mirror(switch)
        if task != -1 and before is not None:
            _local.mirror[switch.token] = before
            for layer in switch.shown():
                layer.show_here(before[0])


def find_switch(model: nn.Module) -> Switch | None:
    """What the model's adapted layers share, or None if it has none."""
    return next((s for _, m in visited(model) if isinstance(s := m.__dict__.get("switch"), Switch)), None)


def the_switch(model: nn.Module) -> Switch:
    """The same, an error if there are no adapters."""
    switch = find_switch(model)
    if switch is None:
        raise RouteError("The model has no adapters. Attach one with get_peft_model or inject_adapter_in_model.")
    return switch


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters, in the order in which the layers list them."""
    found: dict[str, None] = {}
    for m in _switched(model):
        found |= dict.fromkeys(m.adapters())
    return list(found)


def _switched(model: nn.Module) -> Iterator[Any]:
    return (m for _, m in visited(model) if isinstance(m.__dict__.get("switch"), Switch))


def check_known(names: Iterable[str], known: Sequence[str]) -> None:
    """Raise RouteError for a name that no adapter has."""
    for n in names:
        if n not in known:
            raise RouteError(f"There is no adapter {n!r}; the model has {sorted(known)}.{hint(n, known)}")


def check_there(names: Iterable[str], wrappers: Iterable[Any]) -> None:
    """The same for adapters of these layers, of which no more are asked than it takes to find the names."""
    names = list(names)
    known: dict[str, None] = {}
    missing = set(names)
    for wrapper in wrappers:
        if not missing:
            return
        there = wrapper.adapters()
        missing.difference_update(there)
        known |= dict.fromkeys(there)
    check_known(names, list(known))


@contextmanager
def using(model: nn.Module, names: str | Sequence[str]) -> Iterator[None]:
    """Let these adapters act for the code inside, in this thread only; nothing of the model changes.

    Raises:
        RouteError: for a name that is not there.
    """
    chosen = (names,) if isinstance(names, str) else tuple(names)
    switch = the_switch(model)
    check_there(chosen, _switched(model))
    with choosing(switch, Choice(chosen)):
        yield


@contextmanager
def mixed(model: nn.Module, rows: Sequence[str]) -> Iterator[None]:
    """Let each row of the batch have the adapter named for it, `"__base__"` for none, for the code inside.

    Raises:
        RouteError: for a name that is not there, before anything runs.
    """
    switch = the_switch(model)
    check_there([r for r in dict.fromkeys(rows) if r != BASE], _switched(model))
    with choosing(switch, Choice(None, tuple(rows))):
        yield


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let no adapter act for the code inside, in this thread only. What trains, and what is merged, stays so."""
    switch = find_switch(model)
    if switch is None:
        yield
        return
    with choosing(switch, replace(switch.chosen(), enabled=False)):
        yield
