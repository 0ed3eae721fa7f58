"""Small public helpers around a PeftModel, under PEFT's names."""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .bases import codec_for
from .config import PeftConfig
from .engine.caching import keep
from .engine.layer import adapted_layers
from .errors import PeftWarning
from .kappa import KappaTuneSelector, find_kappa_target_modules

__all__ = [
    "DoraCaching", "KappaTuneSelector", "MontecloraTrainerMixin", "cast_mixed_precision_params", "check_if_peft_model", "disable_input_dtype_casting",
    "find_kappa_target_modules", "prepare_model_for_kbit_training", "rescale_adapter_scale", "update_forward_signature", "update_generate_signature",
    "update_signature",
]  # fmt: skip

_LOW = (torch.float16, torch.bfloat16)


def _take_over(model: Any, name: str) -> None:
    """Give a method of the PeftModel that takes anything the signature, annotations and docstring of the user's model's own."""
    own, base = getattr(model, name), getattr(model.get_base_model(), name)
    if any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in inspect.signature(own).parameters.values()):
        return  # it tells its arguments already

    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self), name)(self, *args, **kwargs)

    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(base)
    method.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])  # type: ignore[attr-defined]
    method.__doc__ = base.__doc__
    method.__annotations__ = dict(getattr(base, "__annotations__", {}))
    setattr(model, name, types.MethodType(method, model))


def update_forward_signature(model: nn.Module) -> None:
    """Show the user's model's forward signature on a PeftModel whose own forward takes anything."""
    _take_over(model, "forward")


def update_generate_signature(model: nn.Module) -> None:
    """Show the user's model's generate signature on a PeftModel whose own generate takes anything."""
    _take_over(model, "generate")


def update_signature(model: nn.Module, method: str = "all") -> None:
    """Show the user's model's signatures on the PeftModel.

    Args:
        method: "forward", "generate" or "all".

    Raises:
        ValueError: for another method.
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    for name in ("forward", "generate") if method == "all" else (method,):
        _take_over(model, name)


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or Hub name holds an adapter's config."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # whatever is wrong with it: it is none
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling of all LoRA adapters for the code inside, for all threads.

    Args:
        model: any model with LoRA layers.
        multiplier: the factor; 0 turns the adapters off.

    Raises:
        TypeError: if the multiplier is no number.
        ValueError: if the model has no LoRA layers.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    lora = [(layer, name) for _, layer in adapted_layers(model) for name, a in layer.attached.items() if a.config.prefix == "lora_"]
    if not lora:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    before = [float(layer.scaling[name]) for layer, name in lora]
    for (layer, name), scaling in zip(lora, before, strict=True):
        layer.rescale(name, scaling * multiplier)
    try:
        yield
    finally:
        for (layer, name), scaling in zip(lora, before, strict=True):
            layer.rescale(name, scaling)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Nothing to switch off: veneer never casts a layer's input. Kept for code that asks for it."""
    yield


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep what trains in float32 and turn everything frozen into `dtype` (float16 or bfloat16), in place; packed weights stay."""
    for p in model.parameters():
        if not p.is_floating_point() or type(p) is not nn.Parameter:
            continue
        if not p.requires_grad:
            p.data = p.to(dtype)
        elif p.dtype in _LOW:
            p.data = p.to(torch.float32)


class DoraCaching:
    """Keep what DoRA computes from its tensors, the norms of the changed rows above all, from call to call: for inference with fixed weights.

    `with DoraCaching(): ...` keeps it inside the block, `DoraCaching()(enabled=True)` for good. It acts in eval mode without gradients, for all models and
    threads; anything that is written to a tensor makes it anew (except through `.data`). It costs one number a row.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.prev_value: bool | None = None

    def __enter__(self) -> None:
        self.prev_value = keep(self.enabled)

    def __exit__(self, type: Any, value: Any, traceback: Any) -> None:
        keep(bool(self.prev_value))
        self.prev_value = None

    def __call__(self, enabled: bool = True) -> None:
        keep(enabled)


class MontecloraTrainerMixin:
    """For code that trains MonteCLoRA with PEFT: `class MyTrainer(MontecloraTrainerMixin, Trainer)`.

    There is nothing to add to the loss: the gradient of MonteCLoRA's divergences comes to the others at each step of an optimizer, in any loop. The loss
    that is returned, and logged, is the task's alone.
    """

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]


_OWN_DTYPE = frozenset({"gptq", "aqlm", "eetq", "hqq", "torchao"})  # storages whose layers compute in the dtype they were made for


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Make a quantised model of transformers ready for adapters that train: frozen, the rest in float32, gradient checkpointing on.

    None of it has to be done: `get_peft_model` freezes by itself, and a model in bfloat16 trains well without its norms, embeddings and head in
    float32, which is much memory where the vocabulary is large. Packed tensors are left alone.

    Args:
        use_gradient_checkpointing: turn it on, and let the embeddings' output require gradients.
        gradient_checkpointing_kwargs: for torch.utils.checkpoint, such as {"use_reentrant": False}.
        auto_clear_cache: give memory that the casting has freed back to the accelerator.
    """
    storages = {codec.name for codec in map(codec_for, model.modules()) if not codec.plain}
    if not storages:
        warnings.warn("The model has no quantised layers, so nothing but its dtype and what trains is prepared.", PeftWarning, stacklevel=2)
    for p in model.parameters():
        p.requires_grad_(False)
    if not storages & _OWN_DTYPE:
        for p in model.parameters():
            if p.dtype in _LOW and type(p) is nn.Parameter:
                p.data = p.data.float()
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if use_gradient_checkpointing and storages:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(**({"gradient_checkpointing_kwargs": options} if options else {}))
    return model
