"""VeRA: shared random projections, scaled by trained vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..change import Change
from ..errors import ConfigError
from ..inits.seeded import kaiming, seeded
from ..method import Leaf, Targeted
from ..ops import Vectored


@dataclass
class VeraConfig(Targeted, peft_type="VERA"):
    """W' = W + diag(b) B diag(d) A.

    A (r, widest n_in) and B (widest n_out, r) are random, frozen, shared by all layers and cut to each; b starts as zeros, d as `d_initial`.
    Kopiczko et al. 2023, arXiv:2310.11454.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1

    prefix: ClassVar[str] = "vera_"
    positive: ClassVar[Any] = ("r",)
    in_pieces: ClassVar[bool] = True
    stacking: ClassVar[Any] = "sum"
    linear_in: ClassVar[str] = "vera_lambda_b"
    examples: ClassVar[Any] = ({"r": 8},)

    def check(self, site: Any) -> None:
        if self.init_weights and not self.d_initial and not self.inference_mode:
            raise ConfigError(
                "`d_initial`=0 starts VeRA with b and d both zero, so that neither gets a gradient. Give another one, such as 0.1."
            )

    def shared(self, sites: Sequence[Any]) -> Mapping[str, Leaf]:
        shapes = {"vera_A": (self.r, max(s.n_in for s in sites)), "vera_B": (max(s.n_out for s in sites), self.r)}
        starts = seeded({n: kaiming(shape) for n, shape in shapes.items()}, self.projection_prng_key)
        return {n: Leaf(shape, starts[n], trainable=False, saved=self.save_projection) for n, shape in shapes.items()}

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        return {
            "vera_lambda_b": Leaf((site.n_out,), nn.init.zeros_ if self.init_weights else nn.init.ones_),
            "vera_lambda_d": Leaf((self.r,), (lambda t: t.fill_(self.d_initial)) if self.init_weights else nn.init.normal_),
        }

    def change(self, p: Any, site: Any) -> Change:
        return Change(add=Vectored(p.vera_lambda_b, p.vera_B, p.vera_lambda_d, p.vera_A, site.n_in, site.scaling, site.dropout))
