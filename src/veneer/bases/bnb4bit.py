"""bitsandbytes' 4-bit weights: NF4 and FP4, with or without double quantisation. Dettmers et al. 2023, arXiv:2305.14314."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels.products import linear
from .base import Codec, class_names, flat, tensors_in, twin


class Bnb4bit(Codec):
    """Linear4bit and Embedding4bit: `weight` is a Params4bit with two numbers a byte, its scales in `quant_state`.

    On CPUs with AVX512-BF16 bitsandbytes repacks a weight for good, its scales rounded to bfloat16, the first time it runs in eval mode. Adapted
    layers do not: what was learned on a weight is served on the same.
    """

    name: ClassVar[str | None] = "bnb 4bit"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})

    def matches(self, module: nn.Module) -> bool:
        return any(n == "Params4bit" for n, _ in class_names(module._parameters.get("weight")))

    def _state(self, module: Any) -> Any:
        """How the weight is packed; None before it was moved to the device, which is when it is quantised."""
        state = getattr(module.weight, "quant_state", None)
        return getattr(module, "quant_state", None) if state is None else state

    def weight(self, module: Any, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        state, data = self._state(module), module.weight.data
        if state is None:
            unpacked: Tensor = data if dtype is None else data.to(dtype)
            return unpacked
        from bitsandbytes import functional

        if getattr(state, "packing_format_for_cpu", False):  # it ran before it was adapted
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
        w: Tensor = functional.dequantize_4bit(data, state)
        return w if dtype is None else w.to(dtype)

    def dtype(self, module: Any, name: str = "weight") -> torch.dtype:
        state = self._state(module)
        found: torch.dtype = module.weight.dtype if state is None else state.dtype
        return found

    def device(self, module: Any, name: str = "weight") -> torch.device:
        where: torch.device = module.weight.device
        return where

    def multiply(self, module: Any, x: Tensor) -> Tensor:
        state = self._state(module)
        if state is None or getattr(state, "packing_format_for_cpu", False):
            return linear(x, self.weight(module, dtype=x.dtype))
        from bitsandbytes import matmul_4bit

        y: Tensor = matmul_4bit(x.to(module.compute_dtype or x.dtype), module.weight.data.t(), quant_state=state)
        return y.to(x.dtype)

    def packed(self, module: Any) -> dict[str, Tensor]:
        out, state = dict(flat("weight", module.weight)), self._state(module)
        for label, part in (("state", state), ("state2", getattr(state, "state2", None))):
            out |= dict(tensors_in(label, dict(vars(part)) if part is not None else {}))
        return out

    def written(self, module: Any, w: Tensor) -> nn.Module:
        old = module.weight
        options = {n: getattr(old, n) for n in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
        new = twin(module)
        fresh = type(old)(w.to("cpu", self.dtype(module)), requires_grad=False, module=new, **options)
        new._parameters["weight"] = fresh.to(old.device)  # moving it quantises it
        new.quant_state = new.weight.quant_state
        out: nn.Module = new
        return out

    def settle(self, module: Any) -> None:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
