"""The object between a PeftModel and the user's model: it holds the adapters' configs and acts on all layers at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .config import PeftConfig
from .engine import inject, merge
from .engine.holders import Attached, drop, slots
from .engine.merge import MergeReport
from .method import Method, config_class

_CLASS_NAMES = {"LORA": "LoraModel", "IA3": "IA3Model", "LN_TUNING": "LNTuningModel", "VERA": "VeraModel", "OSF": "OSFModel"}


class Tuner(nn.Module):
    """Adapters of one method (or, in a mixed model, of several) on the user's model, which is changed in place.

    Attributes:
        model: the user's model.
        peft_config: the adapters' configs, by name.
        shared: tensors that all layers of an adapter share, by adapter.
    """

    prefix: ClassVar[str] = ""

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        empty: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.shared: dict[str, Attached] = {}
        self.peft_config: dict[str, Any] = {}
        for name, config in (peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}).items():
            self.inject(config, name, low_cpu_mem_usage, state_dict, autocast_adapter_dtype, empty)
        self.training = model.training

    def inject(
        self,
        config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        autocast_adapter_dtype: bool = True,
        empty: bool = False,
    ) -> inject.Plan:
        """Attach one more adapter."""
        plan = inject.attach(
            self.model, config, adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=autocast_adapter_dtype, state_dict=state_dict, empty=empty, home=self,
        )  # fmt: skip
        self.peft_config[adapter_name] = config
        return plan

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Attach the adapter whose config has been put into `peft_config` under this name."""
        self.inject(self.peft_config[adapter_name], adapter_name, low_cpu_mem_usage, state_dict, autocast_adapter_dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    # ---------------------------------------------------------------- which adapters act

    @property
    def active_adapters(self) -> list[str]:
        return inject.active_adapters(self.model)

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let one or several adapters act (their effects add up) and train; see `veneer.engine.inject.set_adapter`."""
        inject.set_adapter(self.model, adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these adapters' tensors get gradients, or not."""
        inject.mark_trainable(self.model, adapter_names, requires_grad)
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            for leaf, spec in self.shared[name].leaves.items() if name in self.shared else ():
                if spec.trainable:
                    self.shared[name].tensor(leaf).requires_grad_(requires_grad)

    def enable_adapter_layers(self) -> None:
        """Let the active adapters act again."""
        inject.enable(self.model, True)

    def disable_adapter_layers(self) -> None:
        """Let no adapter act. What trains stays what trained."""
        inject.enable(self.model, False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off and free its tensors."""
        inject.detach(self.model, adapter_name)
        if adapter_name in self.shared:
            drop(self, adapter_name, self.shared.pop(adapter_name))
        del self.peft_config[adapter_name]

    # ---------------------------------------------------------------- merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> MergeReport:
        """Merge these (or the active) adapters into the weights; `unmerge_adapter` undoes it bit for bit. Returns what rounding lost."""
        return merge.merge(self.model, adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the frozen weights back, bit for bit."""
        merge.unmerge(self.model)

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None) -> nn.Module:
        """Merge for good and return the user's model without wrappers."""
        return merge.merge_and_unload(self.model, adapter_names, safe_merge=safe_merge, progressbar=progressbar)

    def unload(self) -> nn.Module:
        """The user's model as it was, without adapters."""
        return inject.unload(self.model)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer's change has a ΔW that LoRA can approximate."""
        return all(
            layer.supports_lora_conversion(adapter_name) for _, layer in inject.adapted_layers(self.model) if adapter_name in layer.attached
        )

    # ---------------------------------------------------------------- the rest

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's config as a dict; a dummy where it has none."""
        config = getattr(model, "config", {"model_type": "custom"})
        return config.to_dict() if hasattr(config, "to_dict") else dict(config) if isinstance(config, Mapping) else vars(config)

    def adapter_slots(self, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """Checkpoint slots of the tensors that all layers share."""
        if adapter in self.shared:
            yield from slots(self, adapter, self.shared[adapter], False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "model" not in self._modules:
                raise
            return getattr(self._modules["model"], name)


@functools.cache
def tuner_class(peft_type: str) -> type[Tuner]:
    """The tuner class of a method under PEFT's name for it, such as `LoraModel`."""
    key = str(getattr(peft_type, "value", peft_type))
    config = config_class(key)
    name = _CLASS_NAMES.get(key, config.__name__.removesuffix("Config") + "Model")
    prefix = config.prefix if issubclass(config, Method) else ""
    return type(name, (Tuner,), {"prefix": prefix, "__module__": __name__, "__doc__": f"The tuner of {config.__name__}."})


def __getattr__(name: str) -> Any:
    from .method import load_methods

    for peft_type in load_methods():
        cls = tuner_class(peft_type)
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
