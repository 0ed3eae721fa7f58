"""What a start is: first values of LoRA's factors, from the frozen weight and, for some, from data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Weight = Callable[[], Tensor]


@dataclass(frozen=True)
class Start:
    """First values of A (r, n_in) and B (n_out, r).

    Attributes:
        A0, B0: if given, the change is counted from them: D = s (B A - B0 A0), so the frozen weight stays as it is and the start is the identity.
        base: if given, the weight that the start is defined on (LoftQ's dequantised one), which takes the frozen one's place.
    """

    A: Tensor
    B: Tensor
    A0: Tensor | None = None
    B0: Tensor | None = None
    base: Tensor | None = None


def counted(a: Tensor, b: Tensor) -> Start:
    """A start whose change is counted from itself."""
    return Start(a, b, a.clone(), b.clone())


def split(u: Tensor, s: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A = √(S / s) V, B = U √(S / s): so that s · B A = U S V.   u (n_out, r), s (r,), v (r, n_in)."""
    root = (s / abs(scaling)).sqrt()
    return root.unsqueeze(1) * v, (u * root) * math.copysign(1.0, scaling)


def wide(w: Tensor) -> Tensor:
    """The weight in float32, or float64 if it is that."""
    return w.detach() if w.dtype == torch.float64 else w.detach().to(torch.float32)


def kaiming(*shape: int) -> Tensor:
    """Kaiming-uniform with a = √5, over the last dimension."""
    return nn.init.kaiming_uniform_(torch.empty(*shape), a=math.sqrt(5))
