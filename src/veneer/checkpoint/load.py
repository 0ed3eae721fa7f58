"""Reading adapter files, and filling an adapter of a model from one."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..config import PeftConfig
from ..engine.inject import settle
from ..engine.layer import adapted_layers
from ..errors import LoadError, PeftWarning, RouteError, hint
from .base import START_KEY, as_saved, check_identity
from .fused import fuse_tensors
from .hub import resolve_file
from .keys import adapter_names, bare, base_root, slots
from .match import rename_keys
from .nested import as_registered
from .plan import LoadReport, plan_load

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
START_NAME = "adapter_init.safetensors"


@dataclass
class AdapterFile:
    """What an adapter's folder holds.

    Attributes:
        tensors: by key; on the CPU they are views of the mapped file.
        path: the file they come from.
        metadata: texts that were saved beside them; empty for files of other libraries.
        start: frozen start values that the adapter's change is counted from, or None.
    """

    tensors: dict[str, Tensor]
    path: Path
    metadata: dict[str, str] = field(default_factory=dict)
    start: dict[str, Tensor] | None = None


def read_adapter(
    model_id: str | os.PathLike[str],
    *,
    device: torch.device | str | None = "cpu",
    key_mapping: Mapping[str, str] | None = None,
    **hub_kwargs: Any,
) -> AdapterFile:
    """Read the tensors of an adapter: `adapter_model.safetensors`, or if there is none, `adapter_model.bin`.

    Args:
        model_id: a folder, or where no such folder exists, a name on the Hub.
        device: where to put them; None: the accelerator if there is one.
        key_mapping: regular expression -> text; the first that hits a key (without `base_model.model.`) is applied.
        hub_kwargs: `subfolder` in either case; `revision, cache_dir, token, local_files_only, ...` for the Hub.

    Raises:
        LoadError: if there is no such file, or it is damaged, empty or holds anything but tensors.
    """
    where = torch.device(device) if device is not None else torch.accelerator.current_accelerator() or torch.device("cpu")
    path = resolve_file(model_id, SAFETENSORS_NAME, **hub_kwargs)
    if path is not None:
        tensors, metadata = read_safetensors(path, where)
    else:
        path = resolve_file(model_id, BIN_NAME, **hub_kwargs)
        if path is None:
            raise LoadError(_nothing_there(os.fspath(model_id), hub_kwargs.get("subfolder")))
        tensors, metadata = _read_bin(path, where), {}
    if not tensors:
        raise LoadError(
            f"{path} holds no tensors: the adapter was saved empty. Save it again from the trained model, or use another checkpoint."
        )
    return AdapterFile(
        rename_keys(tensors, key_mapping), path, metadata, load_start(path, metadata, model_id, where, key_mapping, **hub_kwargs)
    )


def load_start(
    path: Path,
    metadata: Mapping[str, str],
    model_id: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    key_mapping: Mapping[str, str] | None = None,
    **hub_kwargs: Any,
) -> dict[str, Tensor] | None:
    """The start values that go with the adapter file `path`, or None if it has none.

    Raises:
        LoadError: if the file was saved with start values, and they are not there.
    """
    beside: Path | None = path.parent / START_NAME
    if beside is not None and not beside.is_file():
        if START_KEY not in metadata:  # only then is the Hub asked
            return None
        beside = resolve_file(model_id, START_NAME, **hub_kwargs)
    if beside is None:
        raise LoadError(
            f"{path} was saved with start values that its change is counted from, and {START_NAME} is missing. Put it into the same folder."
        )
    return rename_keys(read_safetensors(beside, device)[0], key_mapping)


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: torch.device | str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter's file by key; arguments and errors as in `read_adapter`."""
    return read_adapter(model_id, device=device, key_mapping=key_mapping, **hf_hub_download_kwargs).tensors


