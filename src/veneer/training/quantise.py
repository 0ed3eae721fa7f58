"""The storages that `veneer train --quantize` loads a model in, by transformers' own configs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import ConfigError, hint

HEADS = ("score", "classifier")  # of classifiers: trained whole, so never packed


def _bitsandbytes(dtype: torch.dtype, bits: int, kind: str = "nf4") -> Any:
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def _torchao(name: str, **options: Any) -> Any:
    from torchao import quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(quantization, name)(**options))


def _torchao_int4() -> Any:
    from torchao.quantization.granularity import PerGroup

    return _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(32))  # type: ignore[attr-defined]


def _quanto(weights: str) -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights=weights)


STORAGES: Mapping[str, tuple[str, str, Callable[[torch.dtype], Any]]] = {
    "nf4": ("bitsandbytes", "bitsandbytes", lambda dtype: _bitsandbytes(dtype, 4)),
    "fp4": ("bitsandbytes", "bitsandbytes", lambda dtype: _bitsandbytes(dtype, 4, "fp4")),
    "int8": ("bitsandbytes", "bitsandbytes", lambda dtype: _bitsandbytes(dtype, 8)),
    "torchao-int8": ("torchao", "torchao", lambda dtype: _torchao("Int8WeightOnlyConfig")),
    "torchao-int4": ("torchao", "torchao", lambda dtype: _torchao_int4()),
    "torchao-float8": ("torchao", "torchao", lambda dtype: _torchao("Float8WeightOnlyConfig")),
    "quanto-int8": ("optimum.quanto", "optimum-quanto", lambda dtype: _quanto("int8")),
    "quanto-int4": ("optimum.quanto", "optimum-quanto", lambda dtype: _quanto("int4")),
    "quanto-float8": ("optimum.quanto", "optimum-quanto", lambda dtype: _quanto("float8")),
}


# bits for each number, with the scales of its block (and, in bitsandbytes, the scales of those)
BITS: Mapping[str, float] = {
    "nf4": 4 + 8 / 64 + 32 / (64 * 256), "fp4": 4 + 8 / 64 + 32 / (64 * 256), "int8": 8.03,
    "torchao-int8": 8.03, "torchao-int4": 9.0, "torchao-float8": 8.03, "quanto-int8": 8.03, "quanto-int4": 4.25, "quanto-float8": 8.03,
}  # fmt: skip


def check_storage(name: str) -> None:
    """Raise ConfigError for a storage that does not exist, or whose library is not installed."""
    if name not in STORAGES:
        raise ConfigError(f"Unknown storage {name!r} for --quantize. There are {', '.join(STORAGES)}.{hint(name, STORAGES)}")
    module, package, _ = STORAGES[name]
    top, _, rest = module.partition(".")
    if importlib.util.find_spec(top) is None or (rest and importlib.util.find_spec(module) is None):
        raise ConfigError(f"--quantize {name} needs {package}, which is not installed: pip install 'veneer[quant]'")


def storage(name: str, dtype: torch.dtype, classifier: bool) -> Any:
    """The `quantization_config` to load a model with; heads of classifiers stay as they are.

    Args:
        dtype: what the packed layers compute in.
    """
    config = STORAGES[name][2](dtype)
    if classifier:
        field = "llm_int8_skip_modules" if hasattr(config, "llm_int8_skip_modules") else "modules_to_not_convert"
        setattr(config, field, list(HEADS))
    return config
