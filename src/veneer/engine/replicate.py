"""layer_replication: a model's stack of layers rebuilt from ranges of itself, sharing the base weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError

_STACKS = ("layers", "encoder.layer", "h")  # Llama- and Mistral-like, BERT-like, Falcon- and GPT-like


def replicate(model: nn.Module, ranges: Sequence[Sequence[int]] | None) -> tuple[nn.Module, str, nn.ModuleList, Any] | None:
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
    return parent, name, layers, count


def undo(model: nn.Module, replicated: tuple[nn.Module, str, nn.ModuleList, Any] | None) -> None:
    """Put the original stack back."""
    if replicated is None:
        return
    parent, name, layers, count = replicated
    setattr(parent, name, layers)
    if count is not None:
        model.config.num_hidden_layers = count  # type: ignore[union-attr]


def check_again(ranges: Sequence[Sequence[int]] | None, so_far: Sequence[Sequence[int]] | None) -> None:
    """Raise ConfigError if a further adapter asks for another stack than that of the first one."""
    if ranges and list(map(tuple, ranges)) != list(map(tuple, so_far or [])):
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
