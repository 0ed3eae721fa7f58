"""Structured matrices: what the parts of a change are made of."""

from .base import Geometry, Op, Rows, mixed_onto
from .between import Between, Inside, gated, per_row, per_token
from .dense import Dense, Derived, Sum
from .diag import Diag
from .kron import Kron
from .lowrank import Deflated, LowRank, Vectored
from .noise import Dropped, Switched, rank_dropped
from .rotations import BlockDiag, Pairs, Product, Reflections, Shuffle, blocks_dropped, cayley, skew
from .rows import ReplaceRows
from .sparse import Sparse
from .tiled import Tiled

__all__ = [
    "Between", "BlockDiag", "Deflated", "Dense", "Derived", "Diag", "Dropped", "Geometry", "Inside", "Kron", "LowRank", "Op", "Pairs",
    "Product", "Reflections", "ReplaceRows", "Rows", "Shuffle", "Sparse", "Sum", "Switched", "Tiled", "Vectored", "blocks_dropped",
    "cayley", "gated", "mixed_onto", "per_row", "per_token", "rank_dropped", "skew",
]  # fmt: skip
