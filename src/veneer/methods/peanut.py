"""PEANuT: the change is a small network's image of the weight itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..change import Change
from ..errors import ConfigError, hint
from ..inits.base import kaiming_
from ..method import Leaf, Targeted
from ..ops import LowRank

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "swish": F.silu, "mish": F.mish, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu, "relu6": F.relu6, "hardswish": F.hardswish, "linear": lambda t: t,
}  # fmt: skip


@dataclass
class PeanutConfig(Targeted, peft_type="PEANUT"):
    """W' = W + scaling · B net(A W),  A (r, n_out), B (n_out, r), zero at the start.   Zhong et al. 2024, arXiv:2410.01870.

    The net acts on columns (r,): h₀ = f(A W), encoders hₖ = f(Eₖ hₖ₋₁), decoders g ← f(Dₖ g) + h_(depth - k), all r x r; f is `act_fn`, one of
    those here or any other of transformers' names.
    """

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0

    prefix: ClassVar[str] = "peanut_"
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"r": 4, "depth": 2, "act_fn": "tanh"},)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 0:
            raise ConfigError(f"`depth` is the number of encoders, and of decoders: 0 or more, got {self.depth}.")
        if self.act_fn not in ACTIVATIONS:
            ACTIVATIONS[self.act_fn] = _of_transformers(self.act_fn)

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        out = {
            "peanut_A": Leaf((self.r, site.n_out), kaiming_, attr="weight"),
            "peanut_B": Leaf((site.n_out, self.r), nn.init.zeros_ if self.init_weights else kaiming_, attr="weight"),
        }
        for part in ("encoders", "decoders"):
            for k in range(self.depth):
                out[f"{part}_{k}"] = Leaf((self.r, self.r), kaiming_, container=f"peanut_{part}", attr=f"{k}.weight")
        return out

    def change(self, p: Any, site: Any) -> Change:
        f = ACTIVATIONS[self.act_fn]
        h = [f(p.peanut_A @ site.weight().to(p.peanut_A.dtype))]
        for k in range(self.depth):
            h.append(f(getattr(p, f"encoders_{k}") @ h[-1]))
        g = h[-1]
        for k in range(self.depth):
            g = f(getattr(p, f"decoders_{k}") @ g) + h[self.depth - 1 - k]
        return Change(add=LowRank(p.peanut_B, g, site.scaling))


def _of_transformers(name: str) -> Activation:
    try:
        from transformers.activations import ACT2FN
    except ImportError:
        raise ConfigError(f"Unknown `act_fn` {name!r}. Without transformers there are {', '.join(ACTIVATIONS)}.") from None
    if name not in ACT2FN or list((made := ACT2FN[name]).parameters()):
        raise ConfigError(f"Unsupported `act_fn` {name!r}.{hint(str(name), ACT2FN)} Activations that train something are none.")
    found: Activation = made
    return found
