"""DeLoRA: a low-rank change of bounded strength, its angle and its size learned apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..inits.base import kaiming_
from ..method import Leaf, Targeted
from ..ops import LowRank


@dataclass
class DeloraConfig(Targeted, peft_type="DELORA"):
    """W' = W + B diag(λ / (r ‖B_j‖ ‖A_j‖)) A ⊙ w,  w the column norms of W when the adapter was made.   Bini et al. 2025, arXiv:2503.18225.

    λ (`delora_lambda`) trains, w (`delora_w_norm`) does not. `module_dropout` is the probability that a layer's change does not act in a call of the
    training, as PEFT documents it; what PEFT does is to drop entries of the input.
    """

    r: int = 8
    delora_lambda: int = 15
    module_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    lambda_pattern: dict[str, int] | None = field(default_factory=dict)

    prefix: ClassVar[str] = "delora_"
    patterns: ClassVar[Any] = {"r": "rank_pattern", "delora_lambda": "lambda_pattern"}
    positive: ClassVar[Any] = ("r",)
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"r": 4},)

    def skip(self) -> float:
        return self.module_dropout

    def check(self, site: Any) -> None:
        if not self.delora_lambda and self.init_weights and not self.inference_mode:
            raise ConfigError(
                f"`delora_lambda`=0 starts DeLoRA on {site.name!r} with λ and B both zero, so that nothing gets a gradient. Give another one, such as 15."
            )

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        return {
            "delora_A": Leaf((self.r, site.n_in), kaiming_),
            "delora_B": Leaf((site.n_out, self.r), nn.init.zeros_ if self.init_weights else kaiming_),
            "delora_lambda": Leaf((1,), lambda t: nn.init.constant_(t, self.delora_lambda)),
            "delora_w_norm": Leaf((site.n_in,), nn.init.ones_, trainable=False),
        }

    def start(self, site: Any, *, only_frozen: bool = False) -> Mapping[str, Tensor]:
        return {} if only_frozen else {"delora_w_norm": site.weight().float().norm(dim=0)}

    def change(self, p: Any, site: Any) -> Change:
        a, b = p.delora_A, p.delora_B
        length = a.norm(dim=1).clamp_min(1e-4) * b.norm(dim=0).clamp_min(1e-4)
        return Change(add=LowRank(b * (p.delora_lambda / (self.r * length)), a * p.delora_w_norm, site.scaling))
