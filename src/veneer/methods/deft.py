"""DEFT: a small space of the outputs is taken out of the weight and filled anew."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError, PeftWarning
from ..method import Leaf, Targeted
from ..ops import Deflated, LowRank


@dataclass
class DeftConfig(Targeted, peft_type="DEFT"):
    """W' = (I - Q Vᵀ) W + s Q R,  s = alpha / r, or 1 without alpha.   Decompositional efficient fine-tuning, NeurIPS 2025.

    From `deft_P` (n_out, r), normal(0, 0.02) at the start, are made Q = P, V = relu(P), or with decomposition_method="qr" Q = V, its orthonormal
    columns. `deft_R` (r, n_in) starts as Vᵀ W / s, where nothing is changed, and with init_weights=False as normal(0, 0.02 · init_scale). With
    `para` there is no R: the space is only taken out (PaRa). r is at most n_out. `deft_dropout` is of the inputs of R.
    """

    r: int = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    deft_dropout: float = 0.0

    prefix: ClassVar[str] = "deft_"
    positive: ClassVar[Any] = ("r",)
    choices: ClassVar[Any] = {"decomposition_method": ("relu", "qr")}
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = (
        {"r": 3},
        {"r": 3, "decomposition_method": "qr", "alpha": 6},
        {"r": 3, "decomposition_method": "qr", "para": True},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        idle = ["init_scale"] * (self.init_scale != 1 and (self.para or bool(self.init_weights)))
        idle += [n for n in ("alpha", "deft_dropout") if self.para and getattr(self, n)]
        if idle:
            why = "`para` leaves out R" if self.para else "R starts from the weight unless init_weights=False"
            warnings.warn(f"{', '.join(f'`{n}`' for n in idle)} has no effect: {why}.", PeftWarning, stacklevel=4)

    @property
    def starts_as_identity(self) -> bool:
        return not self.para

    def check(self, site: Any) -> None:
        if site.groups > 1:
            raise ConfigError(f"DEFT does not take convolutions with groups ({site.name!r} has {site.groups}).")

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        r = min(self.r, site.n_out)
        out = {"deft_P": Leaf((site.n_out, r), _normal(0.02))}
        return out if self.para else {**out, "deft_R": Leaf((r, site.n_in), _normal(0.02 * self.init_scale))}

    def start(self, site: Any, *, only_frozen: bool = False) -> Mapping[str, Tensor]:
        if only_frozen or self.para or not self.init_weights:
            return {}
        w = site.weight().float()
        p = torch.empty(site.n_out, min(self.r, site.n_out), device=w.device).normal_(std=0.02)
        return {"deft_P": p, "deft_R": self._sides(p)[1] @ w / self._strength(site)}

    def _sides(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, Vᵀ)."""
        if self.decomposition_method == "relu":
            return p, torch.relu(p).mT
        q: Tensor = torch.linalg.qr(p.float() if p.dtype in (torch.float16, torch.bfloat16) else p).Q.to(p.dtype)
        return q, q.mT

    def _strength(self, site: Any) -> float:
        s: float = site.scaling
        return s * self.alpha / min(self.r, site.n_out) if self.alpha else s

    def change(self, p: Any, site: Any) -> Change:
        q, v = self._sides(p.deft_P)
        add = None if self.para else LowRank(q, p.deft_R, self._strength(site), site.dropout)
        return Change(left=Deflated(q, v), add=add)


def _normal(std: float) -> Any:
    return lambda t: nn.init.normal_(t, std=std)
