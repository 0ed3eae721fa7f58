"""Generation with a prompt, through the public arguments of transformers' `generate` alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import PeftError
from .feed import Drawn, embedded, key_values, moved, seen, with_front
from .shape import is_encoder_decoder


def for_generate(model: Any, drawn: Drawn, config: Any, kw: dict[str, Any], copies: int) -> dict[str, Any]:
    """The arguments of `model.generate` with the prompt before the input. What comes back has no prompt in it: the input's ids and the
    new ones.

    Args:
        copies: how many rows each row of the batch becomes (beams, returned sequences).
    """
    if seen(kw):
        raise PeftError("With a prompt, generate starts from the input alone. Leave past_key_values out, and give the whole input.")
    if is_encoder_decoder(model):
        return _encoder_decoder(model, drawn, config, kw, copies)
    ids = kw.get("input_ids")
    length = 0 if ids is None else ids.shape[1]
    asked = _lengths(model, kw, length)
    mask = kw.pop("attention_mask", None)
    if mask is None and ids is not None:
        mask = _attended(model, ids, kw)
    if config.into == "cache":
        if ids is None:
            raise PeftError("With keys and values as the prompt, generate needs input_ids.")
        kw |= {"past_key_values": key_values(model, drawn.expanded(copies), config), "use_cache": True}
        return kw | asked | {"attention_mask": with_front(mask, drawn, length)}
    x = embedded(model, dict(kw))
    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
    kw |= {"inputs_embeds": torch.cat([drawn.prompt.to(x), x], 1), "use_cache": True}
    if "token_type_ids" in kw:
        kw["token_type_ids"] = torch.cat([kw["token_type_ids"].new_zeros(len(x), drawn.n), kw["token_type_ids"]], 1)
    kw["attention_mask"] = with_front(mask, drawn, x.shape[1])
    # padding on the left goes before the prompt: between it and the tokens it would take up places of a sliding window
    padding = (mask == 0).long().cumprod(1)
    return kw | asked | moved(kw, torch.cat([drawn.mask(), 2 - 2 * padding], 1))


def _encoder_decoder(model: Any, drawn: Drawn, config: Any, kw: dict[str, Any], copies: int) -> dict[str, Any]:
    if config.into == "cache":
        if any(c.__name__ == "WhisperGenerationMixin" for c in type(model).__mro__):
            raise PeftError(
                f"The generate of {type(model).__name__} drops as many of the decoder's first tokens as the cache holds, and the prompt is in the cache. "
                "Call forward token by token, which takes the prompt, or train LoRA in its place."
            )
        kw |= {"past_key_values": key_values(model, drawn.expanded(copies), config), "use_cache": True}
        return kw
    n = config.num_virtual_tokens
    first = Drawn(drawn.prompt[:, :n]) if drawn.own is None else drawn
    ids, mask = kw.get("input_ids"), kw.pop("attention_mask", None)
    if mask is None and ids is not None:
        mask = _attended(model, ids, kw)
    x = embedded(model, kw)
    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
    whole = with_front(mask, first, x.shape[1])
    x = torch.cat([first.prompt.to(x), x], 1)
    if first.own is not None and whole is not None:  # as in a forward: positions count from the first own token
        order = torch.cat([1 - first.mask(), mask.new_zeros(mask.shape)], 1).sort(dim=1, stable=True).indices
        x, whole = x.gather(1, order.unsqueeze(-1).expand(x.shape)), whole.gather(1, order)
    if not config.in_decoder or drawn.n == n:
        return kw | {"inputs_embeds": x, "attention_mask": whole}
    from transformers import DynamicCache, EncoderDecoderCache

    encoded = model.get_encoder()(inputs_embeds=x, attention_mask=whole, return_dict=True)
    cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
    model.get_decoder()(  # fills the cache with the decoder's prompt
        inputs_embeds=drawn.prompt[:, n:].to(x).repeat_interleave(copies, 0),
        encoder_hidden_states=encoded[0].repeat_interleave(copies, 0),
        encoder_attention_mask=whole.repeat_interleave(copies, 0) if whole is not None else None,
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    return kw | {"encoder_outputs": encoded, "attention_mask": whole, "past_key_values": cache, "use_cache": True}


def _lengths(model: Any, kw: dict[str, Any], length: int) -> dict[str, int]:
    """max_length and min_length as numbers of new tokens: they mean the input's ids and the new ones, without the prompt."""
    out = {}
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        configs = (kw.get("generation_config"), getattr(model, "generation_config", None))
        if kw.get(new) is not None or any(getattr(c, new, None) is not None for c in configs):
            kw.pop(total, None)
            continue
        value = kw.pop(total, None)
        if value is None:
            value = next((v for c in configs if (v := getattr(c, total, None)) is not None), None)
        if value is not None and (value - length > 0 or new == "max_new_tokens"):
            if value <= length:
                raise ValueError(f"The input has {length} tokens, and `max_length` is {value}. Raise it, or set `max_new_tokens`.")
            out[new] = value - length
    return out


def _attended(model: Any, ids: Tensor, kw: dict[str, Any]) -> Tensor:
    """The attention mask that `generate` would make: padding is hidden where the input has any and it is not the end token."""
    config = kw.get("generation_config") or model.generation_config

    def asked(name: str) -> Any:
        if name in kw:
            return kw[name]
        return next((v for c in (config, model.generation_config) if (v := getattr(c, name, None)) is not None), None)

    pad, eos = asked("pad_token_id"), asked("eos_token_id")
    ends = [eos] if isinstance(eos, int) else list(eos or ())
    mask = torch.ones_like(ids)
    return (ids != pad).to(ids.dtype) if pad is not None and pad not in ends and bool((ids == pad).any()) else mask
