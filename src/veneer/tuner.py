"""The object between a PeftModel and the user's model: it holds the adapters' configs and acts on all layers at once."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .checkpoint.keys import slots as file_slots
from .config import PeftConfig
from .engine import inject, merge
from .engine.holders import Attached, drop, slots
from .engine.merge import MergeReport
from .engine.route import check_known, the_switch
from .engine.steps import ask
from .errors import PeftWarning
from .method import Method, config_class


class Tuner(nn.Module):
    """Adapters of one method (or, in a mixed model, of several) on the user's model, which is changed in place.

    Args:
        model: the user's model.
        peft_config: the first adapter's config, or several by name.
        adapter_name: the first adapter's name.
        low_cpu_mem_usage: leave the adapters' tensors on the meta device, for a file to fill.
        state_dict: take the modules to adapt from these keys instead of the config's targets.
        autocast_adapter_dtype: keep the tensors in float32 where the model is float16 or bfloat16.
        empty: do not compute start values that a file is going to replace.

    Attributes:
        model: the user's model.
        peft_config: the adapters' configs, by name.
        shared: tensors that all layers of an adapter share, by adapter.

    Raises:
        ConfigError, NoMatchingPeftModuleError: if a config does not fit the model.
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
        """Attach one more adapter; returns what that did."""
        plan = inject.attach(
            self.model, config, adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=autocast_adapter_dtype, state_dict=state_dict,
            empty=empty, home=self,
        )  # fmt: skip
        self.peft_config[adapter_name] = config
        self._train_outside(adapter_name, adapter_name in self.active_adapters and not config.inference_mode)
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
    def routes(self) -> bool:
        """Whether any adapter has to know something of each call of the model."""
        return any(c.routes for c in self.peft_config.values())

    @property
    def active_adapters(self) -> list[str]:
        return inject.active_adapters(self.model)

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let one or several adapters act (their effects add up) and train (not in inference mode).

        Merged layers are unmerged first, with a warning, unless just these adapters are merged.

        Raises:
            RouteError: for a name that is not there.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        inject.set_adapter(self.model, names, inference_mode)
        for name in self.peft_config:
            self._train_outside(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these adapters' tensors get gradients, or not.

        Raises:
            RouteError: for a name that is not there.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_known(names, list(self.peft_config))
        inject.mark_trainable(self.model, names, requires_grad)
        for name in names:
            self._train_outside(name, requires_grad)

    def _train_outside(self, adapter_name: str, requires_grad: bool) -> None:
        """What an adapter trains outside its layers: tensors that they share, and biases of the model."""
        shared = self.shared.get(adapter_name)
        if shared is not None:
            for leaf, spec in shared.leaves.items():
                if spec.trainable:
                    shared.tensor(leaf).requires_grad_(requires_grad)
        config = self.peft_config[adapter_name]
        if getattr(config, "bias", "none") != "none":
            for slot in file_slots(self.model, adapter_name, config, save_embedding_layers=False).values():
                if slot.base and slot.saved and slot.attribute == "bias":
                    slot.tensor.requires_grad_(requires_grad)

    def enable_adapter_layers(self) -> None:
        """Let the active adapters act again."""
        inject.enable(self.model, True)

    def disable_adapter_layers(self) -> None:
        """Let no adapter act. What trains stays what trained."""
        inject.enable(self.model, False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off and free its tensors. If no other one acted, the first that is left does, and trains, with a warning.

        Raises:
            RouteError: if there is no adapter of that name.
        """
        check_known([adapter_name], list(self.peft_config))
        before = self.active_adapters
        self._train_outside(adapter_name, False)
        left = inject.detach(self.model, adapter_name)
        if adapter_name in self.shared:
            drop(self, adapter_name, self.shared.pop(adapter_name))
        del self.peft_config[adapter_name]
        if adapter_name in before and not set(left) <= set(before):
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.", PeftWarning, stacklevel=3
            )
            self.set_requires_grad(left, not self.peft_config[left[0]].inference_mode)

    # ---------------------------------------------------------------- merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> MergeReport:
        """Merge these (or the active) adapters into the weights; `unmerge_adapter` undoes it bit for bit. Returns what rounding lost.

        Args:
            safe_merge: taken for PEFT's sake; a merge is checked as a whole before any weight changes, always.

        Raises:
            MergeError: if a layer cannot be merged or would hold values that are not finite; the model is as it was.
        """
        return merge.merge(self.model, adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the frozen weights back, bit for bit."""
        merge.unmerge(self.model)

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None) -> nn.Module:
        """Merge for good and return the user's model without wrappers. Arguments and errors as in `merge_adapter`."""
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
            if name == "model" or "model" not in self._modules:  # a copy being made has no modules yet
                raise
            return getattr(self._modules["model"], name)


def tuner_class(peft_type: str) -> type[Tuner]:
    """The tuner class of a method under PEFT's name for it, such as `LoraModel`.

    Raises:
        ConfigError: if there is no such method; names the nearest.
    """
    config: Any = config_class(peft_type)  # Any: dataclasses are unhashable, their classes are not
    return _class_for(config)


@functools.cache
def _class_for(config: Any) -> type[Tuner]:
    prefix = config.prefix if issubclass(config, Method) else ""
    name = config.__name__.removesuffix("Config") + "Model"
    offered = {n: _offered(n) for n in getattr(config, "offers", ())}
    own = {"prefix": prefix, "__module__": __name__, "__doc__": f"The tuner of {config.__name__}."}
    return type(name, (Tuner,), {**own, **offered, **getattr(config, "tuner_methods", {})})


def _offered(name: str) -> Any:
    def call(self: Tuner, *args: Any) -> None:
        ask(the_switch(self.model), name, *args)

    call.__name__, call.__doc__ = name, f"Call `{name}` of every adapter that trains; see its config."
    return call


def __getattr__(name: str) -> Any:
    """Tuner classes by name: `veneer.tuner.LoraModel`. Pickled models look for theirs here."""
    if name.endswith("Model"):
        from .method import load_methods

        for peft_type in load_methods():
            if tuner_class(peft_type).__name__ == name:
                return tuner_class(peft_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
