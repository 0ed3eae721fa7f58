"""LoHa: the Hadamard product of two low-rank matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..method import Leaf, Targeted, by_pattern
from ..ops import Dense


@dataclass
class LoHaConfig(Targeted, peft_type="LOHA"):
    """W' = W + alpha / r · (w1_a w1_b) ⊙ (w2_a w2_b).   w1_a starts as zeros.   Hyeon-Woo et al. 2021, arXiv:2108.06098.

    With `use_effective_conv2d` a convolution with a kernel over 1 has a Tucker form per factor: t (r, r, *kernel), a (r, n_out), b (r, channels).
    """

    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, int] | None = field(default_factory=dict)
    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False

    prefix: ClassVar[str] = "hada_"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"r": 4},)

    def at(self, name: str) -> LoHaConfig:
        return dataclasses.replace(
            self, r=by_pattern(self.rank_pattern, name, self.r), alpha=by_pattern(self.alpha_pattern, name, self.alpha)
        )

    def scale(self) -> float:
        return self.alpha / self.r

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        r, start = self.r, nn.init.zeros_ if self.init_weights else _narrow
        if site.kind == "conv" and self.use_effective_conv2d and max(site.kernel) > 1:
            kernel = site.kernel if len(site.kernel) > 1 else (*site.kernel, 1)
            channels = site.channels // site.groups
            return {
                key: leaf
                for i in (1, 2)
                for key, leaf in {
                    f"hada_t{i}": Leaf((r, r, *kernel), _narrow),
                    f"hada_w{i}_a": Leaf((r, site.n_out), start if i == 1 else nn.init.normal_),
                    f"hada_w{i}_b": Leaf((r, channels), _wide),
                }.items()
            }
        return {
            "hada_w1_a": Leaf((site.n_out, r), start),
            "hada_w1_b": Leaf((r, site.n_in), _wide),
            "hada_w2_a": Leaf((site.n_out, r), _narrow),
            "hada_w2_b": Leaf((r, site.n_in), _wide),
        }

    def change(self, p: Any, site: Any) -> Change:
        one: Tensor
        two: Tensor
        if hasattr(p, "hada_t1"):
            one, two = (
                torch.einsum("ijkl,jr,ip->prkl", t, b, a).reshape(site.n_out, site.n_in)
                for t, a, b in ((p.hada_t1, p.hada_w1_a, p.hada_w1_b), (p.hada_t2, p.hada_w2_a, p.hada_w2_b))
            )
        else:
            one, two = p.hada_w1_a @ p.hada_w1_b, p.hada_w2_a @ p.hada_w2_b
        return Change(add=Dense(rank_dropped(one * two * site.scaling, self.rank_dropout if site.training else 0.0)))


def rank_dropped(delta: Tensor, rate: float) -> Tensor:
    """Whole output rows of ΔW dropped with probability `rate`, as LyCORIS does."""
    if rate == 0:
        return delta
    return delta * (torch.rand(delta.shape[0], device=delta.device) > rate).to(delta.dtype).unsqueeze(1)


def _narrow(t: Tensor) -> Tensor:
    return nn.init.normal_(t, std=0.1)


def _wide(t: Tensor) -> Tensor:
    return nn.init.normal_(t, std=1.0)
