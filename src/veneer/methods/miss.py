"""MiSS: one small block repeated over the whole weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..inits.base import kaiming_
from ..method import Leaf, Targeted
from ..ops import Derived, Dropped, Op, Tiled


@dataclass
class MissConfig(Targeted, peft_type="MISS"):
    """W' = W + [M M … M]ᵀ,  M (r, n_out) repeated along the inputs, cut where r does not divide n_in: y += (Σ pieces of x of length r) M.

    init_weights="mini": M (r, mini_r) is repeated along the outputs too. init_weights="bat": M (n_out / r, r, r), and W' = W + (W + 1) M block by
    block, W_ac' = W_ac + W_ac M_a + M_a. `miss_block` holds M and starts as zeros.   Kang and Yin 2024, arXiv:2409.15371.

    PEFT lets the first adapter of a layer decide the form of all of them, and ignores `miss_dropout` with "bat"; two "bat" adapters at once add
    their changes of the frozen weight here, where PEFT's second one acts on what the first one gave.
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: Any = True

    prefix: ClassVar[str] = "miss_"
    also_only: ClassVar[Any] = ("MiSS_only",)
    linear_in: ClassVar[str] = "miss_block"
    positive: ClassVar[Any] = ("r", "mini_r")
    choices: ClassVar[Any] = {"init_weights": (True, False, "bat", "mini")}
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"r": 5}, {"r": 4, "init_weights": "bat"}, {"r": 4, "mini_r": 4, "init_weights": "mini"})

    def check(self, site: Any) -> None:
        if self.r > site.n_in:
            raise ConfigError(f"MiSS: `r` ({self.r}) is more than the {site.n_in} inputs of {site.name!r}.")
        if self.init_weights == "bat" and (site.n_in % self.r or site.n_out % self.r):
            raise ConfigError(f"MiSS 'bat': r={self.r} does not divide both sides of {site.name!r} ({site.n_out} x {site.n_in}).")
        if self.init_weights == "mini" and site.n_out % self.mini_r:
            raise ConfigError(f"MiSS 'mini': mini_r={self.mini_r} does not divide the {site.n_out} outputs of {site.name!r}.")

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        r = self.r
        shape: tuple[int, ...] = (r, self.mini_r if self.init_weights == "mini" else site.n_out)
        if self.init_weights == "bat":
            shape = (site.n_out // r, r, r)
        return {"miss_block": Leaf(shape, nn.init.zeros_ if self.init_weights else kaiming_)}

    def change(self, p: Any, site: Any) -> Change:
        block: Tensor = p.miss_block * site.scaling
        add: Op = Tiled(block, site.n_out, site.n_in)
        if self.init_weights == "bat":
            w: Tensor = site.weight()
            add = Derived(lambda m: _bat(w, m), (block,))
        return Change(add=Dropped(add, site.dropout) if site.dropout > 0 else add)


def _bat(w: Tensor, m: Tensor) -> Tensor:
    """(W + 1) M for each block of W, M that of its row of blocks; m (rows of blocks, r, r)."""
    k, r, _ = m.shape
    strips = torch.bmm(w.to(m.dtype).reshape(k, -1, r), m).view(k, r, -1, r) + m.unsqueeze(2)
    return strips.view(w.shape)
