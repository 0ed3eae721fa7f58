"""What a step really takes, from the allocator itself: the measure that plans are held to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def allocated_peak(step: Callable[[], object]) -> int:
    """The most bytes that the CPU's allocator held at a time beyond what it held before, while `step` ran; by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    now = peak = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    return peak


def state_bytes(optimizer: object) -> int:
    """Bytes of all tensors in an optimizer's state."""
    state = optimizer.state  # type: ignore[attr-defined]
    return sum(v.nbytes for s in state.values() for v in s.values() if isinstance(v, Tensor))
