"""layer_replication: a model's stack of layers rebuilt from ranges of itself, sharing the base weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError

_STACKS = ("layers", "encoder.layer", "h")  # Llama- and Mistral-like, BERT-like, Falcon- and GPT-like
_MODES = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")


@dataclass(frozen=True, eq=False)
class Replaced:
    """A stack of layers that another stands in for: in `parent` under `name`, of `count` layers by the model's config."""

    parent: nn.Module
    name: str
    layers: nn.ModuleList
    count: Any
    ranges: list[tuple[int, int]]


def replicate(model: nn.Module, ranges: Sequence[Sequence[int]] | None) -> Replaced | None:
    """Rebuild the stack of layers from half-open ranges [start, end) of it; returns what `undo` needs.

    Every copy is a module of its own (so it can carry its own adapter) whose parameters are the original's.

    Raises:
        ConfigError: if the model has no stack of layers that is known, or a range lies outside it.
    """
    if not ranges:
        return None
    parent, name = _stack(model)
    layers: Any = getattr(parent, name)
    n = len(layers)
    for start, end in ranges:
        if not 0 <= start < end <= n:
            raise ConfigError(f"layer_replication: [{start}, {end}) is no range of the model's {n} layers.")
    new = nn.ModuleList()
    for start, end in ranges:
        for i in range(start, end):
            layer = _share(layers[i])
            for module in layer.modules():
                held: Any = module
                if hasattr(module, "layer_idx"):
                    held.layer_idx = len(new)  # each copy has its own place in a cache
            new.append(layer)
    setattr(parent, name, new)
    config = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    if count is not None:
        config.num_hidden_layers = len(new)  # type: ignore[union-attr]
    return Replaced(parent, name, layers, count, [(start, end) for start, end in ranges])


def undo(model: nn.Module, replaced: Replaced | None) -> None:
    """Put the original stack back, with the tensors and modes that the layers' first copies, without wrappers, have by now. Layers that have none are
    as they were, but for the mode."""
    if replaced is None:
        return
    now: Any = getattr(replaced.parent, replaced.name)
    origins = [i for start, end in replaced.ranges for i in range(start, end)]
    replaced.layers.training = now.training
    for i, layer in enumerate(replaced.layers):
        if i not in origins:
            layer.train(now.training)
            continue
        for module, copied in zip(layer.modules(), now[origins.index(i)].modules(), strict=True):
            module._parameters.update(copied._parameters)  # moved, some were replaced
            module._buffers.update(copied._buffers)
            module.__dict__.update({key: copied.__dict__[key] for key in _MODES if key in copied.__dict__})
    setattr(replaced.parent, replaced.name, replaced.layers)
    if replaced.count is not None:
        model.config.num_hidden_layers = replaced.count  # type: ignore[union-attr]


def check_again(ranges: Sequence[Sequence[int]] | None, replaced: Replaced | None) -> None:
    """Raise ConfigError if a further adapter asks for another stack than that of the first one."""
    so_far = replaced.ranges if replaced is not None else []
    if ranges and list(map(tuple, ranges)) != so_far:
        now = f"by layer_replication={so_far}" if so_far else "without layer_replication"
        raise ConfigError(
            f"layer_replication={ranges} would rebuild the stack of layers, which has adapters already and was built {now}. "
            "Add this adapter to a model of its own, or give it the same layer_replication."
        )


def separate(model: nn.Module) -> None:
    """Give every layer of the stack tensors of its own: what it has in common with one before it becomes a copy, so that the model can be saved."""
    parent, name = _stack(model)
    before: set[int] = set()
    for layer in getattr(parent, name):
        own: dict[int, Tensor] = {}
        for module in layer.modules():
            for held in (module._parameters, module._buffers):
                for key, t in held.items():
                    if t is None:
                        continue
                    if id(t) not in own:
                        own[id(t)] = t if id(t) not in before else copy.deepcopy(t)
                    held[key] = own[id(t)]
        before.update(map(id, own.values()))


def _stack(model: nn.Module) -> tuple[nn.Module, str]:
    inner: Any = model
    while hasattr(inner, "model"):
        inner = inner.model
    for attribute in ("bert", "transformer"):
        inner = getattr(inner, attribute, inner)
    for path in _STACKS:
        head, _, name = path.rpartition(".")
        try:
            parent = inner.get_submodule(head)
        except AttributeError:
            continue
        if isinstance(getattr(parent, name, None), nn.ModuleList):
            return parent, name
    raise ConfigError("layer_replication knows the layer stacks of Llama-, BERT- and Falcon-like models; this model has none of them.")


def _share(layer: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {id(t): t for t in [*layer.parameters(), *layer.buffers()]}
    return copy.deepcopy(layer, memo)
