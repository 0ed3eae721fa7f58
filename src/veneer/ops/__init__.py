"""Structured matrices: what the parts of a change are made of."""

from .base import Geometry, Op, Rows
from .between import Between, gated, per_row, per_token
from .dense import Dense, Sum
from .diag import Diag
from .lowrank import LowRank
from .rotations import BlockDiag, Pairs, Permuted, Product, Reflections, cayley, skew
from .rows import ReplaceRows

__all__ = [
    "Between", "BlockDiag", "Dense", "Diag", "Geometry", "LowRank", "Op", "Pairs",
    "Permuted", "Product", "Reflections", "ReplaceRows", "Rows", "Sum", "cayley", "gated", "per_row", "per_token", "skew",
]  # fmt: skip
