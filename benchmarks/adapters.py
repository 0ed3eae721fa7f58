"""Attaching and switching: what many adapters cost."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .models import TARGETS, decoder

Clock = Callable[[], float]


def attaching(library: str, clock: Clock, adapters: int = 60, layers: int = 4) -> dict[str, float]:
    """Milliseconds: the first adapters and the last ones of so many (medians of five), and a switch between two."""
    lib: Any = importlib.import_module(library)
    config = lib.LoraConfig(r=4, target_modules=list(TARGETS))
    model = lib.get_peft_model(decoder(torch.float32, hidden=64, layers=layers), config)
    times = [_timed(clock, lambda i=i: model.add_adapter(f"a{i}", config)) for i in range(adapters)]
    switches = [_timed(clock, lambda i=i: model.set_adapter(f"a{i % adapters}")) for i in range(20)]
    return {"first": statistics.median(times[:5]), "last": statistics.median(times[-5:]), "switch": statistics.median(switches)}


class _Stack(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))


def thousand(library: str, clock: Clock) -> float:
    """Milliseconds for an adapter on 1,000 small linears: what is not initialisation."""
    lib: Any = importlib.import_module(library)
    config = lib.LoraConfig(r=1, target_modules=r"layers\.\d+")
    return statistics.median(_timed(clock, lambda m=m: lib.inject_adapter_in_model(config, m)) for m in [_Stack(1000) for _ in range(3)])


def _timed(clock: Clock, run: Any) -> float:
    started = clock()
    run()
    return 1000 * (clock() - started)
