"""The classifier of X-LoRA: a small MLP, given by its sizes, whose tensors somebody else keeps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..method import Leaf


@dataclass(frozen=True)
class Classifier:
    """`depth` linear layers, of width `size` between them, each but the last followed by ReLU and dropout.

    Args:
        name: what its tensors are called: `<name>.layers.<k>.weight` and `.bias`, k counting ReLUs and dropouts too.
        kept: where in memory they are.
    """

    n_in: int
    size: int
    n_out: int
    depth: int
    dropout: float
    name: str
    kept: str

    @property
    def layers(self) -> Mapping[int, tuple[int, int]]:
        """(inputs, outputs) of the linear layers by k."""
        widths = [self.n_in, *[self.size] * (self.depth - 1), self.n_out]
        step = 3 if self.dropout > 0 else 2
        return {i * step: (widths[i], widths[i + 1]) for i in range(self.depth)}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors, by their names."""
        return {
            f"{self.name}.layers.{k}.{n}": (b, a) if n == "weight" else (b,)
            for k, (a, b) in self.layers.items()
            for n in ("weight", "bias")
        }

    def leaves(self) -> Mapping[str, Leaf]:
        """The tensors, started as torch starts linear layers."""
        inputs = [a for a, _ in self.layers.values() for _ in ("weight", "bias")]
        starts = [functools.partial(nn.init.uniform_, a=-(a**-0.5), b=a**-0.5) for a in inputs]
        return {n: Leaf(shape, start, self.kept, n, n) for (n, shape), start in zip(self.shapes().items(), starts, strict=True)}

    def __call__(self, tensor: Callable[[str], Tensor], x: Tensor, seeds: Tensor | None) -> Tensor:
        """The output (rows, ..., n_out) for x (rows, ..., n_in), in the dtype of x.

        Args:
            tensor: gives a tensor by its name.
            seeds: (rows,), of each row's dropout, so that it can be drawn again; None for no dropout.
        """
        for i, k in enumerate(self.layers):
            weight, bias = (tensor(f"{self.name}.layers.{k}.{n}").to(x.dtype) for n in ("weight", "bias"))
            if i:
                x = torch.relu(x)
                x = x if seeds is None or self.dropout == 0 else x * self._kept(x, seeds, i)
            x = F.linear(x, weight, bias)
        return x

    def _kept(self, x: Tensor, seeds: Tensor, layer: int) -> Tensor:
        draws = [
            torch.rand(x.shape[1:], device=x.device, generator=torch.Generator(x.device).manual_seed(s + layer)) for s in seeds.tolist()
        ]
        return (torch.stack(draws) >= self.dropout).to(x.dtype) / (1 - self.dropout)
