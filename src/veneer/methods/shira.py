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
    """W' = W + D,  D zero but for r (n_out + n_in) trained entries `shira_weight` at `shira_indices`.   Bhardwaj et al. 2024, arXiv:2406.13175.

    The places are drawn at random (`random_seed`), or those of the ones in a mask: `config.mask_fn(layer, r, **kwargs)`, set on the config, gives a mask
    of each layer's weight, with the seed among kwargs if `mask_type` is "random".
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None

    prefix: ClassVar[str] = "shira_"
    positive: ClassVar[Any] = ("r",)
    stacking: ClassVar[Any] = "sum"
    linear_in: ClassVar[str] = "shira_weight"
    examples: ClassVar[Any] = ({"r": 2, "random_seed": 1},)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mask_fn: Any = None  # called with (layer, r, **kwargs) for a 0/1 mask of the weight's shape

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
            return {"shira_indices": self._of_mask(mask, site)}
        if self.mask_type != "random":
            raise ConfigError(
                f"There is no `mask_type` {self.mask_type!r} but 'random'. For a mask of your own give config.mask_fn, a function (layer, r) -> mask."
            )
        generator = torch.Generator()
        generator = generator.manual_seed(self.random_seed) if self.random_seed is not None else torch.default_generator
        at = torch.randperm(site.n_out * site.n_in, generator=generator)[: self._count(site)].sort().values
        return {"shira_indices": torch.stack([at // site.n_in, at % site.n_in]).to(torch.int32)}

    def _of_mask(self, mask: Tensor, site: Any) -> Tensor:
        """The places of the ones in a mask of the layer's weight, as it is stored."""
        shape, ones, wanted = tuple(site.layer.get_base_weight().shape), int(mask.count_nonzero()), self._count(site)
        if tuple(mask.shape) != shape or ones != wanted:
            raise ConfigError(
                f"SHiRA: the mask of {site.name!r} is {tuple(mask.shape)} with {ones} ones; r={self.r} asks for {shape} with {wanted}."
            )
        at: Tensor = site.layer.site.canonical(mask).nonzero().T
        return at.to(torch.int32)

    def change(self, p: Any, site: Any) -> Change:
        i, j = p.shira_indices.long()
        return Change(add=Sparse(i * site.n_in + j, p.shira_weight * site.scaling, (site.n_out, site.n_in)))
