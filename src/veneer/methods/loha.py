"""LoHa: the Hadamard product of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..inits.base import kaiming_
from ..method import Leaf, Targeted
from ..ops import Derived, rank_dropped


@dataclass
class LoHaConfig(Targeted, peft_type="LOHA"):
    """W' = W + alpha / r · (w1_a w1_b) ⊙ (w2_a w2_b).   w2_b starts as zeros.   Hyeon-Woo et al. 2021, arXiv:2108.06098.

    With `use_effective_conv2d` a convolution with a kernel over 1 has a Tucker form per factor: t (r, r, *kernel), a (r, n_out), b (r, channels). In
    training `rank_dropout` drops rows of the change and scales up what is left, and `module_dropout` is the probability that a layer's change does not
    act in a call.
    """

    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, int] | None = field(default_factory=dict)
    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False

    prefix: ClassVar[str] = "hada_"
    patterns: ClassVar[Any] = {"r": "rank_pattern", "alpha": "alpha_pattern"}
    positive: ClassVar[Any] = ("r",)
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"r": 4}, {"r": 1})

    def scale(self) -> float:
        return self.alpha / self.r

    def skip(self) -> float:
        return self.module_dropout

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        r, last = self.r, nn.init.zeros_ if self.init_weights else kaiming_
        sides: tuple[tuple[int, ...], tuple[int, ...]] = (site.n_out, r), (r, site.n_in)
        out: dict[str, Leaf] = {}
        if site.kind == "conv" and self.use_effective_conv2d and max(site.kernel) > 1:
            kernel = site.kernel if len(site.kernel) > 1 else (*site.kernel, 1)
            sides = (r, site.n_out), (r, site.channels // site.groups)
            out = {f"hada_t{i}": Leaf((r, r, *kernel), kaiming_) for i in (1, 2)}
        for i in (1, 2):
            out[f"hada_w{i}_a"] = Leaf(sides[0], kaiming_)
            out[f"hada_w{i}_b"] = Leaf(sides[1], last if i == 2 else kaiming_)
        return out

    def change(self, p: Any, site: Any) -> Change:
        parts: tuple[Tensor, ...] = (p.hada_w1_a * site.scaling, p.hada_w1_b, p.hada_w2_a, p.hada_w2_b)
        r, thin = p.hada_w1_b.shape[0], None
        if hasattr(p, "hada_t1"):
            parts = (*parts, p.hada_t1, p.hada_t2)
        elif 3 * r * r * (site.n_in + site.n_out) < site.n_in * site.n_out and (site.kind == "linear" or site.groups == 1):
            thin = _thin
        rate = self.rank_dropout if site.training else 0.0
        return Change(add=rank_dropped(Derived(_hadamard, parts, thin), rate, site.n_out, parts[0], rescale=True))


def _hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, t1: Tensor | None = None, t2: Tensor | None = None) -> Tensor:
    one, two = (a @ b if t is None else torch.einsum("ij...,ip,jq->pq...", t, a, b).flatten(1) for a, b, t in ((a1, b1, t1), (a2, b2, t2)))
    whole: Tensor = one * two
    return whole


def _thin(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """(n_out, r²) and (r², n_in), whose product is the Hadamard product: each column of the one first factor times each of the other, and so with rows."""
    return torch.einsum("oi,oj->oij", a1, a2).flatten(1), torch.einsum("in,jn->ijn", b1, b2).flatten(0, 1)
