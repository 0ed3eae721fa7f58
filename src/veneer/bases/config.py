"""What a model of transformers says of its own storage, kept true when layers leave it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import codec_for

_SKIP = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
_FLAGS = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "is_8bit_serializable",
    "is_4bit_serializable",
)


def tell_storage(model: nn.Module) -> None:
    """After layers were merged dense: the config no longer calls a model quantised that is not, or names the layers that are not.

    Without it such a model would be saved in a way that cannot be loaded again.
    """
    config: Any = getattr(model, "config", None)
    told: Any = getattr(config, "quantization_config", None)
    if told is None:
        return
    linear = {n: codec_for(m).plain for n, m in model.named_modules() if isinstance(m, nn.Linear) or not codec_for(m).plain}
    if all(linear.values()):
        del config.quantization_config
        for name in _FLAGS:
            model.__dict__.pop(name, None)
        return
    for name in _SKIP:
        if hasattr(told, name):
            setattr(told, name, sorted(n for n, plain in linear.items() if plain))
