"""PEFT's functions on models with injected adapters, for libraries that keep no PeftModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from .engine import inject
from .engine.layer import adapted_layers
from .engine.route import adapter_names as names_of
from .engine.route import check_known
from .engine.wrapper import adapter_modules, warn_of_heir
from .mapping import inject_adapter_in_model

__all__ = [
    "cast_adapter_dtype", "delete_adapter", "get_peft_model_state_dict", "infer_device", "inject_adapter_in_model", "set_adapter",
    "set_peft_model_state_dict", "set_requires_grad", "shift_tokens_right", "submodules",
]  # fmt: skip

_LOW = (torch.float16, torch.bfloat16)


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: Any = None) -> None:
    """Let one or several adapters act and (not in inference mode) train.

    Args:
        model: a model with injected adapters.
        layer_cls: taken for PEFT's sake; every layer follows.

    Raises:
        RouteError: for a name that is not there.
    """
    inject.set_adapter(model, adapter_name, inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let the tensors of these adapters get gradients, or not.

    Raises:
        RouteError: for a name that is not there.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    check_known(names, names_of(model))
    inject.mark_trainable(model, names, requires_grad)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: Any = None) -> list[str] | None:
    """Take an adapter off and free its tensors. If no other one acted, the first that is left does, and trains, with a warning. The config in
    `model.peft_config` is the caller's to remove.

    Args:
        prefix, layer_cls: taken for PEFT's sake; an adapter's tensors are known exactly.

    Returns:
        The adapters that act now, or None if there are none left.

    Raises:
        RouteError: if there is no such adapter.
    """
    before = {n for _, module in adapter_modules(model) for n in module.active_adapters}
    inject.detach(model, adapter_name)
    now = next((module.active_adapters for _, module in adapter_modules(model)), [])
    heirs = [n for n in now if n not in before] if adapter_name in before else []
    if heirs:
        warn_of_heir(adapter_name, heirs[0], stacklevel=3)
        config = (getattr(model, "peft_config", None) or {}).get(heirs[0])
        inject.mark_trainable(model, heirs, not getattr(config, "inference_mode", False))
    return now or None


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Turn an adapter's float16 and bfloat16 tensors into float32, in place.

    Args:
        autocast_adapter_dtype: False: do nothing.
    """
    if not autocast_adapter_dtype:
        return
    for _, layer in adapted_layers(model):
        a = layer.attached.get(adapter_name)
        for leaf in a.leaves if a is not None else ():
            t = a.tensor(leaf) if a is not None else None
            if isinstance(t, nn.Parameter) and t.dtype in _LOW:
                t.data = t.data.float()


def submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(the module around, the module, its name there) of a dotted path."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def infer_device() -> str:
    """The kind of the accelerator that there is, or "cpu"."""
    found = torch.accelerator.current_accelerator()
    return found.type if found is not None else "cpu"


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """What a decoder reads when it is to write `input_ids`: everything one place later, a start token first, padding where the loss was to ignore.

    Args:
        input_ids: (batch, tokens); -100 counts as padding.

    Raises:
        ValueError: if there is no padding token.
    """
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    start = input_ids.new_full((input_ids.shape[0], 1), decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], 1)
    return shifted.masked_fill(shifted == -100, pad_token_id)
