"""`PeftModel`: a model with adapters, under PEFT's names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from .checkpoint import LoadReport, folder_of, load_into, read_adapter, save_adapter, update_card
from .config import PeftConfig
from .engine import inject
from .engine.route import disabled, find_switch, mixed, using
from .errors import PeftError, hint
from .tuner import Tuner, tuner_class

_HUB = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies", "user_agent", "repo_type")


class PeftModel(nn.Module):
    """The user's model with adapters. The model is changed in place; its own attributes are reached through this one.

    Args:
        model: the user's model, any nn.Module.
        peft_config: the adapter's config.
        adapter_name: its name.
        autocast_adapter_dtype: keep the adapter in float32 where the model is float16 or bfloat16.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device, for a file to fill.

    Attributes:
        base_model: the tuner, whose `model` is the user's model.

    Raises:
        ConfigError, NoMatchingPeftModuleError: if the config does not fit the model, which is then as it was.
    """

    base_model: Tuner

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        empty: bool = False,
    ) -> None:
        super().__init__()
        _refuse_wrapped(model)
        self._name_base(model, peft_config)
        self.base_model = tuner_class(_type_name(peft_config))(
            model, peft_config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype=autocast_adapter_dtype, empty=empty
        )
        self.peft_type = peft_config.peft_type
        self.config = getattr(model, "config", {"model_type": "custom"})
        self.training = model.training
        if getattr(model, "is_gradient_checkpointing", True):
            self.prepare_model_for_gradient_checkpointing(model)
        if hasattr(model, "config") and hasattr(model.config, "pretraining_tp"):
            model.config.pretraining_tp = 1  # split projections would read adapted weights directly

    @staticmethod
    def _name_base(model: nn.Module, config: PeftConfig) -> None:
        inner = getattr(model, "config", None)
        name = getattr(model, "name_or_path", None) or (
            inner.get("_name_or_path") if isinstance(inner, Mapping) else getattr(inner, "_name_or_path", None)
        )
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = name or getattr(model, "name_or_path", None)

    # ---------------------------------------------------------------- what is there

    @property
    def peft_config(self) -> dict[str, Any]:
        return self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self.base_model.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self.base_model.active_adapter

    @property
    def active_peft_config(self) -> Any:
        return self.peft_config[self.active_adapters[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {n for c in self.peft_config.values() for n in getattr(c, "modules_to_save", None) or ()}
        return names or None

    @property
    def has_active_enabled_adapter(self) -> bool:
        switch = find_switch(self.get_base_model())
        return switch is not None and switch.chosen().enabled and bool(self.active_adapters)

    @property
    def base_model_torch_dtype(self) -> Any:
        return getattr(self.get_base_model(), "dtype", None)

    def get_base_model(self) -> nn.Module:
        """The user's model, with the adapters in it."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(numbers that train, all numbers); packed weights count as the numbers they hold."""
        from .status import count_parameters

        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    def get_layer_status(self) -> Any:
        """A list of `TunerLayerStatus`, one per adapted layer."""
        from .status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> Any:
        """A `TunerModelStatus` of the whole model."""
        from .status import get_model_status

        return get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter can be turned into a LoRA."""
        return self.base_model.supports_lora_conversion(adapter_name)

    # ---------------------------------------------------------------- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._routed(kwargs):
            return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The user's model's generate; with `adapter_names`, one per row of the batch."""
        model: Any = self.get_base_model()
        with self._routed(kwargs, beams=True):
            return model.generate(*args, **kwargs)

    def _routed(self, kwargs: dict[str, Any], beams: bool = False) -> AbstractContextManager[None]:
        """Take `adapter_names` out of the arguments and let it decide."""
        rows: Sequence[str] | None = kwargs.pop("adapter_names", None)
        if rows is None:
            return nullcontext()
        if not beams:
            return mixed(self.get_base_model(), rows)
        return self._beams(list(rows), _beam_count(self.get_base_model(), kwargs))

    @contextmanager
    def _beams(self, rows: list[str], count: int) -> Iterator[None]:
        model: Any = self.get_base_model()
        if count == 1:
            with mixed(model, rows):
                yield
            return
        wide = [r for r in rows for _ in range(count)]
        encoder = model.get_encoder() if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
        if encoder is None:
            with mixed(model, wide):
                yield
            return
        # the encoder sees each row once, the decoder once per beam
        inner = encoder.forward

        def narrow(*a: Any, **k: Any) -> Any:
            with mixed(model, rows):
                return inner(*a, **k)

        encoder.forward = narrow
        try:
            with mixed(model, wide):
                yield
        finally:
            del encoder.forward

    def using(self, names: str | Sequence[str]) -> AbstractContextManager[None]:
        """Let these adapters act for the code inside, in this thread only. The safe way to choose per call."""
        return using(self.get_base_model(), names)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Let no adapter act for the code inside, in this thread only. What trains, and what is merged, stays so."""
        with disabled(self.get_base_model()):
            yield

    # ---------------------------------------------------------------- changing adapters

    def _known(self, name: str) -> None:
        if name not in self.peft_config:
            raise ValueError(f"Adapter {name} not found. The model has {sorted(self.peft_config)}.{hint(name, self.peft_config)}")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let this adapter (or these, their effects added up) act, and train (not in inference mode)."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._known(name)
        self.base_model.set_adapter(names, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these adapters' tensors get gradients, or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        empty: bool = False,
    ) -> None:
        """Attach one more adapter, of the same method. It acts once `set_adapter` says so.

        Raises:
            ValueError: if the name is taken, or the method is another.
        """
        if adapter_name in self.peft_config:
            raise ValueError(
                f"There is already an adapter {adapter_name!r}. Choose another name, or delete_adapter({adapter_name!r}) first."
            )
        self._check_new_adapter_config(peft_config)
        self._name_base(self.get_base_model(), peft_config)
        self.base_model.inject(peft_config, adapter_name, low_cpu_mem_usage, None, autocast_adapter_dtype, empty)

    def _check_new_adapter_config(self, peft_config: PeftConfig, is_trainable: bool = True) -> None:
        if _type_name(peft_config) != _type_name(self):
            raise ValueError(
                f"Cannot combine adapters with different peft types. Found {_type_name(self)} and {_type_name(peft_config)}. "
                "A mixed model (get_peft_model(..., mixed=True)) takes several."
            )
        biased = [n for n, c in self.peft_config.items() if getattr(c, "bias", "none") != "none"]
        if getattr(peft_config, "bias", "none") != "none" and biased:
            raise ValueError(
                f"{type(self.base_model).__name__} supports only 1 adapter with bias. {biased[0]!r} trains biases already; set bias to 'none'."
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off and free its tensors. If it acted, what is left of the active ones acts, else the first that is left.

        Raises:
            ValueError: if there is none of that name, or it is merged.
        """
        self._known(adapter_name)
        merged = [p for p, layer in inject.adapted_layers(self.get_base_model()) if adapter_name in layer.merged_adapters]
        if merged:
            raise ValueError(
                f"The adapter {adapter_name!r} is merged (into {merged[0]!r} and others). Call unmerge_adapter() before deleting it."
            )
        self.base_model.delete_adapter(adapter_name)

    # ---------------------------------------------------------------- files

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """A model with the adapter that a folder (or the Hub) holds.

        Args:
            is_trainable: whether it is to be trained on; else it is frozen and in eval mode.
            config: takes the place of the folder's.
            key_mapping: regular expression -> text, for the names of another version of the model.
            kwargs: `subfolder, revision, cache_dir, token, ...`.

        Raises:
            LoadError: unless every tensor of the file finds its place and every place its tensor. The model is as it was then.
        """
        from .tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        hub = {k: kwargs[k] for k in _HUB if k in kwargs}
        if config is None:
            config = PeftConfig.from_pretrained(model_id, **hub)
        elif not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {type(config)}")
        if ephemeral_gpu_offload and hasattr(config, "runtime_config"):
            config.runtime_config.ephemeral_gpu_offload = True
        if config.is_prompt_learning and is_trainable:
            raise ValueError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")
        config.inference_mode = not is_trainable
        file = read_adapter(
            model_id, device="cpu", key_mapping=key_mapping or getattr(model, "_checkpoint_conversion_mapping", None), **hub
        )
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(getattr(config.task_type, "value", config.task_type)), cls)
        out = kind(
            model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage, empty=True
        )
        try:
            load_into(out, adapter_name, file, config, upcast=is_trainable and autocast_adapter_dtype)
        except BaseException:
            inject.unload(model)
            raise
        if not is_trainable:
            out.eval()
            out.base_model.set_requires_grad(adapter_name, False)
        return out

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> LoadReport:
        """Load a further adapter, or new values into one that is there. Arguments and errors as in `from_pretrained`."""
        hub = {k: kwargs[k] for k in _HUB if k in kwargs}
        new = adapter_name not in self.peft_config
        if new:
            config = PeftConfig.from_pretrained(model_id, **hub)
            config.inference_mode = not is_trainable
            if config.is_prompt_learning and is_trainable:
                raise ValueError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")
        mapping = key_mapping or getattr(self.get_base_model(), "_checkpoint_conversion_mapping", None)
        file = read_adapter(model_id, device=torch_device or "cpu", key_mapping=mapping, **hub)
        if new:
            self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype, empty=True)
        try:
            report = load_into(self, adapter_name, file, upcast=is_trainable and autocast_adapter_dtype)
        except BaseException:
            if new:
                self.base_model.delete_adapter(adapter_name)
            raise
        if not is_trainable:
            self.eval()
            self.base_model.set_requires_grad(adapter_name, False)
        return report

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        verify: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the adapters: `default` into the folder itself, any other into a folder of its own name in it.

        Args:
            selected_adapters: only these.
            path_initial_model_for_weight_conversion: write an adapter whose change is counted from its start (PiSSA and the like) as a plain
                LoRA of twice the rank; any value that is not None or empty will do, the start is known.
            verify: read the files again and compare.

        Raises:
            SaveError: rather than writing anything empty, partial or not finite.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        unknown = [n for n in names if n not in self.peft_config]
        if unknown:
            raise ValueError(
                f"You passed an invalid `selected_adapters` arguments, current supported adapter names are {list(self.peft_config)} - got {unknown}."
            )
        for name in names:
            config = self.peft_config[name]
            if config.task_type is None:
                config.auto_mapping = self._mapping_of_base()
            folder = folder_of(save_directory, name)
            if path_initial_model_for_weight_conversion:
                from .checkpoint.expand import save_expanded

                save_expanded(self, config, name, folder)
                continue
            save_adapter(
                self, config, name, folder,
                safe_serialization=safe_serialization, state_dict=state_dict, save_embedding_layers=save_embedding_layers, verify=verify,
                is_main_process=is_main_process,
            )  # fmt: skip
        if is_main_process:
            self.create_or_update_model_card(os.fspath(save_directory))

    def _mapping_of_base(self) -> dict[str, str]:
        cls = type(self.get_base_model())
        return {"base_model_class": cls.__name__, "parent_library": cls.__module__}

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write the README.md beside the adapter, keeping what a user has written in it."""
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        first = next(iter(self.peft_config.values()))
        update_card(output_dir, base_model=first.base_model_name_or_path)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save into a temporary folder and upload it to the Hub (needs huggingface_hub)."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=kwargs.pop("token", None))
        api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **{k: v for k, v in kwargs.items() if k in ("safe_serialization", "selected_adapters")})
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=kwargs.get("commit_message") or "Upload model",
                revision=kwargs.get("revision"),
            )

    # ---------------------------------------------------------------- training aids

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Let the embeddings' output require gradients, so that checkpointed layers pass them on although the embeddings are frozen."""
        if (
            getattr(model, "is_loaded_in_8bit", False)
            or getattr(model, "is_loaded_in_4bit", False)
            or getattr(model, "is_quantized", False)
        ):
            return model
        if hasattr(model, "enable_input_require_grads"):
            try:
                model.enable_input_require_grads()
            except NotImplementedError:
                return model  # the model names no embeddings
        elif hasattr(model, "get_input_embeddings") and model.get_input_embeddings() is not None:
            model.get_input_embeddings().register_forward_hook(_require_grad)
        return model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "base_model" not in self._modules:
                raise
            return getattr(self._modules["base_model"], name)


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def _type_name(holder: Any) -> str:
    return str(getattr(holder.peft_type, "value", holder.peft_type))


def _beam_count(model: Any, kwargs: Mapping[str, Any]) -> int:
    given = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", None)
    return int(given or getattr(getattr(model, "generation_config", None), "num_beams", None) or 1)


def _refuse_wrapped(model: nn.Module) -> None:
    if isinstance(model, (PeftModel, Tuner)):
        raise PeftError(
            "The model is a PeftModel already. Call model.add_adapter(name, config) for a further adapter, or unload() to start anew."
        )
    if find_switch(model) is not None:
        raise PeftError(
            "The model holds adapters already (from get_peft_model or inject_adapter_in_model). Use add_adapter on the PeftModel that was returned then, "
            "or take them off first with its unload()."
        )


__all__ = ["PeftModel"]
