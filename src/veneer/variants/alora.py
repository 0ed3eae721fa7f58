"""aLoRA: LoRA from the last invocation in a row on. What comes before it is the base's, so its part of a cache can be shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..change import Change
from ..errors import ConfigError, RouteError
from ..ops import Between, LowRank, per_token
from .base import Variant

NEVER = torch.iinfo(torch.int64).max


class ALora(Variant):
    """W' = W + s B A for the tokens from the start of the last `alora_invocation_tokens` of their row on, W' = W for all others.

    A row without them gets the base. Greenewald et al. 2025, arXiv:2504.12397. They are looked for in `input_ids`, in `generate` in the prompt;
    `alora_offsets` says it instead: per row, how many tokens before the end (of the prompt) it begins, None or 0 for not at all. Beams, a cache,
    none, or one that the prompt continues make no difference; where neither tells, it is an error (PEFT runs the base).
    """

    field: ClassVar[str] = "alora_invocation_tokens"
    starts: ClassVar[tuple[bool | str, ...] | None] = None
    example: ClassVar[Any] = {"alora_invocation_tokens": [3, 5]}
    unmergeable: ClassVar[str] = "it acts on the tokens from its invocation on only"
    routes: ClassVar[bool] = True
    takes: ClassVar[tuple[str, ...]] = ("alora_offsets",)

    def read(self, value: Any) -> list[int]:
        if not isinstance(value, Sequence) or not value or any(type(t) is not int for t in value):
            raise ConfigError(f"`{self.field}` is a list of token ids, at least one, got {value!r}.")
        return list(value)

    def check(self, config: Any, site: Any) -> None:
        super().check(config, site)
        if config.lora_bias:
            raise ConfigError(f"`lora_bias` does not go with `{self.field}`: a bias would act on every token.")

    def example_call(self, rows: int) -> dict[str, Tensor]:
        return {"alora_offsets": torch.tensor([2, 1, 0, 9] * rows)[:rows]}

    def facts(self, config: Any, call: Any) -> Mapping[str, Tensor]:
        if call.encoder_decoder:
            raise RouteError("aLoRA begins to act in the midst of one sequence, and an encoder-decoder has two. Use LoRA there.")
        if "start" not in call.memory:
            call.memory["start"] = self._start(config, call)
        start: Tensor = call.memory["start"]
        return {"active": torch.arange(call.before, call.before + call.shape[1], device=start.device) >= start.unsqueeze(1)}

    def _start(self, config: Any, call: Any) -> Tensor:
        """The place, counted from the first token of the sequence, from which each row's tokens are changed."""
        offsets, (rows, length) = call.given.get("alora_offsets"), call.shape
        ids, end = call.inputs.get("input_ids"), call.before + length
        if call.prompt is not None:
            ids = next((call.prompt[n] for n in ("input_ids", "inputs") if call.prompt.get(n) is not None), None)
            end = call.prompt_length
        if offsets is not None:
            given = offsets.tolist() if isinstance(offsets, Tensor) else list(offsets)
            if not given or rows % len(given):
                raise RouteError(f"`alora_offsets` has {len(given)} entries for {rows} rows. Give one per row.")
            device = next(t.device for t in call.inputs.values() if isinstance(t, Tensor))
            return torch.tensor([max(end - int(o), 0) if o else NEVER for o in given], device=device)
        if ids is None:
            raise RouteError("aLoRA finds where it acts in `input_ids`, and the call has none. Pass alora_offsets=[...], one per row.")
        if call.prompt is None and call.before:
            raise RouteError(
                f"The call goes on with {call.before} tokens of a cache, which aLoRA cannot search for its invocation. Pass alora_offsets=[...]: per row, "
                "how many of these tokens from the end on are changed, all of them after an invocation in the cache, 0 where there is none."
            )
        wanted = torch.tensor(config.alora_invocation_tokens, device=ids.device)
        if ids.shape[1] < len(wanted):
            return torch.full((len(ids),), NEVER, device=ids.device)
        hit = (ids.unfold(1, len(wanted), 1) == wanted).all(-1)
        places: Tensor = torch.arange(hit.shape[1], device=ids.device).expand_as(hit).masked_fill(~hit, -1).amax(1)
        return places.masked_fill(places < 0, NEVER)

    def change(self, config: Any, p: Any, site: Any, add: LowRank) -> Change:
        active, name = site.fact("active"), site.name

        def gate(h: Tensor, x: Tensor) -> Tensor:
            return h.masked_fill(~per_token(active.to(h.device), h.shape[:-1], name).unsqueeze(-1), 0)

        return Change(add=Between(add.up, add.down, gate, add.scale, add.dropout, why=self.unmergeable))
