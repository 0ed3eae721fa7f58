"""Keys and values of a prefix in other layouts than transformers' caches have: for models with code of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Pairs = tuple[tuple[Tensor, Tensor], ...]

# model type -> what makes of each layer's (2, batch, heads, n, size) the keys and values that its code takes; the user's to fill
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Callable[[tuple[Tensor, ...]], Sequence[Sequence[Tensor]]]] = {}


def bloom_model_postprocess_past_key_value(past_key_values: tuple[Tensor, ...]) -> Pairs:
    """The layout of Bloom's own code before transformers had caches: keys (batch · heads, size, n), values (batch · heads, n, size).

    Args:
        past_key_values: of each layer, keys and values, (2, batch, heads, n, size).
    """
    return tuple((t[0].mT.flatten(0, 1), t[1].flatten(0, 1)) for t in past_key_values)
