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
        model: the user's model.
        adapter: the adapter that asks.
        inputs: the arguments by name, as far as the model's forward names them.
        given: those that were meant for the method (see `Method.takes`).
        memory: the adapter's own, kept through all steps of one `generate`; a call of its own has an empty one.
        run: runs the model with these inputs, changed by keyword arguments, without any adapter.
    """

    model: nn.Module
    adapter: str
    inputs: Mapping[str, Any]
    given: Mapping[str, Any]
    memory: dict[str, Any] = field(default_factory=dict)
    run: Callable[..., Any] = lambda **changed: None


def taken(configs: Mapping[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take out of the arguments what is meant for a method."""
    names = {n for c in configs.values() for n in getattr(c, "takes", ())}
    return {n: kwargs.pop(n) for n in names & set(kwargs)}


def routing(configs: Mapping[str, Any], choice: Choice) -> list[str]:
    """The adapters that act and have to know something of the call."""
    return [n for n in choice.acting if getattr(configs.get(n), "routes", False)]


@contextmanager
def knowing(
    switch: Switch, model: nn.Module, configs: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Mapping[str, Any],
    memory: dict[str, dict[str, Any]],
) -> Iterator[None]:  # fmt: skip
    """Let the adapters that route find out about this call, for the code inside.

    Args:
        memory: by adapter, what is kept from call to call.
    """
    choice = switch.chosen()
    names = routing(configs, choice)
    if not names:
        yield
        return
    inputs = _named(model, args, kwargs)

    def run(**changed: Any) -> Any:
        with disabled(model):
            return model(**{**inputs, **changed})

    facts: dict[str, Facts] = {}
    for name in names:
        facts[name] = configs[name].facts(Call(model, name, inputs, given, memory.setdefault(name, {}), run))
    with choosing(switch, replace(choice, facts={**choice.facts, **facts})):
        yield


@contextmanager
def knowing_each(switch: Switch, model: nn.Module, configs: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[None]:
    """The same for every call that the code inside makes in this thread, as `generate` does, once per token."""
    if not routing(configs, switch.chosen()):
        yield
        return
    thread = threading.get_ident()
    memory: dict[str, dict[str, Any]] = {}
    inside: list[ExitStack] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            stack = ExitStack()
            stack.enter_context(knowing(switch, module, configs, args, kwargs, given, memory))
            inside.append(stack)

    def leave(*_: Any) -> None:
        if threading.get_ident() == thread and inside:
            inside.pop().close()

    with ExitStack() as stack:
        entries: list[Any] = [model]
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            entries.append(model.get_encoder())  # type: ignore[operator]
        for entry in entries:
            stack.callback(entry.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(entry.register_forward_hook(leave, always_call=True).remove)
        yield


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if not args:
        return dict(kwargs)
    by_place = inspect.signature(model.forward).bind_partial(*args).arguments
    return {**by_place, **kwargs}
