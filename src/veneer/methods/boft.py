"""BOFT: the weight's inputs rotated by a butterfly of block-diagonal rotations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..method import Leaf, Targeted
from ..ops import BlockDiag, Diag, Op, Product, Shuffle, blocks_dropped, cayley


@dataclass
class BOFTConfig(Targeted, peft_type="BOFT"):
    """W' = diag(s) W B₁ᵀ … B_mᵀ,  Bₖ = Pₖ blockdiag(Qₖ) Pₖᵀ,  Q = (I - S)(I + S)⁻¹, S = (R - Rᵀ) / 2.   Liu et al. 2023, arXiv:2311.06243.

    `boft_R` (m, blocks, b, b) starts as zeros, `boft_s` (n_out) as ones; the bias stays as it is. m is `boft_n_butterfly_factor`. P₁ is the identity;
    Pₖ deals out each run of 2ᵏ⁻¹ b coordinates, cut into pieces of b / 2: the even pieces, then the odd ones. In training `boft_dropout` is the
    probability of each block of one factor, drawn for every call, to be the identity.

    PEFT without its CUDA extension makes and runs one factor, whatever the config says; such a file is read as what it is: the others start as
    the identity.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0

    prefix: ClassVar[str] = "boft_"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    examples: ClassVar[Any] = ({"boft_block_size": 4}, {"boft_block_size": 2, "boft_n_butterfly_factor": 2})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ConfigError(
                "Give either `boft_block_size` or `boft_block_num`, and 0 for the other, since their product is the number of inputs; "
                f"got {self.boft_block_size} and {self.boft_block_num}."
            )
        if self.boft_n_butterfly_factor < 1:
            raise ConfigError(f"`boft_n_butterfly_factor` is the number of factors, 1 or more, got {self.boft_n_butterfly_factor}.")

    def check(self, site: Any) -> None:
        given, m = self.boft_block_size or self.boft_block_num, self.boft_n_butterfly_factor
        if site.groups > 1:
            raise ConfigError(f"BOFT does not take convolutions with groups ({site.name!r} has {site.groups}).")
        if site.n_in % given:
            name = "boft_block_size" if self.boft_block_size else "boft_block_num"
            raise ConfigError(f"BOFT: `{name}`={given} does not divide the {site.n_in} inputs of {site.name!r}.")
        count, b = self._blocks(site)
        if m > 1 and (b % 2 or count % 2 ** (m - 1)):
            raise ConfigError(
                f"BOFT: {count} blocks of {b} in {site.name!r} make no butterfly of {m} factors: the size of a block must be even, and their number "
                f"a multiple of {2 ** (m - 1)}. Lower `boft_n_butterfly_factor` or change the size."
            )

    def _blocks(self, site: Any) -> tuple[int, int]:
        """(number of blocks, their size)."""
        count = self.boft_block_num or site.n_in // self.boft_block_size
        return count, site.n_in // count

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        count, b = self._blocks(site)
        turn, scale = (nn.init.zeros_, nn.init.ones_) if self.init_weights else (_near(0.0), _near(1.0))
        return {
            "boft_R": Leaf((self.boft_n_butterfly_factor, count, b, b), turn),
            "boft_s": Leaf((1, site.n_out) if site.kind == "conv" else (site.n_out, 1), scale),
        }

    def change(self, p: Any, site: Any) -> Change:
        r: Tensor = p.boft_R
        q = cayley((r - r.mT) / 2, None)
        if site.training and self.boft_dropout > 0:
            q = blocks_dropped(q, self.boft_dropout)
        factors: list[Op] = []
        for k, blocks in enumerate(q.mT):  # Bₖᵀ, the first one next to W
            turn, half = BlockDiag(blocks), r.shape[-1] // 2
            sides = [Shuffle(a, b, half, site.n_in, blocks) for a, b in ((2**k, 2), (2, 2**k))] if k else []
            factors += [sides[0], turn, sides[1]] if k else [turn]
        return Change(left=Diag(p.boft_s.flatten()), right=Product(factors))

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        m = self.boft_n_butterfly_factor
        short = {k: t for k, t in tensors.items() if k.endswith("boft_R") and len(t) == 1 < m}
        return {**tensors, **{k: t.new_zeros(m, *t.shape[1:]).index_copy(0, t.new_zeros(1).long(), t) for k, t in short.items()}}


def _near(mean: float) -> Any:
    return lambda t: nn.init.normal_(t, mean, 0.1)
