"""Linear layers in each storage whose library is installed and runs here, as further places for the laws."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .sites import SiteCase, _floats, _modules, _Wrap

N_IN, N_OUT = 128, 64
_ROUNDS_INPUTS = 1500.0  # how much looser the laws are for a storage that rounds its inputs to 8 bits


def packed_sites() -> dict[str, SiteCase]:
    """A case for each storage, by name; none for libraries that are not installed."""
    return {
        name: SiteCase("linear", lambda pack=pack: _Wrap(pack(_linear())), _floats(5, N_IN), _modules(), loose=loose)  # type: ignore[misc]
        for name, (library, pack, loose) in _PACKERS.items()
        if importlib.util.find_spec(library.partition(".")[0]) is not None
    }


def _linear() -> nn.Linear:
    return nn.Linear(N_IN, N_OUT)


def bitsandbytes(linear: nn.Linear, **options: Any) -> nn.Module:
    """In 4 bits (`quant_type`, `compress_statistics`) or, without options, in 8."""
    from bitsandbytes import nn as bnb

    size = (linear.in_features, linear.out_features, linear.bias is not None)
    new = bnb.Linear4bit(*size, **options) if options else bnb.Linear8bitLt(*size, has_fp16_weights=False)
    new.load_state_dict(linear.state_dict())
    if options:  # else a bare layer, in eval mode on some CPUs, computes in bfloat16
        new.support_avx512bf16_for_cpu = False
    out: nn.Module = new.to("cpu")  # moving it quantises it
    return out


def torchao(linear: nn.Linear, config: str, **options: Any) -> nn.Module:
    """By the name of one of torchao's configs."""
    from torchao import quantization

    holder = nn.Sequential(linear)
    quantization.quantize_(holder, getattr(quantization, config)(**options))
    return holder[0]


def _int4() -> dict[str, Any]:
    from torchao.quantization.granularity import PerGroup

    return {"weight_dtype": torch.int4, "granularity": PerGroup(32)}  # type: ignore[attr-defined]


def quanto(linear: nn.Linear, weights: str) -> nn.Module:
    """In "qint8", "qint4", "qint2" or "qfloat8"."""
    from optimum import quanto as library

    holder = nn.Sequential(linear)
    library.quantize(holder, weights=getattr(library, weights))
    library.freeze(holder)
    return holder[0]


def hqq(linear: nn.Linear, nbits: int, axis: int = 1, group_size: int = 32) -> nn.Module:
    """In groups along the input (axis 1) or the output (axis 0)."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=axis)
    out: nn.Module = HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")
    return out


_PACKERS: Mapping[str, tuple[str, Callable[[nn.Linear], nn.Module], float]] = {
    "nf4": ("bitsandbytes", lambda m: bitsandbytes(m, quant_type="nf4", compress_statistics=False), 1.0),
    "nf4_double": ("bitsandbytes", lambda m: bitsandbytes(m, quant_type="nf4", compress_statistics=True), 1.0),
    "nf4_in_bfloat16": ("bitsandbytes", lambda m: bitsandbytes(m, quant_type="nf4", quant_storage=torch.bfloat16), 1.0),
    "fp4_double": ("bitsandbytes", lambda m: bitsandbytes(m, quant_type="fp4", compress_statistics=True), 1.0),
    "llm_int8": ("bitsandbytes", bitsandbytes, _ROUNDS_INPUTS),
    "torchao_int8": ("torchao", lambda m: torchao(m, "Int8WeightOnlyConfig"), 1.0),
    "torchao_int8_inputs": ("torchao", lambda m: torchao(m, "Int8DynamicActivationInt8WeightConfig"), _ROUNDS_INPUTS),
    "torchao_int4": ("torchao", lambda m: torchao(m, "IntxWeightOnlyConfig", **_int4()), 1.0),
    "torchao_float8": ("torchao", lambda m: torchao(m, "Float8WeightOnlyConfig"), 1.0),
    "quanto_int8": ("optimum.quanto", lambda m: quanto(m, "qint8"), 1.0),
    "quanto_int4": ("optimum.quanto", lambda m: quanto(m, "qint4"), 1.0),
    "quanto_float8": ("optimum.quanto", lambda m: quanto(m, "qfloat8"), 1.0),
    "hqq_8bit": ("hqq", lambda m: hqq(m, 8), 1.0),
    "hqq_4bit": ("hqq", lambda m: hqq(m, 4), 1.0),
    "hqq_3bit_outputs": ("hqq", lambda m: hqq(m, 3, axis=0, group_size=64), 1.0),
}
