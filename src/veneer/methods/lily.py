"""Lily: layers share their down-projections with neighbours, and all their up-projections, which each mixes by what it reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..change import Change
from ..errors import ConfigError
from ..inits.base import kaiming_
from ..method import Leaf, Targeted
from ..ops import Between


@dataclass
class LilyConfig(Targeted, peft_type="LILY"):
    """y += scaling · h Σ_e p_e B_e,  h = x Aᵀ,  p = softmax(h Rᵀ), averaged over all tokens of all rows.   Zhong & Zhou 2024, arXiv:2407.09946.

    A (r, n_in) is one tensor for `stride_A` neighbouring layers of one entry of `target_modules` and one shape, B (num_B, r, n_out) for all of
    them, R (num_B, r) each layer's own; in the file the shared ones stand under every layer. An entry that is a whole name shares with nobody.
    What a row gets depends on the rows it shares the batch with, padding included: in a mixed batch, on those with this adapter.
    """

    r: int = 32
    stride_A: int = 1  # noqa: N815  PEFT's name
    num_B: int = 2  # noqa: N815  PEFT's name
    scaling: float = 1.0

    prefix: ClassVar[str] = "lily_"
    positive: ClassVar[Any] = ("r", "stride_A")
    stacking: ClassVar[Any] = "sum"
    unmergeable: ClassVar[str] = "how its up-projections mix depends on the input"
    examples: ClassVar[Any] = ({"r": 4, "num_B": 3, "scaling": 4.0},)
    exceptions: ClassVar[Any] = {"mixed_batch_equals_one_by_one": "rows with one adapter share the mixture of their average"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_B < 2:
            raise ConfigError(f"`num_B` must be at least 2 for the router to be trained, got {self.num_B}.")

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        return {
            "lily_A": Leaf((self.r, site.n_in), kaiming_, attr="weight"),
            "lily_B": Leaf((self.num_B * self.r, site.n_out), nn.init.zeros_ if self.init_weights else kaiming_, attr="weight"),
            "lily_router": Leaf((self.num_B, self.r), kaiming_, attr="weight"),
        }

    def common(self, sites: Sequence[Any]) -> Mapping[str, Sequence[Hashable]]:
        groups = [(self._target(s.name), s.n_out, s.n_in) for s in sites]
        seen: Counter[Hashable] = Counter()
        blocks = []
        for group in groups:
            blocks.append((group, seen[group] // self.stride_A))
            seen[group] += 1
        return {"lily_A": blocks, "lily_B": groups}

    def _target(self, name: str) -> str | None:
        """The longest target that hits a layer; a regular expression is one target."""
        if not isinstance(self.target_modules, (set, list, tuple)):
            return self.target_modules
        hit = [t for t in self.target_modules if f".{name}".endswith(f".{t}")]
        return max(hit, key=len, default=None)

    def change(self, p: Any, site: Any) -> Change:
        router, b = p.lily_router, p.lily_B.unflatten(0, (self.num_B, self.r))

        def up(h: Tensor) -> Tensor:  # (n_out, r)
            logits = F.linear(h, router.to(h.dtype))
            chosen = logits.to(torch.promote_types(h.dtype, torch.float32)).softmax(-1).reshape(-1, self.num_B)
            tokens = chosen.shape[0]  # not `len`, which a graph would keep as the number it was
            mixture = chosen.sum(0) / max(tokens, 1)  # no rows: nothing is mixed
            mixed: Tensor = torch.tensordot(mixture.to(b.dtype), b, 1)
            return mixed.T

        return Change(add=Between(up, p.lily_A, scale=site.scaling, why=self.unmergeable))
