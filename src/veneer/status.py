"""What a model's adapters are and do: one report per layer, one for the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .engine.layer import AdaptedLayer
from .engine.wrapper import adapter_modules
from .tuner import Tuner
from .types import name_of

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapted layer.

    Attributes:
        name: its path, counted from the tuner (so it starts with `model.`) or from the model the adapters were injected into.
        module_type: the method and the kind of module, such as `lora.Linear`.
        enabled: whether its adapters act at all.
        active_adapters: which of the model's adapters act.
        merged_adapters: which are in its weight now.
        requires_grad: by adapter: whether its trainable tensors train; "irregular" if only some do.
        available_adapters: those that are on this layer, sorted.
        devices: by adapter: the types of device its tensors are on.
        quantization_backend: how the frozen weight is packed, or None.
    """

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
    """All adapted layers together; a value that differs from layer to layer is "irregular".

    Attributes:
        base_model_type, adapter_model_type: the class of the user's model and of the tuner ("None" without a PeftModel).
        peft_types: by adapter: its method.
        trainable_params, total_params: numbers that train, and all.
        num_adapter_layers: how many layers are adapted.
        merged_adapters: "irregular" if an adapter is merged into some of its layers only.
    """

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
    quantization_backend: str | Irregular | None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(numbers that train, all numbers). Packed and sharded weights count as the numbers they stand for."""
    trainable = total = 0
    for p in model.parameters():
        n = p.numel() or int(getattr(p, "ds_numel", 0))
        if type(p).__name__ == "Params4bit":  # two numbers a byte
            storage = getattr(p, "quant_storage", None)
            n *= 2 * (storage.itemsize if storage is not None else p.element_size())
        total += n
        trainable += n if p.requires_grad else 0
    return trainable, total


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapted layer, in the order of the model.

    Args:
        model: a PeftModel or a model with injected adapters.

    Raises:
        ValueError: if the model has no adapted layers.
    """
    if "prompt_encoder" in model._modules:
        raise TypeError("A prompt changes no layer, so there is no status of layers. See model.active_adapters and model.peft_config.")
    out = [_layer(path, m) for path, m in adapter_modules(_tuner(model) or model)]
    if not out:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters injected in the "
            "model."
        )
    return out


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of the model as a whole.

    Args:
        model: a PeftModel or a model with injected adapters.

    Raises:
        ValueError: if the model has no adapted layers.
    """
    layers = get_layer_status(model)
    tuner = _tuner(model)
    names = sorted({a for s in layers for a in s.available_adapters})
    trainable, total = count_parameters(model)
    configs: Any = getattr(model, "peft_config", {})
    return TunerModelStatus(
        base_model_type=type(model if tuner is None else tuner.model).__name__,
        adapter_model_type="None" if tuner is None else type(tuner).__name__,
        peft_types={n: name_of(c.peft_type) for n, c in configs.items()},
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


def _tuner(model: nn.Module) -> Tuner | None:
    found = model if isinstance(model, Tuner) else model._modules.get("base_model")
    return found if isinstance(found, Tuner) else None


def _one(values: Iterable[Any]) -> Any:
    """The value if all are the same, else "irregular"."""
    first, *rest = values
    return first if all(v == first for v in rest) else "irregular"


def _layer(path: str, module: Any) -> TunerLayerStatus:
    grads: dict[str, bool | Irregular] = {}
    devices: dict[str, list[str]] = {}
    adapted = isinstance(module, AdaptedLayer)
    for adapter in sorted(module.adapters()):
        if adapted:
            a = module.attached[adapter]
            tensors = [(a.tensor(n), leaf.trainable) for n, leaf in a.leaves.items()]
        else:
            tensors = [(p, p.is_floating_point()) for p in module.modules_to_save[adapter].parameters()]
        grads[adapter] = _one([t.requires_grad for t, trainable in tensors if trainable] or [False])
        devices[adapter] = sorted({t.device.type for t, _ in tensors})
    return TunerLayerStatus(
        name=path,
        module_type=_type(module),
        enabled=not module.disable_adapters,
        active_adapters=list(module.active_adapters),
        merged_adapters=list(module.merged_adapters) if adapted else [],
        requires_grad=grads,
        available_adapters=sorted(module.adapters()),
        devices=devices,
        quantization_backend=module.site.codec.name if adapted else None,
    )


def _type(module: Any) -> str:
    if not isinstance(module, AdaptedLayer):
        return type(module).__name__
    kind = type(module.get_base_layer()).__name__
    first = next(iter(module.attached.values()), None)
    return kind if first is None else f"{str(getattr(first.config.peft_type, 'value', first.config.peft_type)).lower()}.{kind}"


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Irregular:
    """Merged adapters, each expected on the layers that have it; modules trained whole are never merged into anything."""
    merged: list[str] = max((s.merged_adapters for s in layers), key=len)
    for s in layers:
        if s.module_type != "ModulesToSaveWrapper" and {m for m in merged if m in s.available_adapters} != set(s.merged_adapters):
            return "irregular"
    return merged
