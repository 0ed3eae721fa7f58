"""Attention over rows laid end to end, row by row: with a mask over all of them, most of the products are of tokens that do not see each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_NAME = "veneer_rows"
_lengths: Any = WeakTensorKeyDictionary()  # of the rows that a mask keeps apart; all layers of a call are given the same mask


def attend_by_rows(model: Any) -> bool:
    """Let a transformers model that uses torch's attention take rows that its mask keeps apart one by one; any other call stays what it is.

    Returns:
        whether it does; not so for models with another attention, or one that cannot be set.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    if getattr(model.config, "_attn_implementation", None) != "sdpa" or not model._can_set_attn_implementation():
        return False

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        lengths = rows_of(attention_mask) if query.shape[2] == key.shape[2] and kwargs.get("position_bias") is None else None
        if lengths is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
        parts = zip(*(t.split(lengths, 2) for t in (query, key, value)), strict=True)
        outs = [sdpa_attention_forward(module, q, k, v, None, **{**kwargs, "is_causal": True})[0] for q, k, v in parts]
        return torch.cat(outs, 1), None

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(_NAME)
    return True


def attend_as_before(model: Any) -> None:
    """Undo `attend_by_rows`."""
    model.set_attn_implementation("sdpa")


def rows_of(mask: Tensor | None) -> list[int] | None:
    """The lengths of rows laid end to end, if that is what a mask (1, 1, tokens, tokens) says and nothing else: each token sees those before it in its
    own row, and itself. None for one row, and for every other mask, sliding windows among them."""
    if mask is None or mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3]:
        return None
    if torch.compiler.is_compiling():
        return None
    if mask not in _lengths:
        sees = mask[0, 0]
        row = torch.cat([sees.new_zeros(1), ~sees.diagonal(-1)]).cumsum(0)
        apart = torch.equal(sees, (row.unsqueeze(1) == row).tril_())
        lengths = torch.bincount(row).tolist() if apart else []
        _lengths[mask] = lengths if len(lengths) > 1 else None
    found: list[int] | None = _lengths[mask]
    return found
