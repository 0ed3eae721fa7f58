"""How a prompt enters a call of the base model: as embeddings before the input's, or as a filled cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeftError, RouteError
from .postprocess import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
from .shape import embedding_table, is_encoder_decoder

IGNORED = -100  # a label that does not count


@dataclass
class Drawn:
    """The prompts of one batch.

    Attributes:
        prompt: (batch, n, width).
        own: (batch, n), which of them are the row's own, where rows have prompts of different lengths; None: all.
    """

    prompt: Tensor
    own: Tensor | None = None

    @property
    def n(self) -> int:
        return self.prompt.shape[1]

    def lengths(self) -> Tensor:
        """(batch, 1)"""
        if self.own is None:
            return torch.full((len(self.prompt), 1), self.n, device=self.prompt.device)
        return self.own.long().sum(1, keepdim=True)

    def mask(self, like: Tensor | None = None) -> Tensor:
        """(batch, n), 1 for own tokens, in the dtype of `like`."""
        own = torch.ones(self.prompt.shape[:2], device=self.prompt.device) if self.own is None else self.own
        return own.to(torch.long) if like is None else own.to(like)

    def expanded(self, copies: int) -> Drawn:
        """Each row `copies` times."""
        own = None if self.own is None else self.own.repeat_interleave(copies, 0)
        return self if copies == 1 else Drawn(self.prompt.repeat_interleave(copies, 0), own)


def named(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    by_place = inspect.signature(function).bind_partial(*args).arguments if args else {}
    return {**by_place, **kwargs}


def seen(kw: Mapping[str, Any]) -> int:
    """How many tokens a given cache holds."""
    past: Any = kw.get("past_key_values")
    return int(past.get_seq_length()) if hasattr(past, "get_seq_length") else 0


def embedded(model: nn.Module, kw: dict[str, Any]) -> Tensor:
    """The input's embeddings (batch, tokens, width), taken out of the arguments together with its ids."""
    ids, x = kw.pop("input_ids", None), kw.pop("inputs_embeds", None)
    if x is None:
        table = embedding_table(model)
        if ids is None or table is None:
            raise PeftError("A prompt needs the input: give input_ids or inputs_embeds.")
        x = table(ids)
    out: Tensor = x
    return out


def check_one_text(kw: Mapping[str, Any]) -> None:
    """Raise where texts lie end to end in a row and the model would keep them apart by their positions: a prompt stands before the first alone."""
    positions = kw.get("position_ids")
    if positions is None or positions.ndim != 2 or kw.get("attention_mask") is not None or torch.compiler.is_compiling():
        return
    if bool((positions.diff(dim=1) < 0).any()):
        raise RouteError(
            "The positions start anew within a row, so several texts lie end to end there, and a prompt stands before one. "
            "Pad them instead, a row for each text (no packing, no padding_free)."
        )


def with_front(mask: Tensor | None, drawn: Drawn, length: int) -> Tensor | None:
    """An attention mask (batch, length) with the prompt's in front; None where there is nothing to hide."""
    if mask is None:
        if drawn.own is None:
            return None
        mask = drawn.mask().new_ones(len(drawn.prompt), length)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        said = f"has {mask.ndim} dimensions" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise PeftError(f"With a prompt the attention mask has to be (batch, tokens); this one {said}. Leave the rest to the model.")
    if mask.shape[1] != length:
        raise PeftError(
            f"The attention mask is for {mask.shape[1]} tokens, and the input has {length}. Leave the prompt's {drawn.n} out: they are put in front."
        )
    return torch.cat([drawn.mask(mask), mask], 1)


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return name in inspect.signature(model.forward).parameters


def continued(kw: dict[str, Any], drawn: Drawn, decoder: bool) -> dict[str, Any]:
    """A further step of a model whose cache holds the prompt already: only the mask and the positions count it."""
    name = "decoder_attention_mask" if decoder else "attention_mask"
    mask, ids = kw.get(name), kw.get("decoder_input_ids" if decoder else "input_ids")
    x = ids if ids is not None else kw.get("decoder_inputs_embeds" if decoder else "inputs_embeds")
    if isinstance(mask, Tensor) and x is not None and mask.ndim == 2 and mask.shape[1] == seen(kw) + x.shape[1] - drawn.n:
        kw[name] = with_front(mask, drawn, mask.shape[1])
    if not decoder and "position_ids" in kw:
        kw["position_ids"] = kw["position_ids"] + drawn.lengths()
    return kw


