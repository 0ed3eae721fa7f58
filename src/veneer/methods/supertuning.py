"""Super-Tuning: the largest (or smallest) entries of the weight train, with a LoRA beside them if wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..inits.base import kaiming_
from ..method import Leaf, Targeted
from ..ops import LowRank, Sparse, Sum


@dataclass
class SupertuningConfig(Targeted, peft_type="SUPERTUNING"):
    """W' = W + D (+ (alpha / r) B A),  D zero but for `supertuning_values` at `supertuning_indices` of the flattened W.   arXiv:2607.09287.

    The share 1 - `sparsity` of entries trains: those with the largest |W|, or the smallest with `select_top=False`. Values start as zeros and are
    kept in float32. With `r` a LoRA A (r, n_in), B (n_out, r) is trained beside them, alpha twice r if not given. With
    `save_precomputed_indices=False` the places are not in the file but found again in W, which then has to be the very same.
    """

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    save_precomputed_indices: bool = True

    prefix: ClassVar[str] = "supertuning_"
    positive: ClassVar[Any] = ("r",)
    shares: ClassVar[Any] = ("sparsity",)
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"sparsity": 0.8}, {"sparsity": 0.9, "r": 2, "select_top": False, "save_precomputed_indices": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is None and self.lora_alpha is not None:
            raise ConfigError("`lora_alpha` is set, and there is no LoRA: give `r` too.")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r

    def dropout(self) -> float:
        return self.lora_dropout if self.r else 0.0

    def _count(self, site: Any) -> int:
        return int(site.n_out * site.n_in * (1 - self.sparsity))

    def check(self, site: Any) -> None:
        if not self._count(site):
            raise ConfigError(f"sparsity={self.sparsity} leaves no entry of {site.name!r} ({site.n_out} x {site.n_in}) to train. Lower it.")

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        k, on = self._count(site), self.init_weights
        out = {
            "supertuning_values": Leaf((k,), nn.init.zeros_ if on else nn.init.normal_, dtype=torch.float32),
            "supertuning_indices": Leaf((k,), nn.init.zeros_, trainable=False, dtype=torch.int32, saved=self.save_precomputed_indices),
        }
        if self.r:
            out["supertuning_lora_A"] = Leaf((self.r, site.n_in), kaiming_, attr="weight")
            out["supertuning_lora_B"] = Leaf((site.n_out, self.r), nn.init.zeros_ if on else kaiming_, attr="weight")
        return out

    def start(self, site: Any, *, only_frozen: bool = False) -> Mapping[str, Tensor]:
        if only_frozen and self.save_precomputed_indices:
            return {}  # they are in the file
        at = site.weight().abs().flatten().topk(self._count(site), largest=self.select_top).indices
        # in the file the order is free, and products want it rising; without it, values stand in the order in which W gives their places, as in PEFT
        return {"supertuning_indices": at.sort().values if self.save_precomputed_indices else at}

    def change(self, p: Any, site: Any) -> Change:
        sparse = Sparse(p.supertuning_indices, p.supertuning_values * site.scaling, (site.n_out, site.n_in))
        if not self.r:
            return Change(add=sparse)
        scale = (self.lora_alpha or 0.0) / self.r * site.scaling
        return Change(add=Sum([sparse, LowRank(p.supertuning_lora_B, p.supertuning_lora_A, scale, site.dropout)]))
