"""GPTQ layers of GPTQModel and AutoGPTQ. Frantar et al. 2022, arXiv:2210.17323."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import ByForward, class_names


class Gptq(ByForward):
    """Any of their QuantLinear classes: packed `qweight`, `qzeros` and `scales`; those that have `dequantize_weight` are read with it."""

    name: ClassVar[str | None] = "gptq"
    unwritable: ClassVar[str] = "GPTQ rounds with calibration data"

    def matches(self, module: nn.Module) -> bool:
        names = list(class_names(module))
        ours = any(p in ("gptqmodel", "auto_gptq") for _, p in names) and hasattr(module, "qweight")
        return ours and not any(n.lower().startswith("aw") for n, _ in names)

    @torch.no_grad()
    def weight(self, module: Any, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        if not hasattr(module, "dequantize_weight"):
            return super().weight(module, name, dtype)
        w: Tensor = module.dequantize_weight().mT
        return w.to(dtype or self.dtype(module))

    def packed(self, module: Any) -> dict[str, Tensor]:
        return {n: t.data for n in ("qweight", "qzeros", "scales", "g_idx") if isinstance(t := getattr(module, n, None), Tensor)}