def load_into(
    model: nn.Module,
    adapter_name: str,
    file: AdapterFile | Mapping[str, Tensor],
    config: Any = None,
    *,
    strict: bool | None = True,
    upcast: bool = False,
    ignore_mismatched_sizes: bool = False,
    device: torch.device | str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    check_base: Literal["warn", "error", "off"] = "warn",
    check_config: bool = True,
) -> LoadReport:
    """Fill an attached adapter from a file, wholly or not at all.

    A tensor gets the dtype it has in the file; weights of the base model (trained biases, saved embeddings) keep theirs.

    Args:
        model: a PeftModel or any model with adapted layers.
        config: the adapter's; by default `model.peft_config[adapter_name]`. Its `from_file(tensors)`, if it has one, turns what the
            method writes into its tensors.
        strict: True: every key and every slot must fit. None: every slot must be filled, keys too many are reported. False: whatever
            does not fit is reported. If nothing at all fits, it is an error in any case.
        upcast: turn float16, bfloat16 and float8 into float32, for training.
        device: where to put tensors that are on the meta device; by default where the layer's base weight is.
        check_base: what to do if the file remembers another base model than this one.
        check_config: compare the config's scaling with that of the file.

    Raises:
        LoadError: if the file does not fit; names keys, nearest slots, shapes, and the one rename that would fix it.
    """
    if not isinstance(file, AdapterFile):
        file = AdapterFile(dict(file), Path())
    merged = next((path for path, layer in adapted_layers(model) if adapter_name in layer.merged_adapters), None)
    if merged is not None:
        raise LoadError(
            f"The adapter {adapter_name!r} is merged into {merged!r}, which would go on with the old values. Call unmerge_adapter() first."
        )
    config = config if config is not None else config_of(model, adapter_name)
    own, config = config, as_saved(config, file.metadata)
    decode = getattr(config, "from_file", None)
    tensors = decode(file.tensors) if decode is not None else file.tensors
    tensors = fuse_tensors(model, config, as_registered(tensors, file.metadata, model, adapter_name), adapter_name)
    plan = plan_load(
        tensors,
        slots(model, adapter_name, config),
        key_mapping=key_mapping,
        strict=strict,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        adapter_name=adapter_name,
    )
    start_slots = slots(model, adapter_name, config, start=True)
    start_plan = None
    if start_slots and file.start is not None:
        start = as_registered(file.start, file.metadata, model, adapter_name)
        start_plan = plan_load(start, start_slots, key_mapping=key_mapping, adapter_name=f"{adapter_name} (start values)")
    elif unset := [k for k, s in start_slots.items() if s.tensor.is_meta]:
        raise LoadError(
            f"The adapter {adapter_name!r} counts its change from start values which are not in its folder: {START_NAME} is missing "
            f"(needed: {unset[0]!r}{', ...' * (len(unset) > 1)}). Put that file beside {SAFETENSORS_NAME}."
        )
    elif start_slots and file.path != Path() and (doubt := config.without_start()):
        warnings.warn(
            f"{file.path} does not bring the start values that its change is counted from: {doubt}. It may act otherwise than in training. "
            "Save it with path_initial_model_for_weight_conversion where it was trained.",
            PeftWarning,
            stacklevel=3,
        )
    check_identity(file.metadata, base_root(model), config, check_base=check_base, check_config=check_config)
    if start_plan is not None:
        start_plan.commit(device=device)
    report = plan.commit(upcast=upcast, device=device)
    if config is not own:
        vars(own).update(vars(config))
    settle(base_root(model), own, adapter_name)
    return report


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool | None = None,
) -> LoadReport:
    """Fill an attached adapter from a state dict, with or without `base_model.model.` in its keys.

    Args:
        ignore_mismatched_sizes: leave tensors whose shape differs as they are.
        low_cpu_mem_usage: taken for PEFT's sake; tensors on the meta device are filled either way.
        strict: None (default): a slot that stays empty or a shape that differs is an error, since the adapter would be partly dead; keys
            that fit nowhere are returned in `unexpected_keys`, where callers such as diffusers look for them. True: those are an error
            too. False: everything is returned, except that a state dict of which nothing fits is an error still.

    Returns:
        `.missing_keys` (names in memory) and `.unexpected_keys`, of the adapter alone.

    Raises:
        LoadError: see `strict`; nothing has been changed then.
    """
    return load_into(model, adapter_name, peft_model_state_dict, strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes)


