"""TinyLoRA: the weight's own principal directions, mixed by a handful of trained numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..change import Change
from ..errors import ConfigError
from ..inits.base import singular, wide
from ..inits.seeded import seeded
from ..method import Leaf, Targeted
from ..ops import Between, LowRank


@dataclass
class TinyLoraConfig(Targeted, peft_type="TINYLORA"):
    """W' = W + B R A,  R = Σ_k v_k P_k,  W ≈ U S V the best part of rank r,  A = √S V, B = U √S.   arXiv:2602.04118.

    A (r, n_in) and B (n_out, r) are made from W, P (u, r, r) is normal with variance 1 / r from the seed `projection_seed` + the number of the layer;
    all three are frozen. v (u,) trains, and neighbouring layers share one: `weight_tying` 0 gives every layer its own, 1 gives all of them one. v starts
    as zeros; with `init_weights="uniform"` between -+`init_v_bound`. A table of embeddings is taken as it is stored: W (rows, width) there, and dropout
    acts on what is looked up in B.
    """

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0

    prefix: ClassVar[str] = "tinylora_"
    positive: ClassVar[Any] = ("r", "u")
    choices: ClassVar[Any] = {"init_weights": (True, False, "uniform")}
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})
    stacking: ClassVar[Any] = "sum"
    dry: ClassVar[frozenset[str]] = frozenset()
    examples: ClassVar[Any] = ({"u": 6}, {"u": 6, "save_projection": False, "tinylora_dropout": 0.2})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight_tying <= 1:
            raise ConfigError(f"`weight_tying` should lie between 0 (no layers share) and 1 (all do), got {self.weight_tying}.")

    @property
    def starts_as_identity(self) -> bool:
        return self.init_weights is True

    def shared(self, sites: Sequence[Any]) -> Mapping[str, Leaf]:
        groups = max(1, round(len(sites) * (1 - self.weight_tying)))
        size = max(1, len(sites) // groups)
        users = [[s for s in sites if min(s.index // size, groups - 1) == g] for g in range(groups)]
        return {
            f"v{g}": Leaf((self.u,), self._first, container="tinylora_v", attr=str(g), users=group)
            for g, group in enumerate(users)
            if group
        }

    def _first(self, v: Tensor) -> Tensor:
        return nn.init.zeros_(v) if self.init_weights is True else nn.init.uniform_(v, -self.init_v_bound, self.init_v_bound)

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        r, table = min(self.r, site.n_out, site.n_in), site.kind == "embedding"
        rows, columns = (site.n_in, site.n_out) if table else (site.n_out, site.n_in)  # of W as A and B have it

        def projection(generator: torch.Generator) -> Tensor:
            return torch.normal(0.0, 1 / math.sqrt(r), (self.u, r, r), generator=generator)

        def draw(p: Tensor) -> Tensor:
            return seeded({"P": projection}, self.projection_seed + site.index)["P"](p)

        return {
            "tinylora_A": Leaf((r, columns), nn.init.zeros_, trainable=False),
            "tinylora_B": Leaf((rows, r), nn.init.zeros_, trainable=False),
            "tinylora_P": Leaf((self.u, r, r), draw, trainable=False, saved=self.save_projection),
        }

    def start(self, site: Any, *, only_frozen: bool = False) -> Mapping[str, Tensor]:
        if only_frozen:
            return {}  # they are in the file
        w = wide(site.weight())
        u, s, v = singular(w.mT if site.kind == "embedding" else w, min(self.r, *w.shape))
        return {"tinylora_A": s.sqrt().unsqueeze(1) * v, "tinylora_B": u * s.sqrt()}

    def change(self, p: Any, site: Any) -> Change:
        v: Tensor = p.tinylora_v
        mix = torch.tensordot(v, p.tinylora_P.to(v.dtype), 1)
        a, b = p.tinylora_A.to(v.dtype), p.tinylora_B.to(v.dtype)
        if site.kind != "embedding":
            return Change(add=LowRank(b, mix @ a, site.scaling, site.dropout))
        rate, add = site.dropout, LowRank((mix @ a).mT, b.mT, site.scaling)
        if rate:  # the table's rows are token numbers: what can be dropped is what they look up
            return Change(add=Between(add.up, add.down, lambda h, x: F.dropout(h, rate), site.scaling, whole=add))
        return Change(add=add)
