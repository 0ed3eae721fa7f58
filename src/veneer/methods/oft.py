"""OFT: the weight's inputs rotated block by block."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError, PeftWarning
from ..method import Leaf, Targeted
from ..ops import BlockDiag, blocks_dropped, cayley, skew


@dataclass
class OFTConfig(Targeted, peft_type="OFT"):
    """W' = W R,  R = blockdiag of rotations from skew matrices Q:  Cayley–Neumann I + 2Q + 2Q² + … + Qᵏ, or exactly (I + Q)(I - Q)⁻¹ read the other way round.

    `oft_R` (blocks, or 1 with `block_share`; b (b - 1) / 2) holds the upper triangles of Q and starts as zeros. An embedding's output is rotated instead
    of its input. With `coft` ‖Q‖ of each block is kept within eps / √blocks, after each step too. In training `module_dropout` is the probability of each
    block to be the identity. Qiu et al. 2023, arXiv:2306.07280; OFTv2: arXiv:2506.19847.

    Several active adapters turn the inputs in the order in which PEFT merges them, the first one next to W; PEFT's own forward has the other order.

    A convolution's inputs are channels times kernel, as PEFT merges it (its own forward adds overlapping patches up, and differs).
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    prefix: ClassVar[str] = "oft_"
    in_pieces: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv"})
    examples: ClassVar[Any] = ({"oft_block_size": 4}, {"oft_block_size": 4, "use_cayley_neumann": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                f"Give either `r` (the number of blocks) or `oft_block_size`, and 0 for the other; got r={self.r}, oft_block_size={self.oft_block_size}."
            )

    def _width(self, site: Any) -> int:
        """How many numbers are rotated: a convolution's inputs in all its groups, an embedding's outputs."""
        n: int = site.n_out if site.kind == "embedding" else site.n_in * site.groups
        return n

    def _blocks(self, site: Any) -> tuple[int, int]:
        """(number of blocks, their size): the wished-for one, or the nearest that divides the width."""
        n, wish = self._width(site), self.r or self.oft_block_size
        fit = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wish), d))
        return (fit, n // fit) if self.r else (n // fit, fit)

    def check(self, site: Any) -> None:
        count, b = self._blocks(site)
        if b == 1:
            raise ConfigError(
                f"OFT: blocks of one number cannot be rotated, and for the width {self._width(site)} of {site.name!r} that is the size nearest to what "
                "the config asks for. Leave the layer out, or choose a size that divides the width."
            )
        if site.groups > 1 and site.n_in % b:
            raise ConfigError(f"OFT: blocks of {b} reach over the groups of {site.name!r}, whose outputs see {site.n_in} inputs each.")
        got, wish = (count, self.r) if self.r else (b, self.oft_block_size)
        if got != wish:
            name = "r" if self.r else "oft_block_size"
            text = f"OFT: `{name}`={wish} does not divide the width {self._width(site)} of {site.name!r}, which has {count} blocks of {b} instead."
            warnings.warn(text, PeftWarning, stacklevel=2)

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        count, b = self._blocks(site)
        shape = (1 if self.block_share else count, b * (b - 1) // 2)
        name = "oft_embedding_R" if site.kind == "embedding" else "oft_R"
        return {name: Leaf(shape, nn.init.zeros_ if self.init_weights else _small, attr="weight")}

    def change(self, p: Any, site: Any) -> Change:
        flat = p.oft_embedding_R if site.kind == "embedding" else p.oft_R
        b = (1 + math.isqrt(1 + 8 * flat.shape[1])) // 2
        count = self._width(site) // b
        q = skew(self._held(flat) if self.coft else flat, b)
        rotation = cayley(q, self.num_cayley_neumann_terms if self.use_cayley_neumann else None)
        if site.training and self.module_dropout > 0:
            rotation = blocks_dropped(rotation.expand(count, b, b).unsqueeze(0), self.module_dropout)[0]
        turn = BlockDiag(rotation.mT, count, site.groups)
        return Change(left=turn) if site.kind == "embedding" else Change(right=turn)

    def _held(self, flat: Tensor) -> Tensor:
        """Q, by its triangles, within its ball; the gradient is that of the nearest point."""
        norm = flat.detach().norm(dim=1, keepdim=True) * math.sqrt(2)
        held: Tensor = flat * (self.eps / math.sqrt(len(flat)) / norm.clamp_min(1e-30)).clamp(max=1.0)
        return held

    def acts(self) -> bool:
        return self.coft

    def after_step(self, sites: Sequence[Any], step: int) -> None:
        for t in (site.tensor("oft_embedding_R" if site.kind == "embedding" else "oft_R") for site in sites):
            t.copy_(self._held(t))


def _small(t: Tensor) -> Tensor:
    return nn.init.normal_(t, std=0.1)
