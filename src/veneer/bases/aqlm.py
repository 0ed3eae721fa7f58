"""AQLM layers: sums of entries of codebooks. Egiazarian et al. 2024, arXiv:2401.06118."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import ByForward, class_names


class Aqlm(ByForward):
    """aqlm.QuantizedLinear."""

    name: ClassVar[str | None] = "aqlm"
    unwritable: ClassVar[str] = "its codes are found by a search over calibration data"

    def matches(self, module: nn.Module) -> bool:
        return ("QuantizedLinear", "aqlm") in class_names(module)

    def packed(self, module: Any) -> dict[str, Tensor]:
        return {n: getattr(module, n).data for n in ("codebooks", "codes", "scales")}

    def settle(self, module: Any) -> None:
        if module.gemv_op is None and not module.codes.is_meta:  # else its first forward would put the codes into another order
            module.prepare_matmul_op(torch.empty(0, device=module.codes.device))