def as_tokens(model: nn.Module, drawn: Drawn, kw: dict[str, Any], task: str) -> dict[str, Any]:
    """Put the prompt before the input's embeddings; everything that goes along with the tokens is prolonged."""
    x = embedded(model, kw)
    batch, length = x.shape[:2]
    n, both = drawn.n, is_encoder_decoder(model)
    kw["inputs_embeds"] = torch.cat([drawn.prompt.to(x), x], 1)
    mask = kw["attention_mask"] = with_front(kw.get("attention_mask"), drawn, length)
    scored = not both and hasattr(model, "score")
    last = scored and task != "TOKEN_CLS"  # a classifier that reads the last position, which must not be padding
    ragged = drawn.own is not None or (last and mask is not None and bool((mask[:, -1] == 0).any()))
    causal = not both and (scored or hasattr(model, "prepare_inputs_for_generation"))
    positions = kw.get("position_ids")
    if positions is not None:
        front = torch.arange(n, device=x.device).expand(*positions.shape[:-1], n)
        kw["position_ids"] = torch.cat([front, positions + drawn.lengths()], -1)
    elif ragged and causal:
        if not takes(model, "position_ids"):
            raise RouteError(
                f"{type(model).__name__} takes no position_ids, so the rows of a batch cannot have prompts of different lengths."
            )
        kw["position_ids"] = (torch.arange(n + length, device=x.device) - (n - drawn.lengths())).clamp_min(0)
    if "token_type_ids" in kw:
        kw["token_type_ids"] = torch.cat([kw["token_type_ids"].new_zeros(batch, n), kw["token_type_ids"]], 1)
    labels = kw.get("labels")
    if not both and isinstance(labels, Tensor) and labels.shape == (batch, length) and not labels.is_floating_point():
        kw["labels"] = torch.cat([labels.new_full((batch, n), IGNORED), labels], 1)
    for name in ("start_positions", "end_positions"):
        if name in kw:
            kw[name] = kw[name].clamp_min(0) + (n if causal else drawn.lengths().view(-1, *[1] * (kw[name].ndim - 1)))
    if ragged and mask is not None:
        own = drawn.mask()
        # causal: what is not the row's own comes first, and for `last` padding before the tokens. Else positions count from the first own
        # token, so what is not the row's own goes to the end.
        front, rest = (own, 2 + (mask[:, n:] != 0).long() * last) if causal else (1 - own, own.new_zeros(batch, length))
        kw |= moved(kw, torch.cat([front, rest], 1))
    return {k: v for k, v in kw.items() if v is not None}


def moved(kw: dict[str, Any], ranks: Tensor) -> dict[str, Any]:
    """What goes along with the prompt and the tokens, each row sorted by `ranks` (batch, n + tokens)."""
    batch, length = ranks.shape
    order, out = ranks.sort(dim=1, stable=True).indices, {}
    for name in ("inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "labels"):
        value = kw.get(name)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == length:
            value = value.expand(batch, *value.shape[1:])
            out[name] = value.gather(1, order.view(batch, length, *[1] * (value.ndim - 2)).expand(value.shape))
    return out


def key_values(model: nn.Module, drawn: Drawn, config: Any) -> Any:
    """The prompt as a cache of the base model: per layer its keys and values, (batch, heads, n, size)."""
    from transformers import DynamicCache, EncoderDecoderCache

    batch, n, flat = drawn.prompt.shape
    size = config.token_dim // config.num_attention_heads
    dtype = getattr(model, "dtype", drawn.prompt.dtype)
    rows: Any = drawn.prompt.to(dtype).view(batch, n, flat // config.token_dim, config.num_attention_heads, size).permute(2, 0, 3, 1, 4)
    both = is_encoder_decoder(model)
    postprocess = TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING.get(getattr(getattr(model, "config", None), "model_type", ""))
    if postprocess is not None:
        rows = [t for pair in postprocess(tuple(rows.split(2))) for t in (pair[0], pair[1])]
    cache: Any = DynamicCache() if both else DynamicCache(config=getattr(model, "config", None))
    # as in PEFT's files: of an encoder-decoder with two prompts, layer l takes the pair 2l of the doubled list
    step = 2 * (config.num_transformer_submodules or 1) if both else 2
    for layer in range(len(rows) // 2):
        at = step * layer % len(rows)
        cache.update(rows[at], rows[at + 1], layer)
    return EncoderDecoderCache(cache, DynamicCache()) if both else cache


def as_cache(model: nn.Module, drawn: Drawn, config: Any, kw: dict[str, Any]) -> dict[str, Any]:
    """Give the model a cache that holds the prompt. The model's own tokens come after it."""
    both = is_encoder_decoder(model)
    kw["past_key_values"] = key_values(model, drawn, config)
    if both:
        mask = kw.get("decoder_attention_mask")
        if mask is not None:
            kw["decoder_attention_mask"] = with_front(mask, drawn, mask.shape[1])
        return kw
    x = kw.get("input_ids") if kw.get("input_ids") is not None else kw.get("inputs_embeds")
    if x is None:
        raise PeftError("A prompt needs the input: give input_ids or inputs_embeds.")
    mask = kw.get("attention_mask")
    kw["attention_mask"] = with_front(x.new_ones(x.shape[:2], dtype=torch.long) if mask is None else mask, drawn, x.shape[1])
    if "position_ids" in kw:
        kw["position_ids"] = kw["position_ids"] + drawn.lengths()
    elif drawn.own is not None:
        if not takes(model, "position_ids"):
            raise RouteError(
                f"{type(model).__name__} takes no position_ids, so the rows of a batch cannot have prompts of different lengths."
            )
        kw["position_ids"] = torch.arange(x.shape[1], device=x.device) + drawn.lengths()
    return kw


def in_decoder(model: Any, prompt: Tensor, kw: dict[str, Any]) -> dict[str, Any]:
    """Put a prompt (batch, n, width) before the decoder's embeddings."""
    labels = kw.get("labels")
    if "decoder_input_ids" not in kw and "decoder_inputs_embeds" not in kw and labels is not None:
        kw["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    ids, x = kw.pop("decoder_input_ids", None), kw.pop("decoder_inputs_embeds", None)
    if x is None:
        if ids is None:
            raise PeftError("The decoder needs its input: give labels, decoder_input_ids or decoder_inputs_embeds.")
        x = (embedding_table(model.get_decoder()) or embedding_table(model))(ids)  # type: ignore[misc]  # an encoder-decoder has one
    kw["decoder_inputs_embeds"] = torch.cat([prompt.to(x), x], 1)
    if "decoder_attention_mask" in kw:
        kw["decoder_attention_mask"] = with_front(kw["decoder_attention_mask"], Drawn(prompt), x.shape[1])
    if labels is not None:
        kw["labels"] = torch.cat([labels.new_full(prompt.shape[:2], IGNORED), labels], 1)
    return kw
