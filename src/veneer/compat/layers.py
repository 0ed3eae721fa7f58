"""The names of PEFT's layers that users test with isinstance: they match veneer's one adapted layer by what adapters it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..blocks.saved import ModulesToSaveWrapper
from ..blocks.tokens import TrainableTokensWrapper
from ..engine.layer import AdaptedLayer
from ..types import name_of
from .names import METHODS, layer_name

Test = Callable[[Any], bool]


class _Matched(type):
    """A class whose instances are told by a test. It cannot be made or inherited from: veneer makes its layers itself."""

    test: Test

    def __instancecheck__(cls, instance: object) -> bool:
        return cls.test(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return cls is subclass or (cls is BaseTunerLayer and (subclass is AdaptedLayer or isinstance(subclass, _Matched)))

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{cls.__name__} stands for layers that veneer makes: use get_peft_model or inject_adapter_in_model. A method of your own is a Method."
        )


def _matched(name: str, test: Test, doc: str, containers: tuple[str, ...] = ()) -> Any:
    return _Matched(name, (), {"test": staticmethod(test), "__doc__": doc, "__module__": __name__, "adapter_layer_names": containers})


def _adapted(instance: object) -> bool:
    return isinstance(instance, AdaptedLayer)


BaseTunerLayer: Any = _matched("BaseTunerLayer", _adapted, "A layer with adapters of any method.")
AuxiliaryTrainingWrapper: Any = _matched(
    "AuxiliaryTrainingWrapper",
    lambda m: isinstance(m, (ModulesToSaveWrapper, TrainableTokensWrapper)),
    "A module that is trained whole, or a table some of whose rows are.",
)


def _holds(*kinds: str) -> Test:
    """Whether a layer holds an adapter of one of these methods."""

    def test(m: object) -> bool:
        return isinstance(m, AdaptedLayer) and any(name_of(a.config.peft_type) in kinds for a in m.attached.values())

    return test


_is_lora = _holds("LORA", "ADALORA")  # AdaLoRA's layers are LoRA's to PEFT


def _lora_on(*kinds: str, base: tuple[str, ...] = ()) -> Test:
    """Whether a layer holds a LoRA on this kind of site."""

    def test(m: Any) -> bool:
        return _is_lora(m) and m.site.kind in kinds and (not base or isinstance(m.get_base_layer(), tuple(getattr(nn, b) for b in base)))

    return test


Linear: Any = _matched("Linear", _lora_on("linear"), "A linear layer (or transformers' Conv1D) with a LoRA.")
Embedding: Any = _matched("Embedding", _lora_on("embedding"), "An embedding with a LoRA.")
Conv1d: Any = _matched("Conv1d", _lora_on("conv", base=("Conv1d",)), "A convolution over one axis with a LoRA.")
Conv2d: Any = _matched("Conv2d", _lora_on("conv", base=("Conv2d",)), "A convolution over two axes with a LoRA.")
Conv3d: Any = _matched("Conv3d", _lora_on("conv", base=("Conv3d",)), "A convolution over three axes with a LoRA.")
MultiheadAttention: Any = _matched("MultiheadAttention", _lora_on("attention"), "torch's attention with a LoRA.")
ParamWrapper: Any = _matched("ParamWrapper", _lora_on("parameter"), "A module one of whose parameters has a LoRA.")


def _of_method(folder: str, row: str) -> tuple[str, Any]:
    config, *containers = row.split()
    name = layer_name(config)
    kinds = ("LORA", "ADALORA") if folder == "lora" else (folder.upper(),)
    return name, _matched(name, _holds(*kinds), f"A layer that holds an adapter of {config}.", tuple(containers))


globals().update(_of_method(folder, row) for folder, row in METHODS.items())


def __getattr__(name: str) -> Any:
    """PEFT's table of what the names of each method's tensors begin with."""
    if name == "PEFT_TYPE_TO_PREFIX_MAPPING":
        from ..mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        return {
            kind: getattr(config, "prefix", "") or f"{str(getattr(kind, 'value', kind)).lower()}_"
            for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        }
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
