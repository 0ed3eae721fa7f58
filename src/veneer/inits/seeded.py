"""Tensors drawn from a seed, as PEFT draws them: on the CPU, one after another from one generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Draw = Callable[[torch.Generator], Tensor]


def seeded(draws: Mapping[str, Draw], seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each tensor the start that fills it. Each draws those before it again, so that nothing is held in memory."""

    def start(name: str) -> Callable[[Tensor], Tensor]:
        def fill(t: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            for other, draw in draws.items():
                value = draw(generator)
                if other == name:
                    return t.copy_(value)
            raise KeyError(name)

        return fill

    return {name: start(name) for name in draws}


def kaiming(shape: tuple[int, ...], a: float = 0.0, dtype: torch.dtype = torch.float32) -> Draw:
    """A Kaiming-uniform draw, in the dtype itself: in 16 bits other numbers come out than rounding gives."""
    return lambda generator: nn.init.kaiming_uniform_(torch.empty(shape, dtype=dtype), a=a, generator=generator)
