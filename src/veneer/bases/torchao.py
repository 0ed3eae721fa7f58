"""torchao's quantised tensors: integers of 8 and 4 bits, float8, NF4."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MergeError
from .base import Codec, class_names, twin


class TorchAO(Codec):
    """An ordinary layer whose weight is a tensor of torchao's. Those that round their inputs as well have no backward of their own; here they do."""

    name: ClassVar[str | None] = "torchao"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})

    def matches(self, module: nn.Module) -> bool:
        w = module._parameters.get("weight")
        return w is not None and type(w) is not nn.Parameter and any(p == "torchao" for _, p in class_names(w))

    def weight(self, module: Any, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        w = module.weight.detach()
        whole: Tensor = w.get_original_weight() if hasattr(w, "get_original_weight") else w.dequantize()
        return whole if dtype is None else whole.to(dtype)

    def dtype(self, module: Any, name: str = "weight") -> torch.dtype:
        found: torch.dtype = module.weight.dtype
        return found

    def multiply(self, module: Any, x: Tensor) -> Tensor:
        return F.linear(x.to(module.weight.dtype), module.weight).to(x.dtype)

    def written(self, module: Any, w: Tensor) -> nn.Module:
        old = module.weight.detach()
        w, kind = w.to(old.device, old.dtype), type(old)
        if kind.__name__ == "Int8Tensor":
            mapping = _name("quant_primitives", "MappingType")
            made = kind.from_hp(
                w,
                _granularity(old.block_size, w.shape),
                mapping_type=mapping.SYMMETRIC if old.zero_point is None else mapping.ASYMMETRIC,
                **{
                    n: getattr(old, n)
                    for n in ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale", "reduce_range")
                },
            )
        elif kind.__name__ == "Float8Tensor":
            options = {n: getattr(old, n) for n in ("mm_config", "kernel_preference", "act_quant_kwargs")}
            made = kind.from_hp(w, old.qdata.dtype, _granularity(old.block_size, w.shape), **options)
        elif kind.__name__ == "IntxUnpackedToInt8Tensor":
            made = kind.from_hp(w, tuple(old.block_size), old.target_dtype, activation_quantization=old.activation_quantization)
        else:
            raise MergeError(
                f"veneer does not write torchao's {kind.__name__}. Merge with store='dense', and quantise the merged model again."
            )
        out: nn.Module = twin(module, weight=nn.Parameter(made, requires_grad=False))
        return out


def _granularity(block: Any, shape: Any) -> Any:
    """What one scale stands for: the whole tensor, a row or a group of a row."""
    if list(block) == list(shape):
        return _name("granularity", "PerTensor")()
    return _name("granularity", "PerRow")() if block[-1] == shape[-1] else _name("granularity", "PerGroup")(block[-1])


def _name(module: str, name: str) -> Any:
    return getattr(sys.modules[f"torchao.quantization.{module}"], name)
