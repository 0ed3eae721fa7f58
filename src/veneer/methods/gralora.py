"""GraLoRA: every block of the weight has a low-rank change of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..change import Change
from ..errors import ConfigError
from ..method import Leaf, Targeted
from ..ops import BlockDiag, Dropped, LowRank, Op, Product, Shuffle, Sum


@dataclass
class GraloraConfig(Targeted, peft_type="GRALORA"):
    """W' = W + s · B P A,  s = alpha / (r + hybrid_r),  A and B block-diagonal of k = `gralora_k` blocks.   Jung et al. 2025, arXiv:2505.20355.

    `gralora_A` (k, n_in / k, r) is uniform like LoRA's, `gralora_B` (k, r, n_out / k) zero at the start. P deals the r numbers of each block of
    inputs out to the blocks of outputs, r / k to each, so that block (j, n) of the change has rank r / k. With `hybrid_r` an ordinary LoRA of that rank
    (`gralora_A_general`, `gralora_B_general`) is added.
    """

    r: int = 32
    hybrid_r: int = 0
    alpha: int = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2

    prefix: ClassVar[str] = "gralora_"
    positive: ClassVar[Any] = ("r", "gralora_k")
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"r": 4}, {"r": 4, "gralora_k": 4, "hybrid_r": 2})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hybrid_r < 0:
            raise ConfigError(f"`hybrid_r` should not be negative, got {self.hybrid_r}.")
        if self.r % self.gralora_k:
            raise ConfigError(f"r should be divisible by gralora_k, but got {self.r} and {self.gralora_k}.")

    def scale(self) -> float:
        return self.alpha / (self.r + self.hybrid_r)

    def check(self, site: Any) -> None:
        if site.n_in % self.gralora_k or site.n_out % self.gralora_k:
            raise ConfigError(
                f"GraLoRA: gralora_k={self.gralora_k} does not divide both sides of {site.name!r} ({site.n_out} x {site.n_in})."
            )

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        k, r, h = self.gralora_k, self.r, self.hybrid_r
        last = nn.init.zeros_ if self.init_weights else None
        out = {
            "gralora_A": Leaf((k, site.n_in // k, r), _uniform(site.n_in // k)),
            "gralora_B": Leaf((k, r, site.n_out // k), last or _uniform(r)),
        }
        if h:
            out["gralora_A_general"] = Leaf((h, site.n_in), _uniform(site.n_in), attr="weight")
            out["gralora_B_general"] = Leaf((site.n_out, h), last or _uniform(h), attr="weight")
        return out

    def change(self, p: Any, site: Any) -> Change:
        k, a, b = self.gralora_k, p.gralora_A, p.gralora_B * site.scaling
        add: Op = Product([BlockDiag(b.mT), Shuffle(k, k, self.r // k, k * self.r, a), BlockDiag(a.mT)])
        if self.hybrid_r:
            add = Sum([add, LowRank(p.gralora_B_general, p.gralora_A_general, site.scaling)])
        return Change(add=Dropped(add, site.dropout) if site.dropout > 0 else add)


def _uniform(fan_in: int) -> Any:
    bound = 1 / math.sqrt(fan_in)
    return lambda t: nn.init.uniform_(t, -bound, bound)
