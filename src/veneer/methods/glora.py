"""GLoRA: weight and bias both scaled and shifted, along several paths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..method import Leaf, Targeted
from ..ops import Dense, Diag, LowRank, Op

KINDS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("constant", "none", "vector"),
}


@dataclass
class GloraConfig(Targeted, peft_type="GLORA"):
    """W' = W + W ⊙ A + B,  b' = b + b ⊙ D + E + W C.   Chavan et al. 2023, arXiv:2306.07967.

    A and B (n_out, n_in) are low-rank, one number per output, one number, or absent; C (n_in, 1) low-rank, a vector, or absent; D and E (n_out,)
    a vector, one number, or absent. All start as zero.
    """

    r: int = 8
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"  # noqa: N815  PEFT's names
    config_C: Literal["lora", "vector", "none"] = "lora"  # noqa: N815
    config_D_E: Literal["vector", "constant", "none"] = "constant"  # noqa: N815

    prefix: ClassVar[str] = "glora_"
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = (
        {"r": 3},
        {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kinds in KINDS.items():
            if getattr(self, name) not in kinds:
                raise ConfigError(f"`{name}` is one of {', '.join(kinds)}, got {getattr(self, name)!r}.")

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        o, i = site.n_out, site.n_in
        start = nn.init.zeros_ if self.init_weights else _small
        out: dict[str, Leaf] = {}
        for path, kind, rows, columns in (("A", self.config_A_B, o, i), ("B", self.config_A_B, o, i), ("C", self.config_C, i, 1)):
            box = f"glora_{path}"
            if kind == "lora":
                out[f"{path}d"] = Leaf((rows, self.r), nn.init.zeros_ if self.init_weights else _kaiming, container=box, attr="Xd")
                out[f"{path}u"] = Leaf((self.r, columns), _kaiming, container=box, attr="Xu")
            elif kind == "none":
                out[path] = Leaf((rows, columns), nn.init.zeros_, container=box, attr="zeros", trainable=False)
            else:
                out[path] = Leaf((1,) if kind == "constant" else (rows, 1), start, container=box, attr="X")
        for path in "DE":
            if self.config_D_E == "none":
                out[path] = Leaf((o,), nn.init.zeros_, container=f"glora_{path}", attr="zeros", trainable=False)
            else:
                trains = path == "E" or site.bias() is not None  # D scales the bias
                out[path] = Leaf(
                    (1,) if self.config_D_E == "constant" else (o,), start, container=f"glora_{path}", attr="X", trainable=trains
                )
        return out

    def change(self, p: Any, site: Any) -> Change:
        left: Op | None = None
        add: Op | None = None
        base: Tensor | None = None
        if self.config_A_B == "lora":
            w = site.weight()
            base = w * (1 + p.Ad @ p.Au).to(w.dtype)
            add = LowRank(p.Bd, p.Bu)
        elif self.config_A_B != "none":
            left = Diag(1 + p.A.flatten().expand(site.n_out))
            add = Dense(p.B.expand(site.n_out, site.n_in))
        shift: Tensor | None = None
        if self.config_D_E != "none":
            b = site.bias()
            shift = p.E.expand(site.n_out) if b is None else p.E + b * p.D
        if self.config_C != "none":
            w = site.weight()
            through = w @ (p.C if self.config_C == "vector" else p.Cd @ p.Cu).to(w.dtype)
            shift = through.squeeze(-1) if shift is None else shift + through.squeeze(-1)
        return Change(left=left, add=add, base=base, shift=shift)


def _kaiming(t: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(t, a=math.sqrt(5))


def _small(t: Tensor) -> Tensor:
    return nn.init.normal_(t, std=0.02)
