"""What a model's adapters are and do: one report per layer, one for the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .engine.inject import adapter_modules
from .engine.layer import AdaptedLayer

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapted layer: its adapters, which of them act, are merged, train, and where they are."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """All adapted layers together; a value that differs from layer to layer is "irregular"."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None | Irregular


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(numbers that train, all numbers)."""
    trainable = total = 0
    for p in model.parameters():
        n = p.numel() or int(getattr(p, "ds_numel", 0))
        if type(p).__name__ == "Params4bit":  # two numbers a byte
            storage = getattr(p, "quant_storage", None)
            n *= 2 * (storage.itemsize if storage is not None else p.element_size())
        total += n
        trainable += n if p.requires_grad else 0
    return trainable, total


def _one(values: Iterable[Any]) -> Any:
    """The value if all are the same, else "irregular"."""
    first, *rest = values
    return first if all(v == first for v in rest) else "irregular"


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapted layer, with its name in the user's model.

    Raises:
        ValueError: if the model has no adapted layers.
    """
    root = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    out = [_layer(path, m) for path, m in adapter_modules(root)]
    if not out:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters injected in the model."
        )
    return out


def _layer(path: str, module: Any) -> TunerLayerStatus:
    grads: dict[str, bool | Irregular] = {}
    devices: dict[str, list[str]] = {}
    for adapter in module.adapters():
        tensors = [owner._parameters[key] for _, _, key, owner in module.adapter_slots(adapter) if key in owner._parameters]
        frozen = _frozen(module, adapter)
        grads[adapter] = _one([t.requires_grad for t in tensors if id(t) not in frozen] or [False])
        devices[adapter] = sorted({t.device.type for t in tensors})
    return TunerLayerStatus(
        name=path.removesuffix(".token_adapter"),
        module_type=_type(module),
        enabled=not module.disable_adapters,
        active_adapters=list(module.active_adapters),
        merged_adapters=list(getattr(module, "merged_adapters", [])) if isinstance(module, AdaptedLayer) else [],
        requires_grad=grads,
        available_adapters=sorted(module.adapters()),
        devices=devices,
        quantization_backend=None,
    )


def _frozen(module: Any, adapter: str) -> set[int]:
    if not isinstance(module, AdaptedLayer):
        return set()
    a = module.attached[adapter]
    return {id(a.tensor(n)) for n, leaf in a.leaves.items() if not leaf.trainable}


def _type(module: Any) -> str:
    if not isinstance(module, AdaptedLayer):
        return type(module).__name__
    return f"{next(iter(module.attached.values())).config.prefix.rstrip('_')}.{type(module.get_base_layer()).__name__}"


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of the model as a whole.

    Raises:
        ValueError: if the model has no adapted layers.
    """
    layers = get_layer_status(model)
    root = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    names = sorted({a for s in layers for a in s.available_adapters})
    trainable, total = count_parameters(model)
    configs: Any = getattr(model, "peft_config", {})
    return TunerModelStatus(
        base_model_type=type(root).__name__,
        adapter_model_type=type(model.base_model).__name__ if hasattr(model, "get_base_model") else "None",
        peft_types={n: str(getattr(c.peft_type, "value", c.peft_type)) for n, c in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_one(s.enabled for s in layers),
        active_adapters=_one(s.active_adapters for s in layers),
        merged_adapters=_merged(layers),
        requires_grad={n: _one(s.requires_grad[n] for s in layers if n in s.requires_grad) for n in names},
        available_adapters=names,
        devices={n: sorted({d for s in layers for d in s.devices.get(n, [])}) for n in names},
        quantization_backend=_one(s.quantization_backend for s in layers),
    )


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Irregular:
    """Merged adapters, each expected on the layers that have it."""
    every = {m for s in layers for m in s.merged_adapters}
    for s in layers:
        if {m for m in every if m in s.available_adapters} != set(s.merged_adapters) and s.module_type != "ModulesToSaveWrapper":
            return "irregular"
    return max((s.merged_adapters for s in layers), key=len)
