"""What methods do when an optimizer steps: measure how much numbers matter, and keep matrices orthogonal."""

from .importance import Importance, row_means
from .orthogonality import add_gradient
from .ranks import cut, widen

__all__ = ["Importance", "add_gradient", "cut", "row_means", "widen"]
