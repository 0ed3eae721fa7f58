"""LoKr: a Kronecker product of two small matrices, each of them low-rank or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..inits.base import kaiming_
from ..method import Leaf, Targeted
from ..ops import Dense, Kron, Op, rank_dropped


@dataclass
class LoKrConfig(Targeted, peft_type="LOKR"):
    """W' = W + alpha / r · w1 ⊗ w2,  w1 (l, m), w2 (k, n), l k = n_out, m n = n_in.   Yeh et al. 2023, arXiv:2309.14859.

    The sides are divided by `factorization(side, decompose_factor)`, in a convolution its channels, with w2 (k, n, *kernel). w2 is
    w2_a w2_b of rank r where r is below half of its longer side; w1 likewise, with `decompose_both`. With `use_effective_conv2d` a kernel over 1 has
    the Tucker form w2 = Σ t2[i, j] ⊗ w2_a[i] ⊗ w2_b[j]. w1 starts as zeros; with init_weights="lycoris" w2 does.

    A one-dimensional convolution with a whole w2 has the same entries in another order, which PEFT's files mean: those of
    w1 ⊗ w2[:, :, t] for w1 (1, l, m) and w2 (k, n, kernel) as three-dimensional tensors, read as (n_out, channels, kernel).

    In training `rank_dropout` drops rows of the change (what is left is scaled up with `rank_dropout_scale`), and `module_dropout` is the probability
    that a layer's change does not act in a call.
    """

    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, int] | None = field(default_factory=dict)
    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: Any = True

    prefix: ClassVar[str] = "lokr_"
    patterns: ClassVar[Any] = {"r": "rank_pattern", "alpha": "alpha_pattern"}
    positive: ClassVar[Any] = ("r",)
    choices: ClassVar[Any] = {"init_weights": (True, False, "lycoris")}
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = (
        {"r": 4},
        {"r": 1, "decompose_both": True, "use_effective_conv2d": True, "init_weights": "lycoris"},
    )

    def scale(self) -> float:
        return self.alpha / self.r

    def skip(self) -> float:
        return self.module_dropout

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        r, kernel = self.r, site.kernel
        m, n = factorization(site.n_in // math.prod(kernel), self.decompose_factor)
        l, k = factorization(site.n_out, self.decompose_factor)  # noqa: E741  the paper's letters
        one, two = (kaiming_ if self.init_weights in (False, x) else nn.init.zeros_ for x in ("lycoris", True))
        if self.decompose_both and r < max(l, m) / 2:
            out = {"lokr_w1_a": Leaf((l, r), one), "lokr_w1_b": Leaf((r, m), kaiming_)}
        else:
            out = {"lokr_w1": Leaf((l, m), one)}
        if r >= max(k, n) / 2:
            return {**out, "lokr_w2": Leaf((k, n, *kernel), two)}
        if self.use_effective_conv2d and max(kernel, default=1) > 1:
            core = kernel if len(kernel) > 1 else (*kernel, 1)
            return {
                **out,
                "lokr_t2": Leaf((r, r, *core), kaiming_),
                "lokr_w2_a": Leaf((r, k), kaiming_),
                "lokr_w2_b": Leaf((r, n), two),
            }
        return {**out, "lokr_w2_a": Leaf((k, r), kaiming_), "lokr_w2_b": Leaf((r, n * math.prod(kernel)), two)}

    def change(self, p: Any, site: Any) -> Change:
        w1: Tensor = (p.lokr_w1 if hasattr(p, "lokr_w1") else p.lokr_w1_a @ p.lokr_w1_b) * site.scaling
        add: Op
        if hasattr(p, "lokr_w2") and len(site.kernel) == 1:  # PEFT's order of the entries: w1's columns and w2's rows change places
            add = Dense(torch.kron(w1.unsqueeze(0), p.lokr_w2.contiguous()).reshape(site.n_out, site.n_in))
        elif hasattr(p, "lokr_w2"):
            add = Kron(w1, p.lokr_w2.flatten(1))
        elif hasattr(p, "lokr_t2"):
            add = Kron(w1, torch.einsum("ij...,ip,jq->pq...", p.lokr_t2, p.lokr_w2_a, p.lokr_w2_b).flatten(1))
        else:
            add = Kron(w1, p.lokr_w2_a, p.lokr_w2_b)
        rate = self.rank_dropout if site.training else 0.0
        return Change(add=rank_dropped(add, rate, site.n_out, w1, rescale=self.rank_dropout_scale))


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers (m, n), m ≤ n unless m is the factor asked for, whose product is `dimension`.

    A `factor` that divides it is m. Otherwise m is the largest divisor up to the square root, and up to `factor` where that is not -1.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    top = math.isqrt(dimension) if factor == -1 else min(math.isqrt(dimension), factor)
    m = next((d for d in range(top, 1, -1) if dimension % d == 0), 1)
    return m, dimension // m
