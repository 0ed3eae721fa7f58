"""Calls of a model whose adapters have to know something of them: which task a row is of, where in it an adapter begins to act."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .route import Choice, Facts, Switch, choosing, disabled


@dataclass
class Call:
    """One call of the user's model.

    Attributes:
        model: the user's model, or its encoder.
        adapter: the adapter that asks.
        home: the tuner.
        inputs: the arguments by name, as far as the model's forward names them.
        given: those that were meant for the method (see `Method.takes`).
        rows: the rows of the batch that are the adapter's; None: all.
        memory: the adapter's own, kept through all steps of one `generate`; a call of its own has an empty one.
        run: runs the model with these inputs, changed by keyword arguments, without any adapter.
        facts: what the adapter's method has found out.
    """

    model: nn.Module
    adapter: str
    home: Any
    inputs: Mapping[str, Any]
    given: Mapping[str, Any]
    rows: list[int] | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    run: Callable[..., Any] = lambda **changed: None
    facts: Facts = field(default_factory=dict)


def taken(configs: Mapping[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take out of the arguments what is meant for a method."""
    names = {n for c in configs.values() for n in getattr(c, "takes", ())}
    return {n: kwargs.pop(n) for n in names & set(kwargs)}


def routing(configs: Mapping[str, Any], choice: Choice) -> list[str]:
    """The adapters that act and have to know something of the call."""
    return [n for n in choice.acting if getattr(configs.get(n), "routes", False)]


@contextmanager
def knowing(
    switch: Switch, home: Any, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Mapping[str, Any],
    memory: dict[str, dict[str, Any]],
) -> Iterator[Callable[[Any], Any]]:  # fmt: skip
    """Let the adapters that route find out about this call of a model, for the code inside.

    Args:
        home: the tuner.
        model: the user's model, or its encoder.
        memory: by adapter, what is kept from call to call.

    Yields:
        a function that makes of the call's output what is returned.
    """
    choice = switch.current(None)
    names = routing(home.peft_config, choice)
    if not names:
        yield lambda output: output
        return
    inputs = _named(model, args, kwargs)

    def run(**changed: Any) -> Any:
        with disabled(model):
            return model(**{**inputs, **changed})

    calls = {}
    for name in names:
        mine = None if choice.rows is None or set(choice.rows) == {name} else [i for i, row in enumerate(choice.rows) if row == name]
        call = calls[name] = Call(model, name, home, inputs, given, mine, memory.setdefault(name, {}), run)
        call.facts = home.peft_config[name].facts(call)

    def finish(output: Any) -> Any:
        for name, call in calls.items():
            with choosing(switch, Choice((name,))):
                output = home.peft_config[name].finish(call, output)
        return output

    with choosing(switch, replace(choice, facts={**choice.facts, **{name: call.facts for name, call in calls.items()}})):
        yield finish


@contextmanager
def knowing_each(switch: Switch, home: Any, given: Mapping[str, Any]) -> Iterator[None]:
    """The same for every call that the code inside makes in this thread, as `generate` does, once per token."""
    model = home.model
    if not routing(home.peft_config, switch.chosen()):
        yield
        return
    thread = threading.get_ident()
    memory: dict[str, dict[str, Any]] = {}
    inside: list[tuple[ExitStack, Callable[[Any], Any]]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            stack = ExitStack()
            inside.append((stack, stack.enter_context(knowing(switch, home, module, args, kwargs, given, memory))))

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != thread or not inside:
            return None
        stack, finish = inside.pop()
        with stack:
            return finish(output) if output is not None and module is model else None

    with ExitStack() as stack:
        entries: list[Any] = [model]
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            entries.append(model.get_encoder())
        for entry in entries:
            stack.callback(entry.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(entry.register_forward_hook(leave, always_call=True).remove)
        yield


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if not args:
        return dict(kwargs)
    by_place = inspect.signature(model.forward).bind_partial(*args).arguments
    return {**by_place, **kwargs}
