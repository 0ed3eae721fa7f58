"""Structured matrices: what the parts of a change are made of."""

from .base import Geometry, Op, Rows
from .between import Between, per_row
from .dense import Dense, Derived, Sum
from .diag import Diag
from .kron import Kron
from .lowrank import Deflated, LowRank
from .noise import Dropped, Gated
from .rotations import BlockDiag, Pairs, Product, Reflections, Swap, blocks_dropped, cayley, skew
from .rows import ReplaceRows
from .tiled import Tiled

__all__ = [
    "Between", "BlockDiag", "Deflated", "Dense", "Derived", "Diag", "Dropped", "Gated", "Geometry", "Kron", "LowRank", "Op", "Pairs",
    "Product", "Reflections", "ReplaceRows", "Rows", "Sum", "Swap", "Tiled", "blocks_dropped", "cayley", "per_row", "skew",
]  # fmt: skip
