"""The entry points: a model and a config in, a model with adapters out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .config import PeftConfig
from .engine import inject
from .errors import ConfigError, PeftWarning
from .method import Method, config_class
from .model import PeftModel
from .tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING


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
        mixed: make a model that takes adapters of several methods.
        autocast_adapter_dtype: keep the adapter in float32 where the model is float16 or bfloat16; it computes in the input's dtype.
        revision: of the base model, remembered in the config.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device.

    Raises:
        ConfigError, NoMatchingPeftModuleError: if the config does not fit the model, which is then as it was.
        PeftError: if the model has adapters already.
    """
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(f"peft_config has to be a config such as LoraConfig(...), got {type(peft_config).__name__}.")
    if mixed:
        raise ConfigError(
            "Mixed models are not available in this version of veneer. Adapters of one method each can be added with add_adapter."
        )
    name = getattr(model, "name_or_path", None)
    if name and peft_config.base_model_name_or_path and peft_config.base_model_name_or_path != name:
        warnings.warn(
            f"The config was made for the base model {peft_config.base_model_name_or_path!r}, this one is {name!r}; the config now says so.",
            PeftWarning,
            stacklevel=2,
        )
    if name:
        peft_config.base_model_name_or_path = name
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warnings.warn(
                f"peft config has already set base model revision to {peft_config.revision}, overwriting with revision {revision}",
                PeftWarning,
                stacklevel=2,
            )
        peft_config.revision = revision
    task = str(getattr(peft_config.task_type, "value", peft_config.task_type))
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, PeftModel)
    return cls(model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Attach an adapter to a bare model, in place, and return the model; `model.peft_config` holds the configs.

    Args:
        state_dict: an adapter's tensors: adapt the modules that appear in its keys instead of the config's targets.

    Raises:
        ConfigError, NoMatchingPeftModuleError: if the config does not fit the model, which is then as it was.
    """
    if not isinstance(peft_config, Method):
        raise ValueError(f"`inject_adapter_in_model` does not support {type(peft_config).__name__}: it is no method that changes weights.")
    if isinstance(model, PeftModel):
        raise ConfigError("The model is a PeftModel already. Call model.add_adapter(name, config).")
    inject.attach(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
    held: Any = model
    configs = dict(getattr(held, "peft_config", None) or {})
    held.peft_config = {**configs, adapter_name: peft_config}
    return model


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config that a dict such as one read from adapter_config.json describes; `peft_type` names the method."""
    return config_class(config_dict["peft_type"])(**config_dict)
