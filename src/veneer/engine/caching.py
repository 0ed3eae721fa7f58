"""Whether what layers compute from their tensors, such as DoRA's norms, is kept from call to call in eval mode. Off unless asked for."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

_enabled = False


def keeping() -> bool:
    """Whether it is kept now."""
    return _enabled


def keep(enabled: bool) -> bool:
    """Switch it on or off, for all models and threads; returns what it was."""
    global _enabled
    before, _enabled = _enabled, enabled
    return before


def stamp(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """What changes when one of the tensors is replaced or written to (not through `.data`, which leaves no trace)."""
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
