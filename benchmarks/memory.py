"""Peak memory of one call: the profiler tells of every allocation, so nothing but the call is counted."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak(run: Callable[[], object]) -> int:
    """Bytes that the call holds at its highest, over what was there before."""
    run()  # what is made once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
