"""VeLoRA: LoRA that keeps a small part of its input for the backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError, hint
from ..kernels.compressed import compressed_linear, grouped
from ..method import Leaf
from ..ops import Geometry, LowRank, Op
from .base import Variant


@dataclass
class VeloraConfig:
    """Args:
    num_groups: into how many groups the inputs of a layer are divided.
    scale: of what is rebuilt in the backward.
    init_type: where the direction comes from: the mean group of every batch, of the first one alone, or chance.
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def __post_init__(self) -> None:
        known = ("batch_average_once", "batch_average", "random")
        if self.num_groups <= 0 or self.scale <= 0:
            raise ConfigError(f"`num_groups` and `scale` should be positive, got {self.num_groups} and {self.scale}.")
        if self.init_type not in known:
            raise ConfigError(
                f"Unsupported `init_type` {self.init_type!r}. Supported: {', '.join(known)}.{hint(str(self.init_type), known)}"
            )


class Velora(Variant):
    """W' = W + s B A, as LoRA; but in training the gradient of A is that for x_g ≈ scale · v (v · x_g), x_g the groups of the input.

    So a layer keeps `num_groups` numbers a token, not n_in. v (⌈n_in / num_groups⌉) is a unit vector, kept as `lora_velora_embed`. Miles et al. 2024,
    arXiv:2405.17991.
    """

    field: ClassVar[str] = "velora_config"
    options: ClassVar[type[Any] | None] = VeloraConfig
    example: ClassVar[Any] = {"velora_config": VeloraConfig(num_groups=3)}

    def leaves(self, config: Any, site: Any, leaves: Mapping[str, Leaf]) -> Mapping[str, Leaf]:
        options: VeloraConfig = config.velora_config
        start = (lambda t: nn.functional.normalize(t.normal_(), dim=0, out=t)) if options.init_type == "random" else nn.init.zeros_
        size = -(-site.n_in // options.num_groups)
        return {**leaves, "lora_velora_embed": Leaf((size,), start, trainable=False, running=options.init_type != "random")}

    def change(self, config: Any, p: Any, site: Any, add: LowRank) -> Change:
        options: VeloraConfig = config.velora_config
        return Change(add=Compressed(add, p.lora_velora_embed, options.scale, options.init_type) if site.training else add)


class Compressed(Op):
    """M = s B A, whose `rows` keeps for the gradient of A what `compressed_linear` keeps.

    Args:
        low: s B A.
        v: the direction, (size,); set from the input unless `follow` is "random".
    """

    def __init__(self, low: LowRank, v: Tensor, scale: float, follow: str) -> None:
        self.low, self.v, self.scale, self.follow = low, v, scale, follow

    def dense(self) -> Tensor:
        return self.low.dense()

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        if self.low.dropout > 0:
            x = geo.drop(x, self.low.dropout)
        if self.follow != "random" and x.numel():
            with torch.no_grad():
                mean = nn.functional.normalize(grouped(x.float(), len(self.v)).mean((0, 1)), dim=0).to(self.v.dtype)
                self.v.copy_(mean if self.follow == "batch_average" else torch.where(self.v.any(), self.v, mean))
        h = compressed_linear(x, self.low.down.to(x.dtype), self.v.clone(), self.scale)
        return geo.mix(h, self.low.up.to(h.dtype) * self.low.scale)
