"""PSOFT: a rotation within the span of the weight's principal directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..method import Leaf, Targeted
from ..ops import LowRank, cayley, skew


@dataclass
class PsoftConfig(Targeted, peft_type="PSOFT"):
    """W' = W + (alpha / r) B (diag(b) R diag(a) - I) A,  (alpha / r) B A the best rank-r part of W.   Wu et al. 2025, arXiv:2505.11235.

    A (r, n_in) and B (n_out, r) are made from the frozen W; R (r, r) is the Cayley rotation of a skew matrix whose upper triangle trains, from zero
    (or, with `psoft_orth` False, any matrix, from I), and the scalings a, b (r,) train from one.
    """

    r: int = 32
    psoft_alpha: int = 32
    psoft_dropout: float = 0.0
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None

    prefix: ClassVar[str] = "psoft_"
    positive: ClassVar[Any] = ("r",)
    choices: ClassVar[Any] = {"ab_svd_init": ("psoft_init", "pissa_init"), "psoft_svd": ("full", "lowrank")}
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"r": 4}, {"r": 4, "psoft_orth": False, "ab_svd_init": "pissa_init"})

    def scale(self) -> float:
        return self.psoft_alpha / self.r

    def check(self, site: Any) -> None:
        if self.r > min(site.n_out, site.n_in):
            raise ConfigError(f"r={self.r} is more than the directions that {site.name!r} ({site.n_out} x {site.n_in}) has.")

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        r = self.r
        if self.psoft_orth:
            out = {"weight": Leaf((r * (r - 1) // 2,), nn.init.zeros_ if self.init_weights else _small, container="psoft_R", attr="weight")}
        else:
            out = {"weight": Leaf((r, r), nn.init.eye_ if self.init_weights else _near_one, container="psoft_R", attr="weight")}
        for side, wanted in (("b", self.psoft_mag_b), ("a", self.psoft_mag_a)):
            if wanted:
                out[side] = Leaf((r,), nn.init.ones_, container="psoft_R", attr=f"vector_{side}")
        for name, shape in (("psoft_A", (r, site.n_in)), ("psoft_B", (site.n_out, r))):
            out[name] = Leaf(shape, nn.init.zeros_, trainable=False, saved=False)
        return out

    def start(self, site: Any, *, only_frozen: bool = False) -> Mapping[str, Tensor]:
        w = site.weight()
        w = w.float() if w.dtype in (torch.float16, torch.bfloat16) else w
        if self.psoft_svd == "lowrank":
            with torch.random.fork_rng(devices=[w.device] if w.is_cuda else []):
                torch.manual_seed(self.random_seed)
                u, s, v = torch.svd_lowrank(w, self.r, niter=self.psoft_svd_lowrank_niter)
            v = v.mT
        else:
            u, s, v = torch.linalg.svd(w, full_matrices=False)
        u, s, v = u[:, : self.r], s[: self.r] / site.scaling, v[: self.r]
        if self.ab_svd_init == "psoft_init":
            return {"psoft_A": v, "psoft_B": u * s}
        return {"psoft_A": s.sqrt().unsqueeze(1) * v, "psoft_B": u * s.sqrt()}

    def change(self, p: Any, site: Any) -> Change:
        turn = p.weight
        if self.psoft_orth:
            q = skew(p.weight, self.r)
            if self.use_cayley_neumann and self.cayley_neumann_eps is not None:
                q = q * (self.cayley_neumann_eps / torch.linalg.matrix_norm(q).clamp_min(1e-30)).clamp(max=1.0)
            turn = cayley(q, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(-q, None)
        if self.psoft_mag_b:
            turn = p.b.unsqueeze(1) * turn
        if self.psoft_mag_a:
            turn = turn * p.a
        down = (turn - torch.eye(self.r, dtype=turn.dtype, device=turn.device)) @ p.psoft_A
        return Change(add=LowRank(p.psoft_B, down, site.scaling, site.dropout))


def _small(t: Tensor) -> Tensor:
    return nn.init.normal_(t, std=0.1)


def _near_one(t: Tensor) -> Tensor:
    return _small(t).add_(torch.eye(len(t), dtype=t.dtype, device=t.device))
