"""HQQ: groups of weights with a scale and a zero point each. Badri and Shaji 2023, mobiusml.github.io/hqq_blog."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import Codec, class_names, tensors_in, twin


class Hqq(Codec):
    """HQQLinear: `W_q` in 8 to 1 bits, W = scale (q - zero) by groups; it keeps its bias as a tensor, and is no nn.Linear."""

    name: ClassVar[str | None] = "hqq"

    def matches(self, module: nn.Module) -> bool:
        return ("HQQLinear", "hqq") in class_names(module)

    def weight(self, module: Any, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        w: Tensor = module.dequantize().detach()
        return w if dtype is None else w.to(dtype)

    def dtype(self, module: Any, name: str = "weight") -> torch.dtype:
        found: torch.dtype = module.compute_dtype
        return found

    def multiply(self, module: Any, x: Tensor) -> Tensor:
        y: Tensor = module.matmul(x.to(module.compute_dtype))
        return y.to(x.dtype)

    def packed(self, module: Any) -> dict[str, Tensor]:
        return {"W_q": module.W_q.data, **dict(tensors_in("meta", module.meta))}

    def written(self, module: Any, w: Tensor) -> nn.Module:
        new = twin(module)
        shift = self._shift(module, w)
        if shift is not None:  # the integers stay as they are
            new.meta = {
                **module.meta,
                "zero": (module.meta["zero"].float() - shift / module.meta["scale"].float()).to(module.compute_dtype),
            }
        else:
            new._parameters.pop("W_q", None)
            new.quantize(w, **module.quant_config)
        out: nn.Module = new
        return out

    def _shift(self, module: Any, w: Tensor) -> Tensor | None:
        """By how much each group of W is moved as a whole (groups, 1), if that is all that is done to it: then its zero point takes it (QALoRA)."""
        meta = module.meta
        if meta["axis"] != 1 or "zero" not in meta or meta["quant_zero"] or meta["quant_scale"]:
            return None
        moved = (w.float() - self.weight(module).float()).reshape(-1, meta["group_size"])
        mean = moved.mean(1, keepdim=True)
        return mean if bool(((moved - mean).abs() <= 1e-5 * w.abs().max() + 1e-3 * mean.abs()).all()) else None

    def settle(self, module: Any) -> None:
        if isinstance(module.bias, Tensor) and not isinstance(module.bias, nn.Parameter):
            module.bias = module.bias.detach()  # it was cloned from a parameter, graph and all
