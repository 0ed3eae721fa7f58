"""SHiRA: a sparse change at fixed places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..method import Leaf, Targeted
from ..ops import Sparse


@dataclass
class ShiraConfig(Targeted, peft_type="SHIRA"):
    """W' = W + D,  D zero but for r (n_out + n_in) trained entries `shira_weight` at `shira_indices`.   Bhardwaj et al. 2024, arXiv:2406.13175."""

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None

    prefix: ClassVar[str] = "shira_"
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"r": 2, "random_seed": 1},)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mask_fn: Any = None  # called with (layer, r, **kwargs) for a 0/1 mask of the weight's shape
        if self.mask_type != "random":
            raise ConfigError(f"`mask_type` can be 'random', got {self.mask_type!r}. For a mask of your own set config.mask_fn.")

    def _count(self, site: Any) -> int:
        n: int = self.r * (site.n_out + site.n_in)
        if n > site.n_out * site.n_in:
            raise ConfigError(f"SHiRA with r={self.r} wants {n} entries of {site.name!r}, which has {site.n_out * site.n_in}. Lower r.")
        return n

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        n = self._count(site)
        return {
            "shira_weight": Leaf((n,), nn.init.zeros_ if self.init_weights else nn.init.normal_),
            "shira_indices": Leaf((2, n), nn.init.zeros_, trainable=False, dtype=torch.int32),
        }

    def start(self, site: Any, *, only_frozen: bool = False) -> Mapping[str, Tensor]:
        if only_frozen:
            return {}
        if self.mask_fn is not None:
            mask = self.mask_fn(site.module, self.r, **{"random_seed": self.random_seed} if self.mask_type == "random" else {})
            return {"shira_indices": mask.nonzero().T.to(torch.int32)}
        generator = torch.Generator()
        generator = generator.manual_seed(self.random_seed) if self.random_seed is not None else torch.default_generator
        at = torch.randperm(site.n_out * site.n_in, generator=generator)[: self._count(site)]
        return {"shira_indices": torch.stack([at // site.n_in, at % site.n_in]).to(torch.int32)}

    def change(self, p: Any, site: Any) -> Change:
        i, j = p.shira_indices.long()
        return Change(add=Sparse(i * site.n_in + j, p.shira_weight * site.scaling, (site.n_out, site.n_in)))
