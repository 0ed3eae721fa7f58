"""The sizes of a base model that a prompt needs, read from the model and its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def read_shape(model: nn.Module, into: str, task: str) -> dict[str, int]:
    """`token_dim, num_layers, num_attention_heads, num_transformer_submodules` as far as the model tells.

    For a prompt in the cache, heads are those of keys and values, and `token_dim` is the width of all of them; in an encoder-decoder
    they are the decoder's.
    """
    config = text_config(model)
    both = is_encoder_decoder(model)
    out: dict[str, int | None] = {"num_transformer_submodules": 2 if task == "SEQ_2_SEQ_LM" or (task == "None" and both) else 1}
    heads = _first(config, "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
    out["num_layers"] = _first(config, "num_hidden_layers", "num_layers", "n_layer", "encoder_layers")
    width = _first(config, "hidden_size", "n_embd", "d_model", "dim")
    if into == "tokens":
        table = embedding_table(model)
        weight = getattr(table, "weight", None)
        out["token_dim"] = weight.shape[1] if weight is not None and weight.ndim == 2 else width
        out["num_attention_heads"] = heads
    else:
        if both:
            out["num_layers"] = _first(config, "num_decoder_layers", "decoder_layers") or out["num_layers"]
            heads = _first(config, "decoder_attention_heads") or heads
        size = _first(config, "head_dim", "d_kv", "kv_channels") or (width // heads if width and heads else None)
        kv = _first(config, "num_key_value_heads", "num_kv_heads") or (1 if _get(config, "multi_query") else heads)
        out["num_attention_heads"] = kv
        out["token_dim"] = kv * size if kv and size else None
    return {k: v for k, v in out.items() if v is not None}


def text_config(model: nn.Module) -> Any:
    """The config of the part of the model that reads text."""
    config: Any = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder."""
    return bool(_get(getattr(model, "config", None), "is_encoder_decoder"))


def embedding_table(model: nn.Module) -> nn.Module | None:
    """The module that turns token ids into embeddings, if the model tells it."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        table = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None
    return table if isinstance(table, nn.Module) else None


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _first(config: Any, *names: str) -> int | None:
    return next((v for n in names if isinstance(v := _get(config, n), int) and not isinstance(v, bool)), None)
