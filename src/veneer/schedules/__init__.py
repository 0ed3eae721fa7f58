"""What methods do when an optimizer steps: measure how much numbers matter, share out ranks, and keep matrices orthogonal."""

from .allocating import Allocating
from .importance import Importance, by_rank
from .orthogonality import add_gradient
from .ranks import cut, widen

__all__ = ["Allocating", "Importance", "add_gradient", "by_rank", "cut", "widen"]
