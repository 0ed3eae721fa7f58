"""EETQ layers: 8-bit weights in the order that its kernel reads them."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .base import ByForward, class_names


class Eetq(ByForward):
    """EetqLinear, EETQ's own (`qweight`) or that of transformers (`weight`): (n_in, n_out) int8 with a scale per output."""

    name: ClassVar[str | None] = "eetq"
    unwritable: ClassVar[str] = "only its own kernels, on an accelerator, know the order of the numbers"

    def matches(self, module: nn.Module) -> bool:
        return any(n in ("EetqLinear", "W8A16Linear") for n, _ in class_names(module))

    def shape(self, module: Any) -> tuple[int, int]:
        n_in, n_out = self.packed(module)["weight"].shape
        return int(n_out), int(n_in)

    def packed(self, module: Any) -> dict[str, Tensor]:
        weight = module.weight if hasattr(module, "weight") else module.qweight
        return {"weight": weight.data, "scales": module.weight_scales.data}
