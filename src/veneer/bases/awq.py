"""AWQ layers of AutoAWQ and GPTQModel. Lin et al. 2023, arXiv:2306.00978."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .base import ByForward, class_names


class Awq(ByForward):
    """Any of their linear classes: packed `qweight`, `qzeros` and `scales`."""

    name: ClassVar[str | None] = "awq"
    unwritable: ClassVar[str] = "AWQ scales with calibration data"

    def matches(self, module: nn.Module) -> bool:
        packages = {p for _, p in class_names(module)}
        return hasattr(module, "qweight") and bool(packages & {"awq", "gptqmodel"})  # GPTQ has been asked before

    def packed(self, module: Any) -> dict[str, Tensor]:
        return {n: t.data for n in ("qweight", "qzeros", "scales") if isinstance(t := getattr(module, n, None), Tensor)}
