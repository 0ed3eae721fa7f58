"""A second network's keys and values as further layers of the base model's cache: whatever is done to that is done to them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import RouteError


def mine(cache: Any, adapter: str, network: nn.Module) -> Any:
    """The adapter's part of a cache, itself a cache; None where nothing is there yet.

    Args:
        network: whose keys and values they are; a preallocated cache gets a part of its size.

    Raises:
        RouteError: if the cache has seen more tokens than the adapter, or has no layers that could be more.
    """
    if cache is None:
        return None
    if not hasattr(cache, "layers"):
        raise RouteError(
            f"The adapter {adapter!r} keeps keys and values in the model's cache, and cannot in a {type(cache).__name__}. Use a DynamicCache."
        )
    from transformers import Cache, StaticCache

    layers = [layer for layer in cache.layers if getattr(layer, "kept_for", None) == adapter]
    part: Any = None
    if layers:
        part = Cache(layers=layers)
    elif hasattr(next(iter(cache.layers), None), "max_cache_len"):  # masks have its size
        part = StaticCache(config=network.config, max_cache_len=cache.layers[0].max_cache_len)  # type: ignore[arg-type]
    seen = int(cache.get_seq_length())
    if seen != (0 if part is None else int(part.get_seq_length())):
        raise RouteError(
            f"The cache holds {seen} tokens that the adapter {adapter!r} has not seen. Start from an empty cache, and let one adapter fill it."
        )
    return part


def keep(output: Any, part: Any, adapter: str) -> None:
    """Put the layers of the adapter's cache into the one that the base model returns."""
    values = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
    cache = next((v for v in values if hasattr(v, "layers") and hasattr(v, "get_seq_length")), None)
    if cache is None or not getattr(part, "layers", None) or any(layer is part.layers[0] for layer in cache.layers):
        return
    for layer in part.layers:
        layer.kept_for = adapter
    cache.layers.extend(part.layers)
