"""HRA: the weight multiplied by Householder reflections."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..change import Change
from ..errors import PeftWarning
from ..inits.base import kaiming_
from ..kernels.autograd import no_autocast
from ..method import Leaf, Targeted
from ..ops import Reflections


@dataclass
class HRAConfig(Targeted, peft_type="HRA"):
    """W' = W H₁ … H_r,  Hᵢ = I - 2 uᵢ uᵢᵀ, the uᵢ normalised;  with `apply_GS` W' = W (I - 2 U Uᵀ), U orthonormalised.

    `hra_u` (n_in, r) starts in equal pairs of columns, which cancel, if r is even. With `apply_GS` no start is the identity, and equal columns have
    no orthonormal form, so the start is random (PEFT's has pairs there too, and so gradients without bounds).   Yuan et al. 2024, arXiv:2405.17484.
    """

    r: int = 8
    apply_GS: bool = False  # noqa: N815  PEFT's name

    prefix: ClassVar[str] = "hra_"
    positive: ClassVar[Any] = ("r",)
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    examples: ClassVar[Any] = ({"r": 4}, {"r": 3, "apply_GS": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % 2 and self.init_weights and not self.apply_GS:
            warnings.warn(f"HRA with an odd number of reflections (r={self.r}) does not start as the identity.", PeftWarning, stacklevel=4)

    @property
    def starts_as_identity(self) -> bool:
        return bool(self.init_weights) and self.r % 2 == 0 and not self.apply_GS

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        return {"hra_u": Leaf((site.n_in, self.r), _pairs if self.starts_as_identity else kaiming_)}

    def change(self, p: Any, site: Any) -> Change:
        u: Tensor = p.hra_u
        if not self.apply_GS:
            return Change(right=Reflections(u / u.norm(dim=0)))
        with no_autocast(u.device.type):
            q = torch.linalg.qr(u.float() if u.dtype in (torch.float16, torch.bfloat16) else u).Q
        return Change(right=Reflections(q.to(u.dtype)))  # of orthonormal columns: I - 2 U Uᵀ


def _pairs(t: Tensor) -> Tensor:
    half = kaiming_(torch.empty(t.shape[0], t.shape[1] // 2, dtype=t.dtype, device=t.device))
    return t.copy_(half.repeat_interleave(2, 1))
