"""BD-LoRA: one factor block-diagonal, so that a layer split over devices needs no exchange between A and B."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..change import Change
from ..errors import ConfigError
from ..method import Leaf
from ..ops import LowRank
from .base import Variant


@dataclass
class BdLoraConfig:
    """Args:
    target_modules_bd_a, target_modules_bd_b: parts of the last names of the layers whose A (or B) is block-diagonal.
    nblocks: the number of blocks.
    match_strict: whether a targeted layer in neither list is an error; otherwise it is plain LoRA.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def side(self, name: str) -> str | None:
        """Which factor of the layer `name` has blocks: "lora_A", "lora_B" or None.

        Raises:
            ConfigError: if it is in both lists, or in none while `match_strict`.
        """
        last = name.rpartition(".")[2]
        a, b = (any(part in last for part in _names(t)) for t in (self.target_modules_bd_a, self.target_modules_bd_b))
        if a and b:
            raise ConfigError(f"BD-LoRA: {name!r} is in target_modules_bd_a and in target_modules_bd_b. One factor can have blocks.")
        if self.match_strict and not (a or b):
            raise ConfigError(
                f"BD-LoRA: target {name!r} matches neither target_modules_bd_a nor target_modules_bd_b. "
                "Name it in one of them, or set match_strict=False in BdLoraConfig to give it plain LoRA."
            )
        return "lora_A" if a else "lora_B" if b else None


class BdLora(Variant):
    """W' = W + s B A with A or B block-diagonal of n blocks.

    A is kept as (r, n_in / n), or B as (n_out, r / n): its blocks one below the other. arXiv:2510.23346.
    """

    field: ClassVar[str] = "use_bdlora"
    options: ClassVar[type[Any] | None] = BdLoraConfig
    starts: ClassVar[tuple[bool | str, ...] | None] = (True, False)
    example: ClassVar[Any] = {"use_bdlora": BdLoraConfig(None, ["site"], 2)}

    def check(self, config: Any, site: Any) -> None:
        super().check(config, site)
        n, side = config.use_bdlora.nblocks, config.use_bdlora.side(site.name)
        wide = site.n_in if side == "lora_A" else site.n_out
        if side is not None and (n < 1 or wide % n or config.r % n):
            raise ConfigError(f"BD-LoRA: {side} of {site.name!r} is {wide} wide with rank {config.r}: not divisible by nblocks={n}.")

    def leaves(self, config: Any, site: Any, leaves: Mapping[str, Leaf]) -> Mapping[str, Leaf]:
        n, side = config.use_bdlora.nblocks, config.use_bdlora.side(site.name)
        out = dict(leaves)
        if side == "lora_A":
            out[side] = dataclasses.replace(out[side], shape=(config.r, site.n_in // n), init=nn.init.kaiming_uniform_)
        elif side == "lora_B":
            out[side] = dataclasses.replace(out[side], shape=(site.n_out, config.r // n))
        if config.init_lora_weights is False:
            out["lora_B"] = dataclasses.replace(out["lora_B"], init=lambda t: nn.init.kaiming_uniform_(t, a=math.sqrt(5)))
        return out

    def change(self, config: Any, p: Any, site: Any, add: LowRank) -> Change:
        n, side = config.use_bdlora.nblocks, config.use_bdlora.side(site.name)
        down = torch.block_diag(*add.down.chunk(n)) if side == "lora_A" else add.down
        up = torch.block_diag(*add.up.chunk(n)) if side == "lora_B" else add.up
        return Change(add=LowRank(up, down, add.scale, add.dropout))


def _names(value: Sequence[str] | str | None) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value or ()
