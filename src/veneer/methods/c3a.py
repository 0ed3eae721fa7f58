"""C³A: a change made of circulant blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..method import Leaf, Targeted
from ..ops import Dense
from .fourierft import at_pattern


@dataclass
class C3AConfig(Targeted, peft_type="C3A"):
    """W' = W + D / n_in,  D of circulant blocks, block (m, n) made of the kernel `c3a_kernel[m, n]` (b,).   Chen et al. 2024, arXiv:2407.19342."""

    block_size: int = 256
    block_size_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool | str | None = "xavier_uniform"

    prefix: ClassVar[str] = "c3a_"
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"block_size": 4, "init_weights": True},)

    def at(self, name: str) -> C3AConfig:
        return dataclasses.replace(self, block_size=at_pattern(self.block_size_pattern, name, self.block_size))

    def check(self, site: Any) -> None:
        for n in (site.n_in, site.n_out):
            if n % self.block_size:
                raise ConfigError(f"C3A: the block size {self.block_size} does not divide {n} of {site.name!r} ({site.n_out}x{site.n_in}).")

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        b = self.block_size
        return {"c3a_kernel": Leaf((site.n_out // b, site.n_in // b, b), self._start)}

    def _start(self, t: Tensor) -> Tensor:
        kind = self.init_weights
        if kind in (None, True):
            return nn.init.zeros_(t)
        if kind == "gaussian":
            return nn.init.normal_(t)
        return nn.init.kaiming_uniform_(t) if kind in ("kaiming_uniform", False) else nn.init.xavier_uniform_(t)

    def change(self, p: Any, site: Any) -> Change:
        k: Tensor = p.c3a_kernel
        b = k.shape[-1]
        i = torch.arange(b, device=k.device)
        blocks = k[..., (i[None, :] - i[:, None]) % b]  # (m, n, b, b) circulant
        return Change(add=Dense(blocks.transpose(1, 2).reshape(site.n_out, site.n_in) / site.n_in))
