"""Weights that several modules share, found by the parameter itself, never by a config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Every (module path, module, name) that holds a parameter, by the parameter's identity; only those held more than once."""
    found: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                found.setdefault(id(p), []).append((path, module, name))
    return {k: v for k, v in found.items() if len(v) > 1}


def tied_to(model: nn.Module, module: nn.Module, name: str = "weight") -> Iterator[tuple[str, nn.Module]]:
    """The other modules, with their paths, that hold the very parameter `module.<name>`."""
    p = getattr(module, name, None)
    if p is None:
        return
    for path, other in model.named_modules():
        if other is not module and other._parameters.get(name) is p:
            yield path, other


def untie_config(model: nn.Module) -> list[Any]:
    """Set `tie_word_embeddings` False in the model's config where embedding and head no longer share storage; returns what was changed."""
    inner, outer = getattr(model, "get_input_embeddings", None), getattr(model, "get_output_embeddings", None)
    config = getattr(model, "config", None)
    if inner is None or outer is None or config is None:
        return []
    try:
        a, b = inner(), outer()
    except NotImplementedError:
        return []
    if a is None or b is None or getattr(a, "weight", None) is getattr(b, "weight", None):
        return []
    changed = []
    for c in (config, getattr(config, "text_config", None)):
        if c is not None and getattr(c, "tie_word_embeddings", False):
            c.tie_word_embeddings = False
            changed.append(c)
    return changed
