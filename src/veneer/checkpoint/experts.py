"""Loading the LoRA adapters that another adapter mixes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..config import PeftConfig
from ..engine.defaults import CONFIG_NAME
from ..errors import ConfigError, LoadError
from ..types import name_of
from .hub import resolve_file
from .load import BIN_NAME, SAFETENSORS_NAME, load_into, read_adapter


def load_experts(tuner: Any, config: Any, adapter: str, low_cpu_mem_usage: bool, autocast_adapter_dtype: bool) -> list[str]:
    """Load those adapters that `config` mixes and the model has not; returns their names. A failure takes them off again.

    Args:
        tuner: the Tuner of the model.

    Raises:
        LoadError: if one is not found or does not fit.
        ConfigError: if one is no LoRA adapter, or has the name of the adapter that mixes it.
    """
    experts: Mapping[str, str | None] = config.experts()
    if adapter in experts:
        raise ConfigError(f"The adapter is called {adapter!r}, as one of those that it mixes. Give it another name (adapter_name).")
    first, loaded = not tuner.peft_config, []
    try:
        for name in experts:
            if name in tuner.peft_config:
                continue
            model_id, hub = _find(name, experts[name], getattr(config, "origin", None), name in config.along())
            lora = PeftConfig.from_pretrained(model_id, **hub)
            if name_of(lora.peft_type) != "LORA":
                raise ConfigError(f"The expert {name!r} ({model_id}) is a {lora.peft_type} adapter; experts are LoRA adapters.")
            trains = name in config.along() and not config.inference_mode
            lora.inference_mode = not trains
            file = read_adapter(model_id, key_mapping=getattr(tuner.model, "_checkpoint_conversion_mapping", None), **hub)
            tuner.inject(lora, name, low_cpu_mem_usage, None, autocast_adapter_dtype, True)
            loaded.append(name)
            load_into(tuner.model, name, file, lora, upcast=trains and autocast_adapter_dtype)
    except BaseException:
        tuner.take_off(loaded, first)
        raise
    return loaded


def _find(name: str, path: str | None, origin: tuple[str, Mapping[str, Any]] | None, trained: bool) -> tuple[str, dict[str, Any]]:
    """(folder or name on the Hub, how to ask it) of an expert.

    What stands in the folder of the adapter that mixes it goes before its path; what stands beside that folder, if it was trained with it.
    """
    beside: list[Path] = []
    if origin is not None and os.path.isdir(origin[0]):
        own = Path(origin[0], origin[1].get("subfolder") or "")
        given = [Path(path), own / path] if path is not None else []
        beside = [own / name, own.parent / name, *given] if trained else [own / name, *given, own.parent / name]
    elif origin is not None:
        hub = {**origin[1], "subfolder": "/".join(s for s in (origin[1].get("subfolder"), name) if s)}
        if resolve_file(origin[0], CONFIG_NAME, **hub) is not None:
            return origin[0], hub
    found = next((folder for folder in beside if _is_expert(folder)), None)
    if found is not None:
        return str(found), {}
    if path is None:
        raise LoadError(
            f"The expert {name!r} is neither in the model nor beside the adapter's file. Load it first: load_adapter(folder, {name!r})."
        )
    return split_source(path)


def split_source(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """(folder or name on the Hub, {"subfolder": ...} if there is one) of a folder, or of `owner/name/subfolder`."""
    parts = os.fspath(path).strip("/").split("/")
    if os.path.exists(path) or os.path.isabs(path) or len(parts) < 3 or parts[0] in (".", ".."):
        return os.fspath(path), {}
    return "/".join(parts[:2]), {"subfolder": "/".join(parts[2:])}


def _is_expert(folder: Path) -> bool:
    """Whether the folder holds an adapter. PEFT puts weights of the base and of X-LoRA's classifier where its experts should be."""
    if not (folder / CONFIG_NAME).is_file():
        return False
    if not (folder / SAFETENSORS_NAME).is_file():
        return (folder / BIN_NAME).is_file()
    try:
        with safe_open(folder / SAFETENSORS_NAME, framework="pt") as f:
            return not any("internal_xlora_classifier" in k for k in f.keys())  # noqa: SIM118  the handle is no mapping
    except (SafetensorError, OSError):
        return True  # it says what is wrong with it when it is loaded
