"""BEFT: a trained bias on each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..change import Change
from ..method import Leaf, Targeted


@dataclass
class BeftConfig(Targeted, peft_type="BEFT"):
    """y ← y + v,  v (1, n_out) starts as zeros.   arXiv:2509.15974."""

    prefix: ClassVar[str] = "beft_"
    linear_in: ClassVar[str] = "beft_bias"

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        return {"beft_bias": Leaf((1, site.n_out), nn.init.zeros_ if self.init_weights else nn.init.normal_)}

    def has_delta(self) -> bool:
        return False  # no weight changes

    def change(self, p: Any, site: Any) -> Change:
        return Change(shift=p.beft_bias.flatten() * site.scaling)
