"""UniLoRA: all entries of all factors are drawn from one trained vector."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..method import Leaf, Targeted
from ..ops import LowRank


def balanced(lora_param_count: int, theta_d_length: int, proj_seed: int) -> Tensor:
    """(lora_param_count,) numbers below `theta_d_length`, all equally frequent, give or take one, shuffled by numpy's generator as PEFT does.

    Raises:
        ImportError: if numpy is not there.
    """
    try:
        import numpy as np
    except ImportError as e:
        raise ImportError(
            "UniLoRA draws its indices with numpy's generator, as PEFT does, and numpy is not installed: pip install numpy. "
            "Adapters saved with save_indices=True load without it."
        ) from e
    generator = np.random.default_rng(proj_seed)
    numbers = np.repeat(np.arange(theta_d_length), lora_param_count // theta_d_length)
    if left := lora_param_count % theta_d_length:
        numbers = np.concatenate([numbers, generator.choice(theta_d_length, size=left, replace=False)])
    generator.shuffle(numbers)
    return torch.from_numpy(numbers).long()


@dataclass
class UniLoraConfig(Targeted, peft_type="UNILORA"):
    """W' = W + B A, every entry of A (r, n_in) and B (n_out, r) some θ_k / √(how many entries are θ_k).   Li et al. 2025, arXiv:2506.00799.

    θ (theta_d_length,) is one vector for the whole model, uniform between -+`init_theta_d_bound` at first: a fresh adapter is not the identity. Which
    entry has which k is a shuffle with the seed `proj_seed` in which all k are equally frequent, give or take one; it follows the order of the
    layers and numpy's generator. With `save_indices` the file holds it (as PEFT writes it, with the scales), and loading needs no numpy.
    """

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    init_theta_d_bound: float = 0.02
    save_indices: bool = False

    prefix: ClassVar[str] = "unilora_"
    positive: ClassVar[Any] = ("r", "theta_d_length", "init_theta_d_bound")
    choices: ClassVar[Any] = {"bias": ("none", "all", "unilora_only")}
    stacking: ClassVar[Any] = "sum"
    starts_as_identity: ClassVar[bool] = False
    tuner_methods: ClassVar[Mapping[str, Any]] = MappingProxyType({"generate_index": staticmethod(balanced)})  # PEFT's name for it
    examples: ClassVar[Any] = ({"r": 3, "theta_d_length": 16}, {"r": 3, "theta_d_length": 500, "save_indices": True})

    def shared(self, sites: Sequence[Any]) -> Mapping[str, Leaf]:
        bound = self.init_theta_d_bound
        return {
            "unilora_theta_d": Leaf(
                (self.theta_d_length,), (lambda t: nn.init.uniform_(t, -bound, bound)) if self.init_weights else nn.init.normal_
            ),
            "unilora_scales": Leaf((self.theta_d_length,), nn.init.ones_, trainable=False, saved=False),
        }

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        shapes = {"unilora_indices_A": (self.r, site.n_in), "unilora_indices_B": (site.n_out, self.r)}
        return {n: Leaf(s, nn.init.zeros_, trainable=False, dtype=torch.int32, saved=self.save_indices) for n, s in shapes.items()}

    def settle(self, here: Sequence[tuple[Any, Any]], loaded: bool) -> None:
        indices = [t for _, p in here for t in (p.unilora_indices_A, p.unilora_indices_B)]
        if not (loaded and self.save_indices):
            drawn = balanced(sum(t.numel() for t in indices), self.theta_d_length, self.proj_seed)
            for t, part in zip(indices, drawn.split([t.numel() for t in indices]), strict=True):
                t.copy_(part.view(t.shape))
        for _, p in here[:1]:
            p.unilora_scales.copy_(self._scales(indices))

    def _scales(self, indices: Sequence[Tensor]) -> Tensor:
        counts = torch.stack([torch.bincount(t.flatten().cpu(), minlength=self.theta_d_length) for t in indices]).sum(0)
        return counts.float().rsqrt().where(counts > 0, 0.0)

    def change(self, p: Any, site: Any) -> Change:
        entries: Tensor = p.unilora_theta_d * p.unilora_scales.to(p.unilora_theta_d.dtype)
        a, b = (entries.index_select(0, i.flatten()).view(i.shape) for i in (p.unilora_indices_A, p.unilora_indices_B))
        return Change(add=LowRank(b, a, site.scaling, site.dropout))

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As PEFT writes it: int64 indices, and the scale of every entry."""
        indices = {k: t.long() for k, t in tensors.items() if _INDICES.search(k)}
        scales = self._scales(list(indices.values())) if indices else None
        return {**tensors, **indices, **({_scales_of(k): scales[t.cpu()] for k, t in indices.items()} if scales is not None else {})}

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        indices = {k: t.int() for k, t in tensors.items() if _INDICES.search(k)}
        known = {_scales_of(k) for k in indices}
        return {**{k: t for k, t in tensors.items() if k not in known}, **indices}


_INDICES = re.compile(r"(?:^|(?<=\.))unilora_indices_(?=[AB]$)")


def _scales_of(key: str) -> str:
    return _INDICES.sub("unilora_scales_", key)
