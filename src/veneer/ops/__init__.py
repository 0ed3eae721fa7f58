"""Structured matrices: what the parts of a change are made of."""

from .base import Geometry, Op, Rows
from .between import Between, per_row
from .dense import Dense, Sum
from .diag import Diag
from .lowrank import LowRank
from .rotations import BlockDiag, Pairs, Permuted, Product, Reflections, cayley, skew
from .rows import ReplaceRows
from .sparse import Sparse

__all__ = [
    "Between", "BlockDiag", "Dense", "Diag", "Geometry", "LowRank", "Op", "Pairs",
    "Permuted", "Product", "Reflections", "ReplaceRows", "Rows", "Sparse", "Sum", "cayley", "per_row", "skew",
]  # fmt: skip
