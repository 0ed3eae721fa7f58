"""GLoRA: weight and bias both scaled and shifted, along several paths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..inits.base import kaiming_
from ..method import Init, Leaf, Targeted
from ..ops import Derived, Diag, LowRank, Op

KINDS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("constant", "none", "vector"),
}


@dataclass
class GloraConfig(Targeted, peft_type="GLORA"):
    """W' = W + W ⊙ A + B,  b' = b + b ⊙ D + E + W C.   Chavan et al. 2023, arXiv:2306.07967.

    A and B (n_out, n_in) are low-rank, one number per output, one number, or absent; C (n_in, 1) low-rank, a vector, or absent; D and E (n_out,)
    a vector, one number, or absent. All start as zero. On a layer without a bias C, D and E are absent.
    """

    r: int = 8
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"  # noqa: N815  PEFT's names
    config_C: Literal["lora", "vector", "none"] = "lora"  # noqa: N815
    config_D_E: Literal["vector", "constant", "none"] = "constant"  # noqa: N815

    prefix: ClassVar[str] = "glora_"
    positive: ClassVar[Any] = ("r",)
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

    def _kinds(self, site: Any) -> tuple[str, str, str]:
        """The kinds of A and B, of C, of D and E."""
        biased = site.bias() is not None
        return self.config_A_B, self.config_C if biased else "none", self.config_D_E if biased else "none"

    def check(self, site: Any) -> None:
        if set(self._kinds(site)) == {"none"} and not self.inference_mode:
            raise ConfigError(
                f"GLoRA: with these paths nothing of {site.name!r} would train (it has {'a' if site.bias() is not None else 'no'} bias). Give it another "
                "`config_A_B`, or leave the layer out of target_modules."
            )

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        o, i = site.n_out, site.n_in
        start: dict[str, Init] = (
            {"constant": _small, "vector": _vector} if not self.init_weights else dict.fromkeys(KINDS["config_D_E"], nn.init.zeros_)
        )
        out: dict[str, Leaf] = {}
        of_w, of_c, of_b = self._kinds(site)
        for path, kind, rows, columns in (("A", of_w, o, i), ("B", of_w, o, i), ("C", of_c, i, 1)):
            box = f"glora_{path}"
            if kind == "lora":
                out[f"{path}d"] = Leaf((rows, self.r), nn.init.zeros_ if self.init_weights else kaiming_, container=box, attr="Xd")
                out[f"{path}u"] = Leaf((self.r, columns), kaiming_, container=box, attr="Xu")
            elif kind == "none":
                out[path] = Leaf((rows, columns), nn.init.zeros_, container=box, attr="zeros", trainable=False)
            else:
                out[path] = Leaf((1,) if kind == "constant" else (rows, 1), start[kind], container=box, attr="X")
        for path in "DE":
            shape, init = ((1,) if of_b == "constant" else (o,)), start.get(of_b, nn.init.zeros_)
            out[path] = Leaf(shape, init, container=f"glora_{path}", attr="zeros" if of_b == "none" else "X", trainable=of_b != "none")
        return out

    def change(self, p: Any, site: Any) -> Change:
        of_w, of_c, of_b = self._kinds(site)
        left: Op | None = None
        add: Op | None = None
        if of_w == "lora":
            w: Tensor = site.weight()
            add = Derived(lambda ad, au, bd, bu: (ad @ au).mul(w).add(bd @ bu), (p.Ad, p.Au, p.Bd, p.Bu))
        elif of_w != "none":
            left = Diag(1 + p.A.flatten().expand(site.n_out))
            add = LowRank(p.B.expand(site.n_out, 1), p.B.new_ones(1, site.n_in))
        shift: Tensor | None = None
        if of_b != "none":
            shift = p.E + site.bias() * p.D
        if of_c != "none":
            w = site.weight()
            through = w @ (p.C if of_c == "vector" else p.Cd @ p.Cu).to(w.dtype)
            shift = through.squeeze(-1) if shift is None else shift + through.squeeze(-1)
        return Change(left=left, add=add, shift=shift)


def _small(t: Tensor) -> Tensor:
    return nn.init.normal_(t, std=0.02)


def _vector(t: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(t.unsqueeze(0) if t.ndim == 1 else t, a=math.sqrt(5))
