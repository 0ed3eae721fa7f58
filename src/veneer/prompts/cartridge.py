"""Cartridge: keys and values before those of every layer, which start from a text."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, RouteError, hint
from ..types import name_of
from .base import Prompt, PromptModule
from .prefix import PrefixEncoder, fill_cache_prompt

__all__ = [
    "CartridgeConfig",
    "CartridgeEncoder",
    "compose_cartridge_adapters",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "prompt_embeddings_from_past_key_values",
]


@dataclass
class CartridgeConfig(Prompt, peft_type="CARTRIDGE"):
    """keys_l = [P_l^K; K_l], values_l = [P_l^V; V_l] in every layer l.   P (n, layers·2·width of keys) but for its first rows trains.
    Eyuboglu et al. 2025, arXiv:2506.06266.

    Args:
        num_frozen_tokens: how many of the first rows stay as they started.

    Raises:
        ConfigError: if that is not between 0 and num_virtual_tokens.
    """

    into = "cache"

    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frozen_tokens < 0:
            raise ConfigError(f"`num_frozen_tokens` must be >= 0, got {self.num_frozen_tokens}.")
        if self.num_virtual_tokens is not None and self.num_frozen_tokens > self.num_virtual_tokens:
            raise ConfigError(
                "`num_frozen_tokens` must be <= `num_virtual_tokens`, got "
                f"num_frozen_tokens={self.num_frozen_tokens} and num_virtual_tokens={self.num_virtual_tokens}."
            )

    def module(self, table: nn.Module, start: bool) -> PromptModule:
        return CartridgeEncoder(self)


class CartridgeEncoder(PromptModule):
    """The keys and values of a Cartridge."""

    frozen = frozenset({"frozen_embedding"})

    def __init__(self, config: CartridgeConfig) -> None:
        super().__init__()
        n, fixed, flat = config.num_virtual_tokens, config.num_frozen_tokens, config.flat
        self.frozen_embedding = nn.Parameter(torch.empty(fixed, flat), requires_grad=False)
        self.trainable_embedding = nn.Parameter(torch.empty(n - fixed, flat))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from noise."""
        nn.init.normal_(self.frozen_embedding)
        nn.init.normal_(self.trainable_embedding)

    @property
    def weight(self) -> Tensor:
        """All rows, (n, layers·2·width)."""
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    @weight.setter
    def weight(self, value: Tensor) -> None:
        fixed = len(self.frozen_embedding)
        for mine, part in ((self.frozen_embedding, value[:fixed]), (self.trainable_embedding, value[fixed:])):
            mine.data = part.detach().clone().to(mine.device)

    @property
    def embedding(self) -> CartridgeEncoder:  # type: ignore[override]  # what has the `weight`, as in PEFT
        return self

    def prompt(self, task_ids: Tensor | None = None) -> Tensor:
        return self.weight

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take these keys and values, (n, layers·2·width)."""
        whole = self.weight.detach()
        fill_cache_prompt(self, prompt_embeddings, whole)
        self.weight = whole

    def slots(self) -> Iterator[tuple[str, str, str, nn.Module]]:
        yield "prompt_embeddings", "weight", "weight", self


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first n keys and values of a cache as a prompt, (n, layers·2·width), on the device of the first layer.

    Args:
        past_key_values: a transformers Cache; its first row counts.
        num_virtual_tokens: n.

    Raises:
        ValueError: if the cache holds fewer tokens.
    """
    n, flat = num_virtual_tokens, []
    for layer in getattr(past_key_values, "self_attention_cache", past_key_values).layers:
        there = layer.keys.shape[2]
        if there < n:
            raise ValueError(f"Need at least {n} cached tokens, got {there}.")
        flat += [t[0, :, :n].transpose(0, 1).reshape(n, -1) for t in (layer.keys, layer.values)]  # (heads, n, size) -> (n, width)
    return torch.cat([t.to(flat[0]) for t in flat], 1).detach()


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Let a Cartridge (or a prefix) start from the first keys and values of a cache, such as one that a text has filled.

    Args:
        model: a PeftModel.
        adapter_name: by default the active adapter.
        past_key_values: a transformers Cache of one row, with at least n tokens.
        num_virtual_tokens: n, if given the adapter's own.

    Returns:
        The keys and values taken, (n, layers·2·width).

    Raises:
        ValueError: if the adapter is none of the two, has a projection, or the cache does not fit it.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    if name not in model.peft_config:
        raise RouteError(f"There is no adapter {name!r}; the model has {sorted(model.peft_config)}.{hint(str(name), model.peft_config)}")
    config = model.peft_config[name]
    kind = name_of(config.peft_type)
    if not isinstance(config, Prompt) or config.into != "cache":
        raise ValueError(f"Adapter {name!r} must be a CARTRIDGE or PREFIX_TUNING adapter (got {kind}).")
    module: CartridgeEncoder | PrefixEncoder = model.prompt_encoder[name]
    if not config.resumable and isinstance(module, PrefixEncoder) and not module.folded:
        raise ValueError("Initialization from KV cache is not supported for prefix tuning with `prefix_projection=True`.")
    n = config.num_virtual_tokens if num_virtual_tokens is None else num_virtual_tokens
    flat = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=n)
    like = module.prompt()
    value = flat.to(like)
    module.load_prompt_embeddings(value)
    return value


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Let a Cartridge (or a prefix) start from the first keys and values that the base model has for a text.

    Args:
        use_chat_template: give the text as a system message, where the tokenizer has a template.
        max_length: read no more tokens than this.

    Other arguments, result and errors as in `initialize_kv_prefix_from_past_key_values`.
    """
    if use_chat_template and getattr(tokenizer, "chat_template", None) is not None:
        message = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(message, tokenize=True, add_generation_prompt=False, return_dict=False, return_tensors="pt")
    else:
        ids = tokenizer(text, return_tensors="pt", truncation=max_length is not None, max_length=max_length)["input_ids"]
    ids = ids[:1, :max_length]
    base = model.get_base_model()
    table: Any = base.get_input_embeddings()
    training = base.training
    base.eval()
    try:
        with torch.no_grad(), model.disable_adapter():
            cache = base(input_ids=ids.to(table.weight.device), use_cache=True).past_key_values
    finally:
        base.train(training)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def compose_cartridge_adapters(adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True) -> None:
    """Write an adapter whose keys and values are those of several saved Cartridges, one after another.

    Raises:
        ValueError: if there are fewer than two, or they are for different models.
    """
    from ..checkpoint import read_adapter, write_adapter

    if len(adapter_paths) < 2:
        raise ValueError("Need at least 2 adapters to compose.")
    configs = [CartridgeConfig.from_pretrained(p) for p in adapter_paths]
    for path, config in zip(adapter_paths, configs, strict=True):
        if not isinstance(config, CartridgeConfig):
            raise ValueError(f"{str(path)!r} holds no Cartridge, but a {config.peft_type} adapter.")
    parts = [read_adapter(p).tensors["prompt_embeddings"] for p in adapter_paths]
    widths = {p.shape[1] for p in parts}
    if len(widths) > 1:
        raise ValueError(f"The Cartridges are for different models: their rows have the widths {sorted(widths)}.")
    whole = copy.copy(configs[0])
    whole.num_virtual_tokens = sum(len(p) for p in parts)
    write_adapter({"prompt_embeddings": torch.cat(parts)}, whole, output_path, safe_serialization=safe_serialization)
