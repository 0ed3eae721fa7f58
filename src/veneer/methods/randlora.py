"""RandLoRA: a change of full rank, from random bases that trained vectors scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..inits.seeded import kaiming, seeded
from ..kernels.bases import scaled_bases
from ..method import Leaf, Targeted
from ..ops import LowRank


@dataclass
class RandLoraConfig(Targeted, peft_type="RANDLORA"):
    """W' = W + (alpha / r) Σ_n B_n Λ_n A Γ_n,  n = 1 … N = ⌈min(n_in, n_out) / r⌉.   Albert et al. 2025, arXiv:2502.00987.

    The bases A (r, 1, widest shorter side) and B (widest longer side, widest N, r) are random, frozen, of deviation one, shared by all layers and cut
    to each; `randlora_lambda` (r, N), zero at first, holds the diagonals Λ_n, `randlora_gamma` (N, shorter side) the Γ_n. Where the outputs are the
    shorter side the sum is transposed. With `sparse` the bases' entries are -1, 0 and 1, one in three not zero; with `very_sparse` one in √(widest
    shorter side).

    PEFT writes the bases once for all layers and again under each, and so does this; in memory they are one. It pairs the r N columns of the B_n,
    counted n by n, with the rows of Λ_n A Γ_n counted rank by rank: which random column goes with which row is of no account, but is kept for its
    files. Its dense bases are drawn in bfloat16, or in float16 on machines without; with `save_projection=False` the former are drawn here.
    """

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    randlora_alpha: int = 640

    prefix: ClassVar[str] = "randlora_"
    positive: ClassVar[Any] = ("r",)
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"r": 3, "randlora_alpha": 6}, {"r": 3, "randlora_alpha": 6, "sparse": True, "save_projection": False})

    def scale(self) -> float:
        return self.randlora_alpha / self.r

    def _sides(self, site: Any) -> tuple[int, int, int]:
        """(the shorter side, the longer one, N)."""
        short, long = sorted((site.n_in, site.n_out))
        return short, long, -(-short // self.r)

    def shared(self, sites: Sequence[Any]) -> Mapping[str, Leaf]:
        # the widest layer need not be one layer: all inputs and all outputs are looked at apart
        short, long = sorted((max(s.n_in for s in sites), max(s.n_out for s in sites)))
        shapes = {"randlora_A": (self.r, 1, short), "randlora_B": (long, -(-short // self.r), self.r)}
        draw = _ternary(math.sqrt(short) if self.very_sparse else 3) if self.sparse or self.very_sparse else _dense
        starts = seeded({n: draw(shape) for n, shape in shapes.items()}, self.projection_prng_key)
        return {n: Leaf(s, starts[n], trainable=False, saved=self.save_projection, everywhere=True) for n, s in shapes.items()}

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        short, long, n = self._sides(site)
        gamma = 1 / max(n, short) if self.init_weights else 1 / long
        return {
            "randlora_lambda": Leaf((self.r, n), nn.init.zeros_ if self.init_weights else nn.init.normal_),
            "randlora_gamma": Leaf((n, short), lambda t: t.fill_(gamma)),
        }

    def change(self, p: Any, site: Any) -> Change:
        short, long, n = self._sides(site)
        dtype = p.randlora_lambda.dtype
        frozen = p.randlora_B[:long, :n].flatten(1).to(dtype)  # (longer side, N r)
        scaled = scaled_bases(p.randlora_A[..., :short].to(dtype), p.randlora_lambda, p.randlora_gamma).flatten(0, 1)  # (r N, shorter side)
        up, down = (frozen, scaled) if site.n_in <= site.n_out else (scaled.mT, frozen.mT)
        return Change(add=LowRank(up, down, site.scaling, site.dropout))


def _dense(shape: tuple[int, ...]) -> Any:
    def draw(generator: torch.Generator) -> Tensor:
        n = shape[1]
        parts = [kaiming((shape[0], 1, shape[2]), math.sqrt(5), torch.bfloat16)(generator) for _ in range(n)]
        t = parts[0] if n == 1 else torch.cat(parts, 1)
        return t / t.std()

    return draw


def _ternary(sparsity: float) -> Any:
    """-1 and 1 with probability 1 / (2 · sparsity) each, then divided by their deviation."""

    def ternary(shape: tuple[int, ...]) -> Any:
        def draw(generator: torch.Generator) -> Tensor:
            t, share = torch.rand(shape, generator=generator), 1 / (2 * sparsity)
            t = (t > 1 - share).float() - (t < share).float()
            return t / t.std()

        return draw

    return ternary
