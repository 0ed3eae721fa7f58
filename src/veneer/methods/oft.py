"""OFT: the weight's inputs rotated block by block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..change import Change
from ..errors import ConfigError
from ..method import Leaf, Targeted
from ..ops import BlockDiag, cayley, skew


@dataclass
class OFTConfig(Targeted, peft_type="OFT"):
    """W' = W R,  R = blockdiag of rotations from skew matrices Q:  Cayley–Neumann I + 2Q + 2Q² + … + Qᵏ, or exactly (I + Q)(I - Q)⁻¹ read the other way round.

    `oft_R` (blocks, b (b - 1) / 2) holds the upper triangles of Q and starts as zeros. An embedding's output is rotated instead of its input. With `coft`
    Q is kept within eps / √blocks. Qiu et al. 2023, arXiv:2306.07280; OFTv2: arXiv:2506.19847.
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
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv"})
    examples: ClassVar[Any] = ({"oft_block_size": 4}, {"oft_block_size": 4, "use_cayley_neumann": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                f"Give either `r` (the number of blocks) or `oft_block_size`, and 0 for the other; got r={self.r}, oft_block_size={self.oft_block_size}."
            )

    def _blocks(self, site: Any) -> tuple[int, int]:
        """(number of blocks, their size): the wished-for one, or the nearest that divides the width."""
        n = site.n_out if site.kind == "embedding" else site.n_in
        wish = self.r or self.oft_block_size
        fit = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wish), d))
        return (fit, n // fit) if self.r else (n // fit, fit)

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        count, b = self._blocks(site)
        shape = (1 if self.block_share else count, b * (b - 1) // 2)
        name = "oft_embedding_R" if site.kind == "embedding" else "oft_R"
        return {name: Leaf(shape, nn.init.zeros_ if self.init_weights else nn.init.normal_, attr="weight")}

    def change(self, p: Any, site: Any) -> Change:
        flat = p.oft_embedding_R if site.kind == "embedding" else p.oft_R
        b = (1 + math.isqrt(1 + 8 * flat.shape[1])) // 2
        count = (site.n_out if site.kind == "embedding" else site.n_in) // b
        q = skew(flat, b)
        if self.coft:
            norm = torch.linalg.matrix_norm(q, keepdim=True)
            q = q * (self.eps / count**0.5 / norm.clamp_min(1e-30)).clamp(max=1.0)
        rotation = cayley(q, self.num_cayley_neumann_terms if self.use_cayley_neumann else None)
        if site.kind == "embedding":
            return Change(left=BlockDiag(rotation, count))  # y R: Rᵀ from the left on columns
        return Change(right=BlockDiag(rotation.mT, count))