def for_loading(
    config: Any, model_id: str | os.PathLike[str], hub: Mapping[str, Any], is_trainable: bool, ephemeral_gpu_offload: bool
) -> None:
    """Set in a config how its adapter is to be loaded, and where it comes from: what it needs beside its own tensors may be there."""
    if is_trainable and not getattr(config, "resumable", True):
        raise ValueError(
            "Cannot set a prompt learning adapter to trainable when loading pretrained adapter: the file holds what its network gave, "
            "not the network."
        )
    config.inference_mode, config.origin = not is_trainable, (os.fspath(model_id), dict(hub))
    if ephemeral_gpu_offload and hasattr(config, "runtime_config"):
        config.runtime_config.ephemeral_gpu_offload = True


def as_made(config: Any, file: AdapterFile) -> Any:
    """The config that a new adapter is attached with, to be filled from the file."""
    made = getattr(config, "as_made", None)
    return config if made is None else made(file.tensors)


def checks_in(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What is asked of `check_identity`, taken out of a caller's arguments.

    Raises:
        ValueError: for a `check_base` that there is not.
    """
    checks: dict[str, Any] = {n: kwargs.pop(n) for n in ("check_base", "check_config") if n in kwargs}
    if checks.get("check_base", "warn") not in ("warn", "error", "off"):
        raise ValueError(f"check_base is 'warn', 'error' or 'off', not {checks['check_base']!r}.")
    return checks


def hub_options(kwargs: Mapping[str, Any], caller: str) -> dict[str, Any]:
    """Those arguments that say where to find a file."""
    hub = PeftConfig._split_kwargs(kwargs)[0]
    warn_unused(set(kwargs) - set(hub), caller, "The base model keeps its dtype and devices, and the adapter goes where it is.")
    return hub


def warn_unused(names: set[str], caller: str, so: str) -> None:
    """Say that a caller got arguments which it does not use, and what happens all the same."""
    if names:
        warnings.warn(f"{caller} makes no use of {', '.join(sorted(names))}. {so}", PeftWarning, stacklevel=4)


def config_of(model: nn.Module, adapter_name: str) -> Any:
    """The config of one of the model's adapters.

    Raises:
        RouteError: if it has no such adapter.
    """
    tables = (getattr(m, "peft_config", None) for m in (bare(model), base_root(model)))
    configs = next((t for t in tables if isinstance(t, Mapping)), {})
    if adapter_name in configs:
        return configs[adapter_name]
    known = list(configs) or adapter_names(model)
    if adapter_name in known:
        raise RouteError(f"The model has the adapter {adapter_name!r}, but not its config: set model.peft_config[{adapter_name!r}].")
    raise RouteError(
        f"The model has no adapter {adapter_name!r}. It has: {', '.join(map(repr, known)) or 'none'}.{hint(adapter_name, known)}"
    )


# ---------------------------------------------------------------- files


def read_safetensors(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        LoadError: if it is cut off or otherwise damaged. Sizes are checked before anything is allocated.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            return {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118  the handle is no mapping
    except (SafetensorError, OSError) as e:
        raise LoadError(
            f"{path} cannot be read: {e}. It is damaged or was not written to its end ({_size(path)}). Download or save it again."
        ) from e


def _read_bin(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise LoadError(
            f"{path} cannot be read as plain tensors: {e}. It is damaged, or holds code, which is never run. Save it as {SAFETENSORS_NAME}."
        ) from e
    if not isinstance(loaded, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()):
        raise LoadError(f"{path} must hold a dict from names to tensors, and holds something else. Is it an adapter?")
    return dict(loaded)


def _size(path: str | os.PathLike[str]) -> str:
    try:
        return f"{os.path.getsize(path)} bytes"
    except OSError:
        return "its size is unknown"


def _nothing_there(given: str, subfolder: str | None) -> str:
    text = f"There is no {SAFETENSORS_NAME} (nor {BIN_NAME}) in {given!r}" + (f", subfolder {subfolder!r}" if subfolder else "")
    folder = Path(given, subfolder or "")
    if Path(given).is_file():
        return f"{given!r} is a file. Give the folder it is in: {str(Path(given).parent)!r}."
    if not folder.is_dir():
        return f"{text}."
    inside = sorted(p.parent.name for p in folder.glob("*/*") if p.name in (SAFETENSORS_NAME, BIN_NAME))
    if inside:
        return f"{text}. There are adapters in its subfolders {inside}: give subfolder={inside[0]!r}."
    there = sorted(p.name for p in folder.iterdir())
    return f"{text}. It holds: {', '.join(there[:8]) or 'nothing'}."
