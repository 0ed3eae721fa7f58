"""The object between a PeftModel and the user's model: it holds the adapters' configs and acts on all layers at once."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .checkpoint.experts import load_experts
from .checkpoint.keys import slots as file_slots
from .config import PeftConfig
from .engine import inject, merge
from .engine.combine import CombineReport, combine
from .engine.holders import Attached, drop, slots
from .engine.layer import adapted_layers
from .engine.loss import MergeReport
from .engine.merge_packed import Into
from .engine.modules import Part, drop_parts
from .engine.original import Original
from .engine.parts import Recipe
from .engine.route import check_known, find_switch, the_switch
from .engine.steps import ask
from .engine.wrapper import warn_of_heir
from .errors import ConfigError
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
        parts: whole modules of an adapter's own, by adapter.

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
        self.parts: dict[str, list[Part]] = {}
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
        first = bool(config.experts()) and find_switch(self.model) is None
        experts = load_experts(self, config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype)
        try:
            plan = inject.attach(
                self.model, config, adapter_name,
                low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=autocast_adapter_dtype, state_dict=state_dict,
                empty=empty, home=self,
            )  # fmt: skip
        except BaseException:
            self.take_off(experts, first)
            raise
        self.peft_config[adapter_name] = config
        if first and experts:  # they came before it, and so would act
            inject.set_adapter(self.model, adapter_name, config.inference_mode)
        trains = adapter_name in self.active_adapters and not config.inference_mode
        self._train_outside(adapter_name, trains)
        if trains:
            inject.mark_trainable(self.model, self._along([adapter_name]))
        return plan

    def take_off(self, names: Sequence[str], last: bool) -> None:
        """Take off adapters that have just been put on; `last`: the model has no others."""
        for name in names:
            del self.peft_config[name]
            if not last:
                inject.detach(self.model, name)
        if names and last:
            inject.unload(self.model)

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

    @property
    def targeted_module_names(self) -> list[str]:
        """The modules that are adapted, by their names in the user's model, without those of which single parameters are."""
        return [layer.name for path, layer in adapted_layers(self.model) if layer.site.kind != "parameter" and ".token_adapter" not in path]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The parameters that are adapted one by one (target_parameters), by their names in the user's model."""
        found = (layer for _, layer in adapted_layers(self.model) if layer.site.kind == "parameter")
        return [f"{layer.name}.{layer.weight_site.weight_key}" for layer in found]

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
        if not inference_mode:
            inject.mark_trainable(self.model, self._along(names))

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these adapters' tensors get gradients, or not.

        Raises:
            RouteError: for a name that is not there.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_known(names, list(self.peft_config))
        inject.mark_trainable(self.model, [*names, *self._along(names)], requires_grad)
        for name in names:
            self._train_outside(name, requires_grad)

    def _along(self, names: Sequence[str]) -> list[str]:
        """Other adapters that train with these."""
        return [n for name in names for n in self.peft_config[name].along() if n in self.peft_config]

    def _train_outside(self, adapter_name: str, requires_grad: bool) -> None:
        """What an adapter trains outside its layers: tensors that they share, modules of its own, and biases of the model."""
        for part in self.parts.get(adapter_name, ()):
            part.set_requires_grad(requires_grad)
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

    def modules_of(self, adapter_name: str) -> dict[str, nn.Module]:
        """The adapter's own modules, by their names in the file."""
        return {part.name: part.module for part in self.parts.get(adapter_name, ())}

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
        drop_parts(self, adapter_name, self.parts.pop(adapter_name, []))
        del self.peft_config[adapter_name]
        if adapter_name in before and not set(left) <= set(before):
            warn_of_heir(adapter_name, left[0], stacklevel=4)
            self.set_requires_grad(left, not self.peft_config[left[0]].inference_mode)

    # ---------------------------------------------------------------- merging

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        *,
        onto: Literal["dequantised", "original"] = "dequantised",
        store: Literal["dense", "quantised"] | None = None,
        original: Original | None = None,
    ) -> MergeReport:
        """Merge these (or the active) adapters into the weights; `unmerge_adapter` undoes it bit for bit. Returns what rounding lost.

        Args:
            safe_merge: taken for PEFT's sake; a merge is checked as a whole before any weight changes, always.
            onto: of quantised layers: "dequantised", the weights that the adapters were trained on, or "original", those from before.
            store: of quantised layers: "dense" (the default), as torch's own layers, or "quantised", packed again in the same way.
            original: for onto="original", where those weights are: a folder or file of safetensors, a state dict or the unquantised model; if not
                given, where the model was loaded from.

        Raises:
            MergeError: if a layer cannot be merged or would hold values that are not finite; the model is as it was.
            LoadError: if the original weights are not found, or do not fit.
        """
        return merge.merge(self.model, adapter_names, safe_merge=safe_merge, into=Into(onto, store, original))

    def unmerge_adapter(self) -> None:
        """Put the frozen weights back, bit for bit."""
        merge.unmerge(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        onto: Literal["dequantised", "original"] = "dequantised",
        store: Literal["dense", "quantised"] | None = None,
        original: Original | None = None,
    ) -> nn.Module:
        """Merge for good and return the user's model without wrappers. Arguments and errors as in `merge_adapter`."""
        into = Into(onto, store, original)
        return merge.merge_and_unload(self.model, adapter_names, safe_merge=safe_merge, progressbar=progressbar, into=into)

    def unload(self) -> nn.Module:
        """The user's model as it was, without adapters."""
        return inject.unload(self.model)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: float | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
        *,
        seed: int = 0,
    ) -> CombineReport:
        """Make one adapter that does what several do together, each times its weight. It acts once `set_adapter` says so.

        For LoRA (every start and variant; the result is a plain LoRA, of DoRA a DoRA), ΔW = Σ w ΔW_i with

        - "cat": exactly; the ranks add up.  "exact": exactly, at the least rank that loses nothing in float32.
        - "svd": cut to `svd_rank`, the nearest there is. Two thin QR decompositions, never a dense ΔW.
        - "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd": ΔW_i pruned to `density` first (TIES: arXiv:2306.01708,
          DARE: arXiv:2311.03099), then as "svd".
        - "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune": PEFT's, on A and B each by itself. What comes out is not Σ w ΔW_i but has
          cross terms of every A with every B; it needs equal ranks. The report says how far it is off.

        Other methods whose adapters add up to one of their own kind (IA3, VeRA, FourierFT, …) do so whichever of the plain sums is asked for. In a mixed
        model adapters of any methods with a ΔW become a LoRA ("svd" with `svd_rank`, or "exact").

        Args:
            adapters, weights: which, and how much of each; weights may be negative.
            adapter_name: of the new one.
            svd_rank: an int: the rank of every layer; a float in (0, 1]: the least rank with that share of the squared singular values; None: the largest
                of the adapters'.
            svd_clamp: cut the entries of both factors off at this quantile of them and their negatives (PEFT's quantile depends on the signs that the
                SVD happens to give).
            svd_full_matrices: taken for PEFT's sake; it never mattered to the result.
            svd_driver: of torch.linalg.svd on CUDA.
            density: the share of entries that pruning keeps.
            majority_sign_method: how TIES counts votes: "total" by the sum, "frequency" by heads.
            seed: of DARE's choices.

        Returns:
            by layer, the rank and ‖lost‖ / ‖ΔW‖. Above a tenth a warning says so.

        Raises:
            RouteError: for an adapter that is not there.
            ConfigError: if the name is taken, the adapters cannot be combined so, or two of them train the same module whole.
        """
        if adapter_name in self.peft_config:
            raise ConfigError(
                f"There is already an adapter {adapter_name!r}. Choose another name, or delete_adapter({adapter_name!r}) first."
            )
        adapters = list(adapters)
        if not adapters or len(adapters) != len(weights) or len(set(adapters)) < len(adapters):
            raise ConfigError(f"Give adapters, each once, and a weight for each; got {adapters} and {list(weights)}.")
        check_known(adapters, list(self.peft_config))
        kind = "cat" if len(adapters) == 1 and combination_type in ("linear", "svd", "cat") else combination_type
        recipe = Recipe(
            kind, svd_rank, svd_clamp, svd_driver, density, majority_sign_method, torch.Generator().manual_seed(seed),
            padded=kind != "exact",
        )  # fmt: skip
        made = combine(self.model, self.peft_config, dict(zip(adapters, weights, strict=True)), recipe, self._combining(adapters))
        self.inject(made.config, adapter_name, empty=True)
        made.fill(adapter_name)
        self.set_requires_grad(adapter_name, False)
        made.report.warn(
            "combination_type='cat' or 'exact' loses nothing, 'svd' as little as the rank allows."
            if kind in ("linear", "svd")
            else "Raise `svd_rank`."
        )
        return made.report

    def _combining(self, adapters: Sequence[str]) -> Method | None:
        """What the combination of these adapters is to be like; None: the first of them."""
        return None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter's change of every layer is a ΔW, which LoRA can approximate; False for one that is not there."""
        config = self.peft_config.get(adapter_name)
        return config is not None and config.has_delta()

    # ---------------------------------------------------------------- the rest

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's config as a dict; a dummy where it has none."""
        config = getattr(model, "config", {"model_type": "custom"})
        return config.to_dict() if hasattr(config, "to_dict") else dict(config) if isinstance(config, Mapping) else vars(config)

    def adapter_slots(self, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """Checkpoint slots of the tensors that all layers share, and of the adapter's modules."""
        if adapter in self.shared:
            yield from slots(self, adapter, self.shared[adapter], False)
        for part in self.parts.get(adapter, ()):
            yield from part.slots(adapter)

    # ---------------------------------------------------------------- what methods add

    def ask_training(self, name: str, *args: Any) -> None:
        """Call `name(sites, *args)` of the config of every adapter that trains."""
        ask(the_switch(self.model), name, *args)

    def ask_acting(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Call `path` of the config of the adapter that acts, of the first that has one."""
        head = path.partition(".")[0]
        config = next(c for n in (*self.active_adapters, *self.peft_config) if hasattr(c := self.peft_config[n], head))
        return operator.attrgetter(path)(config)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "model" not in self._modules:  # a copy being made has no modules yet
                raise
            return getattr(self._modules["model"], name)


class MixedModel(Tuner):
    """Adapters of several methods on one model; what the tuner of any of them has, it has."""

    def _combining(self, adapters: Sequence[str]) -> Method | None:
        configs = [self.peft_config[n] for n in adapters]
        if len({type(c).__name__ for c in configs}) == 1 and (configs[0].linear_in or type(configs[0]).combine is not Method.combine):
            return None
        like: Any = config_class("LORA")
        return like(task_type=configs[0].task_type, inference_mode=configs[0].inference_mode)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        for config in self.__dict__.get("peft_config", {}).values():
            if name in config.tuner_methods:
                return functools.partial(config.tuner_methods[name], self)
        return super().__getattr__(name)


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
    own = {"prefix": prefix, "__module__": __name__, "__doc__": f"The tuner of {config.__name__}."}
    return type(name, (Tuner,), {**own, **getattr(config, "tuner_methods", {})})


def __getattr__(name: str) -> Any:
    """Tuner classes by name: `veneer.tuner.LoraModel`. Pickled models look for theirs here."""
    if name.endswith("Model"):
        from .method import load_methods

        for peft_type in load_methods():
            if tuner_class(peft_type).__name__ == name:
                return tuner_class(peft_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
