"""The entry points: a model and a config in, a model with adapters out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .checkpoint.from_transformers import attached
from .config import PeftConfig
from .engine import inject
from .engine.wrapper import adapter_modules
from .errors import ConfigError, PeftError, PeftWarning
from .method import Method, config_class, load_methods
from .mixed import PeftMixedModel
from .model import PeftModel
from .tuner import MixedModel, Tuner, tuner_class
from .types import PeftType


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A model with an adapter to train. The model is changed in place.

    Args:
        model: any nn.Module.
        peft_config: the adapter's config; it is kept, and gets the base model's name.
        adapter_name: the adapter's name.
        mixed: make a `PeftMixedModel`, which takes adapters of several methods.
        autocast_adapter_dtype: keep the adapter in float32 where the model is float16 or bfloat16; it computes in the input's dtype.
        revision: of the base model, remembered in the config.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device.

    Returns:
        A PeftModel, of the class that goes with `peft_config.task_type`; or a PeftMixedModel.

    Raises:
        ConfigError, NoMatchingPeftModuleError: if the config does not fit the model, which is then as it was.
        PeftError: if the model has adapters already.
    """
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(f"peft_config has to be a config such as LoraConfig(...), got {type(peft_config).__name__}.")
    name = getattr(model, "name_or_path", None)
    if name:
        _note(peft_config, "base_model_name_or_path", name)
    if revision is not None:
        _note(peft_config, "revision", revision)
    cls = (PeftMixedModel if mixed else PeftModel)._class_for(peft_config)
    return cls(model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage)


def _note(config: PeftConfig, field: str, value: str) -> None:
    old = getattr(config, field)
    if old not in (None, value):
        warnings.warn(f"The config's `{field}` was {old!r} and is {value!r} now, as this base model says.", PeftWarning, stacklevel=3)
    setattr(config, field, value)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Attach an adapter to a bare model, in place. It acts, and trains unless its config says `inference_mode`.

    Args:
        peft_config: the adapter's config.
        model: any nn.Module, with or without injected adapters; its attribute `peft_config` gets all their configs by name.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device.
        state_dict: an adapter's tensors: adapt the modules that appear in its keys instead of the config's targets.

    Returns:
        The model.

    Raises:
        ConfigError, NoMatchingPeftModuleError: if the config does not fit the model, which is then as it was.
        PeftError: if the model is a PeftModel.
    """
    if not isinstance(peft_config, Method):
        raise ConfigError(f"`inject_adapter_in_model` does not support {type(peft_config).__name__}: it is no method that changes weights.")
    if isinstance(model, (PeftModel, Tuner)):
        raise PeftError("The model is a PeftModel already. Call model.add_adapter(name, config).")
    inject.attach(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
    attached(peft_config, model)
    if inject.active_adapters(model) != [adapter_name] or any(module.own is not None for _, module in adapter_modules(model)):
        inject.set_adapter(model, adapter_name, peft_config.inference_mode)
    held: Any = model
    held.peft_config = {**(getattr(held, "peft_config", None) or {}), adapter_name: peft_config}
    return model


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config that a dict such as one read from adapter_config.json describes; `peft_type` names the method.

    Raises:
        ConfigError: if there is no `peft_type`, or no such method.
        TypeError: for a field that the method's config does not have.
    """
    if "peft_type" not in config_dict:
        raise ConfigError("The dict has no `peft_type`, so its method is unknown. Add it, such as 'LORA'.")
    return config_class(config_dict["peft_type"])(**config_dict)


def __getattr__(name: str) -> Any:
    """PEFT's tables of its methods, made when asked for."""
    methods = {PeftType(k) if k in PeftType.__members__ else k: m for k, m in load_methods().items()}
    if name == "PEFT_TYPE_TO_CONFIG_MAPPING":
        return methods
    if name in ("PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING"):
        return {k: MixedModel if "MIXED" in name else tuner_class(k) for k, m in methods.items() if issubclass(m, Method)}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
