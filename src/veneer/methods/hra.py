"""HRA: the weight multiplied by Householder reflections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..method import Leaf, Targeted
from ..ops import Reflections


@dataclass
class HRAConfig(Targeted, peft_type="HRA"):
    """W' = W H₁ … H_r,  Hᵢ = I - 2 uᵢ uᵢᵀ, the uᵢ normalised;  with `apply_GS` W' = W (I - 2 U Uᵀ), U orthonormalised.

    `hra_u` (n_in, r) starts in equal pairs of columns, which cancel.   Yuan et al. 2024, arXiv:2405.17484.
    """

    r: int = 8
    apply_GS: bool = False  # noqa: N815  PEFT's name

    prefix: ClassVar[str] = "hra_"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    examples: ClassVar[Any] = ({"r": 4},)

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        return {"hra_u": Leaf((site.n_in, self.r), _pairs if self.init_weights and self.r > 1 else _kaiming)}

    def change(self, p: Any, site: Any) -> Change:
        u = p.hra_u
        if not self.apply_GS:
            return Change(right=Reflections(u / u.norm(dim=0)))
        q: list[Tensor] = []
        for column in u.T:
            for done in q:
                column = column - (done @ column) * done
            q.append(column / column.norm())
        return Change(right=Reflections(torch.stack(q, 1)))  # of orthonormal columns: I - 2 U Uᵀ


def _kaiming(t: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(t, a=math.sqrt(5))


def _pairs(t: Tensor) -> Tensor:
    half = _kaiming(torch.empty(t.shape[0], t.shape[1] // 2, dtype=t.dtype, device=t.device))
    _kaiming(t)
    return t[:, : 2 * half.shape[1]].copy_(half.repeat_interleave(2, 1)) if t.shape[1] % 2 == 0 else t
