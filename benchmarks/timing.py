"""Ratios that survive a noisy machine: the candidates take turns, and each turn is held against the floor's of the same round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """The median of a candidate's time over the floor's, round by round, with the quartiles; `ms`: its own median time."""

    median: float
    low: float
    high: float
    ms: float


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    floor: str,
    rounds: int = 15,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Ratio]:
    """Run all candidates in turn, `rounds` times, in another order every round: what ran just before leaves its traces in caches and in the allocator,
    and with one order, however it is turned, each candidate would always have the same one before it (worth up to 0.08 at a width of 2048).

    Args:
        clock: `time.process_time` on a machine that others use too, with one thread: it leaves out what they take.
    """
    names = list(candidates)
    times: dict[str, list[float]] = {n: [] for n in names}
    orders = random.Random(0)
    for i in range(-warmup, rounds):
        for name in orders.sample(names, len(names)):
            started = clock()
            candidates[name]()
            if i >= 0:
                times[name].append(clock() - started)
    out = {}
    for name in names:
        ratios = sorted(t / f for t, f in zip(times[name], times[floor], strict=True))
        quarter = len(ratios) // 4
        out[name] = Ratio(statistics.median(ratios), ratios[quarter], ratios[-1 - quarter], 1000 * statistics.median(times[name]))
    return out
