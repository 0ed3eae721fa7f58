"""bitsandbytes' 8-bit weights, LLM.int8(). Dettmers et al. 2022, arXiv:2208.07339."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels.products import linear
from .base import Codec, class_names, twin


class Bnb8bit(Codec):
    """Linear8bitLt and Embedding8bit: `weight` is an Int8Params, a scale per row.

    Outside training (on accelerators always) the product rounds its inputs to 8 bits as well; the gradient passes as if they were not.
    """

    name: ClassVar[str | None] = "bnb 8bit"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})

    def matches(self, module: nn.Module) -> bool:
        return any(n == "Int8Params" for n, _ in class_names(module._parameters.get("weight")))

    def _parts(self, module: Any) -> tuple[Tensor, Tensor | None]:
        """(the integers, the rows' scales); no scales before it was moved to the device, which is when it is quantised.

        Raises:
            ConfigError: if the integers have lost their scales, which FSDP does not know of.
        """
        holders = (module.weight, getattr(module, "state", None))
        scales = next((s for s in (getattr(h, "SCB", None) for h in holders) if s is not None), None)
        if scales is None and module.weight.dtype == torch.int8:
            raise ConfigError(
                f"The integers of this {type(module).__name__} have lost their scales: FSDP keeps the ones without the others. Take DDP, or NF4 "
                "(load_in_4bit), which FSDP2 shards."
            )
        return module.weight.data, scales

    def weight(self, module: Any, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        rows, scales = self._parts(module)
        dtype = dtype or self.dtype(module)
        if scales is None or rows.dtype != torch.int8:
            return rows.to(dtype)
        return rows.to(dtype).mul_(scales.unsqueeze(1).mul(1 / 127).to(rows.device))

    def dtype(self, module: Any, name: str = "weight") -> torch.dtype:
        told = getattr(module, "dtype", None) or getattr(getattr(module, "bias", None), "dtype", torch.float32)
        return told if isinstance(told, torch.dtype) else torch.float32

    def multiply(self, module: Any, x: Tensor) -> Tensor:
        if self._parts(module)[1] is None:
            return linear(x, self.weight(module, dtype=x.dtype))
        from bitsandbytes import matmul

        if module.weight.CB is not None:
            module.init_8bit_state()
        module.state.is_training = module.training
        y: Tensor = matmul(x, module.weight, state=module.state)
        return y.to(x.dtype)

    def packed(self, module: Any) -> dict[str, Tensor]:
        rows, scales = self._parts(module)
        return {"weight": rows} if scales is None else {"weight": rows, "SCB": scales}

    def written(self, module: Any, w: Tensor) -> nn.Module:
        new, old = twin(module), module.weight
        new._parameters["weight"] = type(old)(w.to("cpu", torch.float16), requires_grad=False).to(old.device)  # moving it quantises it
        if hasattr(module, "state"):
            new.state = copy.copy(module.state)
            new.state.CB = new.state.SCB = None
        out: nn.Module = new
        return out
