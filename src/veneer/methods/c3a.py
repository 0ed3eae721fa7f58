"""C³A: a change made of circulant blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError, hint
from ..method import Init, Leaf, Targeted
from ..ops import Derived
from .fourierft import at_pattern

STARTS = ("xavier_uniform", "kaiming_uniform", "gaussian")


@dataclass
class C3AConfig(Targeted, peft_type="C3A"):
    """W' = W + D / n_in,  D of circulant blocks, block (m, n) made of the kernel `c3a_kernel[m, n]` (b,).   Chen et al. 2024, arXiv:2407.19342.

    Without init_weights=True the start is random, and not the identity. Several active adapters add up; in PEFT each reads what the one before gave, and
    its merge adds them up.
    """

    block_size: int = 256
    block_size_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool | str | None = "xavier_uniform"

    prefix: ClassVar[str] = "c3a_"
    stacking: ClassVar[Any] = "sum"
    linear_in: ClassVar[str] = "c3a_kernel"
    examples: ClassVar[Any] = ({"block_size": 4, "init_weights": True},)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (True, False, *STARTS):
            raise ConfigError(
                f"`init_weights` is True, False or one of {', '.join(STARTS)}, got {self.init_weights!r}.{hint(str(self.init_weights), STARTS)}"
            )

    def at(self, name: str) -> C3AConfig:
        return dataclasses.replace(self, block_size=at_pattern(self.block_size_pattern, name, self.block_size))

    def check(self, site: Any) -> None:
        for n in (site.n_in, site.n_out):
            if self.block_size < 1 or n % self.block_size:
                raise ConfigError(f"C3A: the block size {self.block_size} does not divide {n} of {site.name!r} ({site.n_out}x{site.n_in}).")

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        b = self.block_size
        wide = math.sqrt(6 / (site.n_in + site.n_out)) if self.init_weights in ("xavier_uniform", False) else math.sqrt(1 / site.n_in)
        start: Init = lambda t: nn.init.uniform_(t, -wide, wide)
        if self.init_weights in (True, "gaussian"):
            start = nn.init.normal_ if self.init_weights == "gaussian" else nn.init.zeros_
        return {"c3a_kernel": Leaf((site.n_out // b, site.n_in // b, b), start)}

    def change(self, p: Any, site: Any) -> Change:
        return Change(add=Derived(_circulant, (p.c3a_kernel * (site.scaling / site.n_in),)))


def _circulant(k: Tensor) -> Tensor:
    """The matrix of circulant blocks that have the kernels k (m, n, b) as their first rows."""
    b = k.shape[-1]  # entry (i, j) is k[j - i], which in k repeated is at i (b - 1) + j: all columns but the last are a view of that
    rows = k.repeat(1, 1, b - 1).view(*k.shape[:2], b, b - 1)
    blocks = torch.cat([rows, rows[..., :1].roll(-1, -2)], -1) if b > 1 else k.unsqueeze(-1)
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)
