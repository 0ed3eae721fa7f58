"""Calls of a model whose adapters have to know something of them: which task a row is of, where in it an adapter begins to act."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RouteError
from .layer import adapted_layers
from .place import Place
from .route import Choice, Facts, Switch, choosing

# arguments whose first dimension counts the rows of the batch
ROWS = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_values", "input_features", "inputs")


@dataclass
class Call:
    """One call of the user's model.

    Attributes:
        model: the user's model.
        adapter: the adapter that asks.
        home: the tuner.
        inputs: the arguments by name, as far as the model's forward names them.
        mine: in a mixed batch, whether each row has this adapter; else None.
        given: those that were meant for the method (see `Method.takes`).
        prompt: in `generate`, its own arguments by name; else None.
        memory: the adapter's own, kept through all steps of one `generate`; a call of its own has an empty one.
        facts: what the adapter's method has found out.
        run: `run(facts, **changed)` runs the model with these inputs, changed by keyword arguments: without any adapter, or, if they are not
            None, with this one and the facts given.
    """

    model: nn.Module
    adapter: str
    home: Any
    inputs: Mapping[str, Any]
    given: Mapping[str, Any]
    prompt: Mapping[str, Any] | None = None
    mine: Sequence[bool] | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    run: Callable[..., Any] = lambda facts, **changed: None
    facts: Facts = field(default_factory=dict)

    @property
    def at(self) -> list[int] | None:
        """The rows of the batch that are the adapter's; None: all."""
        return None if self.mine is None or all(self.mine) else [i for i, mine in enumerate(self.mine) if mine]

    @functools.cached_property
    def places(self) -> list[Place]:
        """Where the adapter is attached."""
        known: dict[nn.Module, list[Place]] = self.memory.setdefault("places", {})  # an encoder may be called on its own
        if self.model not in known:
            layers = (layer for _, layer in adapted_layers(self.model) if self.adapter in layer.attached)
            known[self.model] = [p for layer in layers if (p := layer.attached[self.adapter].place) is not None]
        return known[self.model]

    @property
    def unseen(self) -> list[Place]:
        """The same at the first call of a `generate`, in which nothing of the model changes; then none."""
        seen: set[nn.Module] = self.memory.setdefault("seen", set())
        first = self.model not in seen
        seen.add(self.model)
        return self.places if first else []

    @property
    def rows(self) -> int | None:
        """How many rows the batch has now, beams counted; None if no argument tells."""
        return next((t.shape[0] for n in ROWS if isinstance(t := self.inputs.get(n), Tensor)), None)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens) of the inputs."""
        return shape_of(self.inputs)

    @property
    def prompt_length(self) -> int:
        """How many tokens the prompt of a `generate` has."""
        return shape_of(self.prompt or self.inputs)[1]

    @property
    def before(self) -> int:
        """How many tokens in a cache the inputs go on with."""
        cache = self.inputs.get("past_key_values")
        if cache is None:
            return 0
        return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else int(cache[0][0].shape[-2])

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model has two sequences, so that a token's place alone says little."""
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))


def shape_of(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, tokens) of a call with these arguments; a batch of vectors has rows of one token.

    Raises:
        RouteError: if there is no tensor among them.
    """
    t = next((t for t in (*map(arguments.get, ROWS), *arguments.values()) if isinstance(t, Tensor) and t.ndim), None)
    if t is None:
        raise RouteError("The call has no tensor among its arguments that would tell rows and tokens.")
    return t.shape[0], t.shape[1] if t.ndim > 2 or (t.ndim == 2 and not t.is_floating_point()) else 1


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
    memory: dict[str, dict[str, Any]], prompt: Mapping[str, Any] | None = None,
) -> Iterator[Callable[[Any], Any]]:  # fmt: skip
    """Let the adapters that route find out about this call, for the code inside.

    Args:
        home: the tuner.
        model: the user's model, or its encoder.
        memory: by adapter, what is kept from call to call.

    Yields:
        a function that makes of the call's output what is returned.
    """
    choice, configs = switch.chosen(), home.peft_config
    names = [n for n in routing(configs, choice) if n not in choice.facts or switch.recalls()]
    if not names:
        yield lambda output: output
        return
    inputs = by_name(model, args, kwargs)
    calls: dict[str, Call] = {}
    for name in names:

        def run(mine: Facts | None, name: str = name, **changed: Any) -> Any:
            here = replace(choice, enabled=False) if mine is None else Choice((name,), facts={name: mine})
            with choosing(switch, here):
                return model(**{**inputs, **changed})

        mine = None if choice.rows is None else [n == name for n in choice.rows]
        call = calls[name] = Call(model, name, home, inputs, given, prompt, mine, memory.setdefault(name, {}), run)
        call.facts = {k: _for_rows(k, t, call.rows) if isinstance(t, Tensor) else t for k, t in configs[name].facts(call).items()}

    def finish(output: Any) -> Any:
        for name, call in calls.items():
            with choosing(switch, Choice((name,))):
                output = configs[name].finish(call, output)
        return output

    with choosing(switch, replace(choice, facts={**choice.facts, **{name: call.facts for name, call in calls.items()}})):
        yield finish


def _for_rows(name: str, fact: Tensor, rows: int | None) -> Tensor:
    """A fact of each row of the batch, for a batch in which each row of the user's stands several times, one after another (beams)."""
    if rows is None or len(fact) == rows:
        return fact
    if not len(fact) or rows % len(fact):
        raise RouteError(f"`{name}` tells of {len(fact)} rows, and the batch has {rows}. Give one entry per row.")
    return torch.repeat_interleave(fact, rows // len(fact), 0)


def hold(switch: Switch, output: Any) -> None:
    """Keep what is known of this call as long as there is a graph of it: its layers may be recomputed in a backward."""
    choice = switch.chosen()
    if choice.facts:
        for t in _tensors(output):
            if t.grad_fn is not None:
                node: Any = t.grad_fn
                node.metadata["veneer"] = choice


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)) or dataclasses.is_dataclass(value):
        for v in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else vars(value).values():
            yield from _tensors(v)


@contextmanager
def knowing_each(switch: Switch, home: Any, given: Mapping[str, Any], prompt: Mapping[str, Any]) -> Iterator[None]:
    """The same for every call that the code inside makes in this thread, as `generate` does, once per token. `prompt`: its arguments."""
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
            inside.append((stack, stack.enter_context(knowing(switch, home, module, args, kwargs, given, memory, prompt))))

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != thread or not inside:
            return None
        stack, finish = inside.pop()
        with stack:
            return finish(output) if output is not None and module is model else None

    with ExitStack() as stack:
        entries: list[Any] = [model]
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            entries.append(model.get_encoder())  # type: ignore[operator]
        for entry in entries:
            stack.callback(entry.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(entry.register_forward_hook(leave, always_call=True).remove)
        yield


def by_name(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module, or of a function, by name."""
    if not args:
        return dict(kwargs)
    by_place = inspect.signature(getattr(function, "forward", function)).bind_partial(*args).arguments
    return {**by_place, **kwargs}
