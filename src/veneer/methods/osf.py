"""OSF: the small singular directions of the weight train, the large ones and the space they span stay."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError, PeftWarning
from ..method import Leaf, Targeted
from ..ops import LowRank


@dataclass
class OSFConfig(Targeted, peft_type="OSF"):
    """W' = U_h U_hᵀ W + U diag(S) V,  U_h (n_out, k) the first k left singular vectors of W.   Nayak et al. 2025, arXiv:2504.07097.

    U (n_out, d - k), S (d - k) and V (d - k, n_in), d = min(n_out, n_in), start as the rest of the decomposition and train; before each step
    the gradients of U and V lose what points into the frozen directions. k is `effective_rank`, a number or a share of d, half if not given. A key of
    `rank_pattern` is a regular expression that is searched for in the name, wherever it stands, as PEFT does for this method.
    """

    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None
    target_svd_config: dict[str, int] | None = None  # PEFT's files have it, and PEFT does not act on it

    prefix: ClassVar[str] = "osf_"
    patterns: ClassVar[Any] = {"effective_rank": "rank_pattern"}
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"effective_rank": 3},)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_svd_config:
            warnings.warn("`target_svd_config` has no effect: give `effective_rank` and `rank_pattern`.", PeftWarning, stacklevel=4)
        for value in (self.effective_rank, *(self.rank_pattern or {}).values()):
            if value is not None and value <= 0:
                raise ConfigError(f"`effective_rank` should be a positive integer, or a share of the weight's smaller side; got {value}.")

    @staticmethod
    def fits(key: str, name: str) -> bool:
        return re.search(key, name) is not None

    def _split(self, site: Any) -> tuple[int, int]:
        """(k, d - k)."""
        d, k = min(site.n_out, site.n_in), self.effective_rank
        fixed = d // 2 if k is None else int(d * k) if isinstance(k, float) and k <= 1 else int(k)
        fixed = min(max(fixed, 1), d)
        return fixed, d - fixed

    def check(self, site: Any) -> None:
        kept, rest = self._split(site)
        if not rest and not self.inference_mode:
            raise ConfigError(
                f"`effective_rank` keeps all {kept} directions of {site.name!r} ({site.n_out} x {site.n_in}) as they are: nothing of it trains. Lower it there "
                "(rank_pattern), or leave the layer out of target_modules."
            )

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        k, rest = self._split(site)
        shapes = {"U_low": (site.n_out, rest), "S_low": (rest,), "V_low": (rest, site.n_in)}
        frozen = {"osf_U_high": (site.n_out, k), "osf_V_high": (k, site.n_in)}
        return {
            **{n: Leaf(s, nn.init.normal_, container="osf_svd_params", attr=n) for n, s in shapes.items()},
            **{n: Leaf(s, nn.init.zeros_, trainable=False, saved=False) for n, s in frozen.items()},
        }

    def start(self, site: Any, *, only_frozen: bool = False) -> Mapping[str, Tensor]:
        w = site.weight()
        u, s, v = torch.linalg.svd(w.float() if w.dtype in (torch.float16, torch.bfloat16) else w, full_matrices=False)
        k = self._split(site)[0]
        frozen = {"osf_U_high": u[:, :k], "osf_V_high": v[:k]}
        return frozen if only_frozen or self.init_weights is False else {**frozen, "U_low": u[:, k:], "S_low": s[k:], "V_low": v[k:]}

    def change(self, p: Any, site: Any) -> Change:
        return Change(left=LowRank(p.osf_U_high, p.osf_U_high.mT), add=LowRank(p.U_low * p.S_low, p.V_low))

    def before_step(self, sites: Sequence[Any], step: int) -> None:
        for site in sites:
            u, v, high_u, high_v = (site.layer.leaf(site.adapter, n) for n in ("U_low", "V_low", "osf_U_high", "osf_V_high"))
            if u.grad is not None:
                u.grad -= high_u @ (high_u.mT @ u.grad)
            if v.grad is not None:
                v.grad -= (v.grad @ high_v.mT) @ high_v
