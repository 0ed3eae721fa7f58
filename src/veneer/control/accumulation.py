"""Gradient accumulation for hand-written loops, exact for batches of different sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError


class Accumulation:
    """Adds up the gradients of several batches, and steps once for all: the gradient is that of the mean over all their items.

    With `weight` the number of items (rows, or labels that count) behind a mean loss, batches of different sizes give the very gradient of one large
    batch; with weight 1 each batch counts the same. Hooks of the optimizer see the finished gradient.

    Args:
        optimizer: any.
        batches: how many make a step.
        schedulers: stepped after each step of the optimizer.

    Attributes:
        steps: how many steps were made.

    Raises:
        ConfigError: if `batches` is not positive.
    """

    def __init__(self, optimizer: Optimizer, batches: int, schedulers: Sequence[Any] = ()) -> None:
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            raise ConfigError(f"Accumulation takes 1 batch a step or more, got {batches!r}.")
        self.optimizer, self.batches, self.schedulers = optimizer, batches, list(schedulers)
        self.steps = self.pending = 0
        self._weight = 0.0

    def backward(self, loss: Tensor, weight: float = 1.0) -> bool:
        """Run the backward of a batch's mean loss, and step if it was the last batch of a step; returns whether it was.

        Raises:
            ConfigError: if the weight is negative.
        """
        if weight < 0:
            raise ConfigError(f"A batch counts with a weight of 0 or more, got {weight}.")
        if self.pending == 0:
            self.optimizer.zero_grad()
        (loss * weight).backward()
        self._weight += float(weight)
        self.pending += 1
        return self.pending == self.batches and self.finish()

    @torch.no_grad()
    def finish(self) -> bool:
        """Step with what has been added up, as at the end of the data; returns whether there was anything."""
        if self.pending == 0:
            return False
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if grads and self._weight not in (0.0, 1.0):
            torch._foreach_div_(grads, self._weight)
        counted = self._weight > 0
        self.pending, self._weight = 0, 0.0
        if counted:
            with torch.enable_grad():
                self.optimizer.step()
            for s in self.schedulers:
                s.step()
            self.steps += 1
        self.optimizer.zero_grad()
        return counted
