"""A pass of the model before the real one, to see what it makes of its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RouteError


@torch.no_grad()
def last_hidden_state(call: Any, facts: Mapping[str, Tensor] | None) -> Tensor:
    """The last hidden state (rows, tokens, width) for the inputs of a call; of a model that tells none, its output.

    In `generate` the pass has a cache of its own, which `call.memory` keeps.

    Args:
        facts: None: without any adapter; else with this one, and with these facts.

    Raises:
        RouteError: if there is no such state, or a part of the sequence is in a cache only.
    """
    if call.encoder_decoder:
        raise RouteError("The router reads the last hidden state of one sequence, and an encoder-decoder has two. Use LoRA there.")
    cache, before = call.memory.get("cache"), call.before
    if before and (cache is None or cache.get_seq_length() < before):
        raise RouteError(
            f"The call goes on with {before} tokens of a cache, and the router has to see the whole sequence. Use generate, or no cache."
        )
    if cache is not None and (surplus := cache.get_seq_length() - before) > 0:
        cache.crop(-surplus)  # tokens that generate has taken back
    out = call.run(facts, **_asked(call, cache))
    if call.prompt is not None:
        call.memory["cache"] = getattr(out, "past_key_values", None)
    states = getattr(out, "hidden_states", None)
    hidden = states[-1] if states else out
    if not isinstance(hidden, Tensor):
        raise RouteError(f"The router reads a last hidden state, and {type(call.model).__name__} gives none.")
    return hidden.unsqueeze(1) if hidden.ndim == 2 else hidden


def _asked(call: Any, cache: Any) -> dict[str, Any]:
    """What the pass is asked beside the inputs: hidden states, a cache of its own, and nothing that is not needed."""
    taken = inspect.signature(call.model.forward).parameters
    if "output_hidden_states" not in taken and not hasattr(getattr(call.model, "config", None), "output_hidden_states"):
        return {}
    keep = call.prompt is not None and bool(call.inputs.get("use_cache"))
    spare = {"use_cache": keep, "past_key_values": cache, "labels": None, "logits_to_keep": 1}
    return {"output_hidden_states": True, "return_dict": True, **{k: v for k, v in spare.items() if k in taken or k in call.inputs}}
