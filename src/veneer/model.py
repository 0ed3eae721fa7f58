"""`PeftModel`: a model with adapters, under PEFT's names.

Long, since PEFT's class has all of it: what users call, with its arguments and what they mean. What it does stands in tuner, engine and checkpoint.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .checkpoint import LoadReport, folder_of, load_into, read_adapter, save_adapter, update_card
from .checkpoint.hub import upload
from .checkpoint.load import as_made, checks_in, for_loading, hub_options, warn_unused
from .config import PeftConfig
from .engine import inject
from .engine.calls import by_name, hold, knowing, knowing_each, routing, taken
from .engine.layer import adapted_layers
from .engine.route import disabled, find_switch, mixed, the_switch, using
from .engine.rows import asked, expanded, named_rows, rows_per_prompt
from .errors import PeftError, PeftWarning, hint
from .prompts.base import Prompt
from .prompts.prompts import Prompts
from .prompts.shape import embedding_table
from .trainers import introduce
from .tuner import Tuner, tuner_class
from .types import name_of

if TYPE_CHECKING:
    from .status import TunerLayerStatus, TunerModelStatus


class PeftModel(nn.Module):
    """The user's model with adapters. The model is changed in place; its own attributes are reached through this one.

    Args:
        model: the user's model, any nn.Module.
        peft_config: the adapter's config; it is kept, not copied.
        adapter_name: its name.
        autocast_adapter_dtype: keep the adapter in float32 where the model is float16 or bfloat16.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device, for a file to fill.
        empty: do not compute start values, since a file is about to fill all of them.

    Attributes:
        base_model: the tuner, whose `model` is the user's model; with prompts, as in PEFT, the user's model itself.
        prompt_encoder: the prompts by adapter, where there are any.

    Raises:
        ConfigError, NoMatchingPeftModuleError: if the config does not fit the model, which is then as it was.
        PeftError: if the model has adapters already.
    """

    base_model: Any  # Any: a Tuner or the user's model
    heads: ClassVar[tuple[str, ...]] = ()  # of the task: always trained whole
    _hf_peft_config_loaded: ClassVar[bool] = True  # tells transformers' Trainer that a quantised model has adapters to train

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
        introduce(PeftModel)
        self._prepare(model, peft_config)
        if isinstance(peft_config, Prompt):
            prompts = Prompts(model, peft_config, adapter_name, empty=empty)
            self.base_model, self.prompt_encoder = model, prompts
        else:
            self.base_model = self._tuner_class(peft_config)(
                model, peft_config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype=autocast_adapter_dtype, empty=empty
            )
        self.peft_type = peft_config.peft_type
        self.training = model.training
        if not empty:
            self._settle()

    @staticmethod
    def _tuner_class(config: PeftConfig) -> type[Tuner]:
        return tuner_class(name_of(config.peft_type))

    @classmethod
    def _class_for(cls, config: PeftConfig) -> type[PeftModel]:
        """The class of a model with such an adapter."""
        from .tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(name_of(config.task_type), cls)

    def _prepare(self, model: nn.Module, config: PeftConfig) -> None:
        """Put into a new adapter's config what the model and the task tell."""
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = _name_of(model)
        if self.heads and hasattr(config, "modules_to_save"):
            mine = list(config.modules_to_save or ())
            config.modules_to_save = mine + [n for n in self.heads if n not in mine]
        elif self.heads and not config.inference_mode:
            warnings.warn(
                f"{type(config).__name__} has no modules_to_save: the model's head stays frozen. If it is new, train it first.",
                PeftWarning, stacklevel=4,
            )  # fmt: skip

    def _settle(self) -> None:
        """What a model with adapters needs beside them."""
        model: Any = self.get_base_model()
        flag = "is_activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else "is_gradient_checkpointing"
        if getattr(model, flag, True):  # where nothing tells, it may be switched on at any time
            self.prepare_model_for_gradient_checkpointing(model)
        if hasattr(getattr(model, "config", None), "pretraining_tp"):
            model.config.pretraining_tp = 1  # split projections would read the weights past the adapters

    @property
    def _prompts(self) -> Prompts | None:
        found = self._modules.get("prompt_encoder")
        return found if isinstance(found, Prompts) else None

    @property
    def _tuner(self) -> Tuner | Prompts:
        """What holds the adapters: a Tuner, or the prompts."""
        tuner: Tuner = self.base_model
        return tuner if self._prompts is None else self._prompts

    # ---------------------------------------------------------------- what is there

    @property
    def peft_config(self) -> dict[str, Any]:
        return self._tuner.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self._tuner.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        return self._tuner.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> Any:
        return self.peft_config[self.active_adapters[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {n for c in self.peft_config.values() for n in getattr(c, "modules_to_save", None) or ()}
        return names or None

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model's forward takes arguments for its loss, such as `num_items_in_batch`: transformers' Trainer asks this, and goes by the
        signature of `forward` otherwise, which here takes anything."""
        model: Any = self.get_base_model()
        said = getattr(model, "accepts_loss_kwargs", None)
        if said is not None:
            return bool(said)
        return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())

    @property
    def has_active_enabled_adapter(self) -> bool:
        switch = find_switch(self)
        return switch is not None and switch.chosen().enabled and bool(self.active_adapters)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.get_base_model(), "dtype", None)

    def get_base_model(self) -> nn.Module:
        """The user's model, with the adapters in it."""
        model: nn.Module = self.base_model.model if self._prompts is None else self.base_model
        return model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(numbers that train, all numbers); packed weights count as the numbers they hold."""
        from .status import count_parameters

        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """One report per adapted layer; see `veneer.get_layer_status`."""
        from .status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """One report of the whole model; see `veneer.get_model_status`."""
        from .status import get_model_status

        return get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter can be turned into a LoRA."""
        return self._tuner.supports_lora_conversion(adapter_name)

    # ---------------------------------------------------------------- prompts

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """By adapter, the numbers of its prompt's rows."""
        return {name: torch.arange(c.rows) for name, c in self.peft_config.items() if isinstance(c, Prompt)}

    @property
    def word_embeddings(self) -> nn.Module | None:
        """The module that turns token ids into embeddings."""
        return embedding_table(self.get_base_model())

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """The prompt that acts: embeddings (batch, rows, width), or a cache with its keys and values.

        Args:
            task_ids: (batch,), for multitask prompt tuning.
            max_cache_len: taken for PEFT's sake; the cache grows.

        Raises:
            PeftError: if the adapters are no prompts.
        """
        return self._known_prompts().get_prompt(batch_size, task_ids)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """What an adapter's file has as `prompt_embeddings`, on the CPU."""
        return self._known_prompts().to_save(adapter_name)

    def _known_prompts(self) -> Prompts:
        if self._prompts is None:
            raise PeftError(f"{name_of(self.peft_type)} adapters are no prompts.")
        return self._prompts

    # ---------------------------------------------------------------- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The user's model's forward. `adapter_names`: one per row of the batch, `"__base__"` for none.

        Raises:
            RouteError: before anything runs, for an unknown name or a wrong number of names.
        """
        rows = named_rows(args, kwargs)
        with nullcontext() if rows is None else mixed(self, rows):
            model = self.get_base_model()
            if self._prompts is not None:
                return self._prompts.run(model, args, kwargs)
            if not self.base_model.routes:
                return model(*args, **kwargs)
            given, switch = taken(self.peft_config, kwargs), the_switch(model)
            with knowing(switch, self.base_model, model, args, kwargs, given, {}) as finish:
                out = finish(model(*args, **kwargs))
                hold(switch, out)
                return out

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The user's model's generate; `adapter_names` as in `forward`, one per prompt, whatever the number of beams."""
        model: Any = self.get_base_model()
        rows, copies = named_rows(args, kwargs), rows_per_prompt(model, kwargs)
        if self._prompts is not None:
            with nullcontext() if rows is None else mixed(self, rows), torch.no_grad():
                args, kwargs = self._prompts.for_generate(model, args, kwargs, copies)
        routes = self._prompts is None and self.base_model.routes
        given = taken(self.peft_config, kwargs) if routes else {}
        with ExitStack() as stack:
            if rows is not None:
                stack.enter_context(expanded(self, model, rows, copies))
            if routes:
                switch = the_switch(model)
                for name in routing(self.peft_config, switch.chosen()):
                    kwargs |= self.peft_config[name].generating(functools.partial(asked, model, kwargs))
                prompt = by_name(model.generate, args, kwargs)
                stack.enter_context(knowing_each(switch, self.base_model, given, prompt))
            return model.generate(*args, **kwargs)

    def using(self, names: str | Sequence[str]) -> AbstractContextManager[None]:
        """Let these adapters act for the code inside, in this thread only; nothing of the model changes.

        Raises:
            RouteError: for a name that is not there.
        """
        return using(self, names)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Let no adapter act for the code inside, in this thread only. What trains, and what is merged, stays so."""
        with disabled(self):
            yield

    # ---------------------------------------------------------------- changing adapters

    def _known(self, name: str) -> None:
        if name not in self.peft_config:
            raise ValueError(f"Adapter {name} not found. The model has {sorted(self.peft_config)}.{hint(name, self.peft_config)}")

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let this adapter (or these, their effects added up) act, and train (not in inference mode).

        Raises:
            ValueError: for a name that is not there.
        """
        for name in (adapter_name,) if isinstance(adapter_name, str) else adapter_name:
            self._known(name)
        self._tuner.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these adapters' tensors get gradients, or not.

        Raises:
            ValueError: for a name that is not there.
        """
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            self._known(name)
        self._tuner.set_requires_grad(adapter_names, requires_grad)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        empty: bool = False,
    ) -> None:
        """Attach one more adapter, of the same method. It acts and trains once `set_adapter` says so. Arguments as of the class.

        Raises:
            ValueError: if the name is taken, or the method is another.
            ConfigError, NoMatchingPeftModuleError: if the config does not fit the model, which is then as it was.
        """
        if adapter_name in self.peft_config:
            raise ValueError(
                f"Adapter with name {adapter_name!r} already exists. Choose another, or call delete_adapter({adapter_name!r}) first."
            )
        self._check_new_adapter_config(peft_config)
        self._prepare(self.get_base_model(), peft_config)
        self._tuner.inject(peft_config, adapter_name, low_cpu_mem_usage, None, autocast_adapter_dtype, empty)

    def _check_new_adapter_config(self, peft_config: PeftConfig, is_trainable: bool = True) -> None:
        if name_of(peft_config.peft_type) != name_of(self.peft_type):
            raise ValueError(
                f"Cannot combine adapters with different peft types. Found {name_of(self.peft_type)} and {name_of(peft_config.peft_type)}. "
                "A mixed model takes both: get_peft_model(model, config, mixed=True)."
            )
        self._one_with_bias(peft_config)

    def _one_with_bias(self, peft_config: PeftConfig) -> None:
        biased = [n for n, c in self.peft_config.items() if getattr(c, "bias", "none") != "none"]
        if biased and getattr(peft_config, "bias", "none") != "none":
            raise ValueError(
                f"{type(self._tuner).__name__} supports only 1 adapter with bias. {biased[0]!r} trains biases; set bias to 'none'."
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off and free its tensors. If no other one acted, the first that is left does, and trains, with a warning.

        Raises:
            ValueError: if there is none of that name, or it is merged.
        """
        self._known(adapter_name)
        if any(adapter_name in layer.merged_adapters for _, layer in adapted_layers(self.get_base_model())):
            raise ValueError(f"Cannot delete adapter(s) [{adapter_name!r}] while they are merged. Call unmerge_adapter() first.")
        self._tuner.delete_adapter(adapter_name)

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
            model: the user's model, any nn.Module.
            model_id: the folder, or, where no such folder exists, a name on the Hub.
            adapter_name: the adapter's name in the model.
            is_trainable: whether it is to be trained on; else it is frozen and the model in eval mode.
            config: takes the place of the folder's.
            autocast_adapter_dtype: to train on, turn float16 and bfloat16 into float32. Else tensors keep the dtype they have in the file.
            ephemeral_gpu_offload: noted in the config's `runtime_config`.
            low_cpu_mem_usage: allocate the tensors only when the file's are there.
            key_mapping: regular expression -> text, for the names of another version of the model.
            kwargs: `subfolder, revision, cache_dir, token, ...`; `ignore_mismatched_sizes`: tensors whose shape differs keep their start values;
                `check_config=False`: let the config say another scaling than the one the file was saved with; `check_base`: "warn" (the default), "error" or
                "off", if it was saved with another base model than this one;
                for X-LoRA `adapters`, its experts by name, where they are not the config's. Others are not used, which a warning says.

        Raises:
            LoadError: unless every tensor of the file finds its place and every place its tensor. The model is as it was then.
            ConfigError, NoMatchingPeftModuleError: if the config does not fit the model.
            PeftError: if the model has adapters already.
        """
        experts, ignore_mismatched_sizes = kwargs.pop("adapters", None), kwargs.pop("ignore_mismatched_sizes", False)
        checks = checks_in(kwargs)
        hub = hub_options(kwargs, "from_pretrained")
        if isinstance(model, (PeftModel, Tuner)):
            raise PeftError(f"The model is a {type(model).__name__} already. Call model.load_adapter(folder, name) for a further adapter.")
        if config is None:
            config = PeftConfig.from_pretrained(model_id, **hub)
        elif not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {type(config)}")
        for_loading(config, model_id, hub, is_trainable, ephemeral_gpu_offload)
        if experts is not None:
            if not hasattr(config, "adapters"):
                raise ValueError(f"`adapters` are the experts of X-LoRA; {type(config).__name__} has none.")
            mixing: Any = config
            mixing.adapters, mixing.origin = dict(experts), None
        file = read_adapter(model_id, key_mapping=key_mapping or getattr(model, "_checkpoint_conversion_mapping", None), **hub)
        config = as_made(config, file)
        out = cls._class_for(config)(
            model,
            config,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            empty=not ignore_mismatched_sizes,
        )
        upcast = is_trainable and autocast_adapter_dtype
        try:
            load_into(out, adapter_name, file, config, upcast=upcast, ignore_mismatched_sizes=ignore_mismatched_sizes, **checks)
        except BaseException:
            inject.unload(model) if out._prompts is None else out._prompts.take_off()
            raise
        out._settle()
        return out if is_trainable else out.eval()

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
        """Load a further adapter, or new values into one that is there, which then stays as trainable as it was.

        Further adapters act once `set_adapter` says so. Unless `is_trainable`, the model is put into eval mode. The other arguments and the
        errors are those of `from_pretrained`.
        """
        ignore_mismatched_sizes, checks = kwargs.pop("ignore_mismatched_sizes", False), checks_in(kwargs)
        hub = hub_options(kwargs, "load_adapter")
        new, before = adapter_name not in self.peft_config, set(self.peft_config)
        if new:
            config = PeftConfig.from_pretrained(model_id, **hub)
            for_loading(config, model_id, hub, is_trainable, ephemeral_gpu_offload)
        mapping = key_mapping or getattr(self.get_base_model(), "_checkpoint_conversion_mapping", None)
        file = read_adapter(model_id, device=torch_device or "cpu", key_mapping=mapping, **hub)
        if new:
            self.add_adapter(
                adapter_name, as_made(config, file), low_cpu_mem_usage, autocast_adapter_dtype, empty=not ignore_mismatched_sizes
            )
        upcast = is_trainable and autocast_adapter_dtype
        try:
            report = load_into(self, adapter_name, file, upcast=upcast, ignore_mismatched_sizes=ignore_mismatched_sizes, **checks)
        except BaseException:
            for name in set(self.peft_config) - before:  # it may have brought others
                self._tuner.delete_adapter(name)
            raise
        if not is_trainable:
            self.eval()
        elif new:
            self.set_requires_grad(adapter_name)
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
            save_directory: the folder; made if missing.
            safe_serialization: False: `adapter_model.bin`, for old readers.
            selected_adapters: only these.
            save_embedding_layers: whether embeddings are written; "auto": where an adapter targets them or the vocabulary was resized.
            is_main_process: False: take part in gathering sharded tensors, and write nothing.
            path_initial_model_for_weight_conversion: write a LoRA whose change is counted from its start (PiSSA and the like) as a plain
                one of twice the rank. The start is known, so any text will do.
            state_dict: take the tensors from this state dict of the model, such as one gathered from a sharded model.
            verify: read the files again and compare.
            kwargs: `save_function` and `max_shard_size`, which transformers' savers take, change nothing here. Others give a warning.

        Raises:
            ValueError: for an adapter that is not there, or a directory that is a file.
            ConfigError: if an adapter cannot be converted to a plain LoRA.
            SaveError: rather than writing anything empty, partial or not finite.
        """
        warn_unused(set(kwargs) - {"save_function", "max_shard_size"}, "save_pretrained", "The adapter is saved all the same.")
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        unknown = [n for n in names if n not in self.peft_config]
        if unknown:
            raise ValueError(
                "You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(self.peft_config)} - got {unknown}."
            )
        folders = {name: folder_of(save_directory, name) for name in names}
        for name, folder in folders.items():
            config = copy.copy(self.peft_config[name])
            if config.task_type is None:
                cls = type(self.get_base_model())
                config.auto_mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
            if path_initial_model_for_weight_conversion:
                from .checkpoint.expand import save_expanded

                save_expanded(self, config, name, folder, is_main_process)
                continue
            save_adapter(
                self, config, name, folder,
                safe_serialization=safe_serialization, state_dict=state_dict, save_embedding_layers=save_embedding_layers, verify=verify,
                is_main_process=is_main_process,
            )  # fmt: skip
        if is_main_process:
            self.create_or_update_model_card(os.fspath(save_directory))

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write the README.md beside the adapter, keeping what a user has written in it."""
        config = next(iter(self.peft_config.values()))
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        from_transformers = type(self.get_base_model()).__module__.startswith("transformers.")
        update_card(
            output_dir,
            base_model=config.base_model_name_or_path,
            tags=[
                *dict.fromkeys(name_of(c.peft_type).lower() for c in self.peft_config.values()),
                *(["transformers"] if from_transformers else []),
            ],
            pipeline_tag="text-generation" if name_of(config.task_type) == "CAUSAL_LM" else None,
        )

    def push_to_hub(self, repo_id: str, *, token: bool | str | None = None, **kwargs: Any) -> str:
        """Save into a temporary folder and upload it to the Hub (needs huggingface_hub); returns the commit's address.

        Args:
            kwargs: `commit_message`, `commit_description`, `private`, `revision`, `create_pr`; others are for `save_pretrained`.
        """
        return upload(self.save_pretrained, repo_id, "Upload model", token, **kwargs)

    # ---------------------------------------------------------------- training aids

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Let the embeddings' output require gradients, so that checkpointed layers pass them on although the embeddings are frozen."""
        if hasattr(model, "enable_input_require_grads"):
            try:
                model.enable_input_require_grads()
            except NotImplementedError:
                return model  # the model names no embeddings
        elif hasattr(model, "get_input_embeddings"):
            table = model.get_input_embeddings()
            if table is not None and _require_grad not in table._forward_hooks.values():
                table.register_forward_hook(_require_grad)
        return model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "base_model" not in self._modules:  # a copy being made has no modules yet
                raise
            return getattr(self._modules["base_model"], name)


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _name_of(model: nn.Module) -> str | None:
    """What the base model was loaded as, if it knows."""
    config: Any = getattr(model, "config", None)
    noted = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(config, "_name_or_path", None)
    return getattr(model, "name_or_path", None) or noted or None


def _refuse_wrapped(model: nn.Module) -> None:
    if isinstance(model, (PeftModel, Tuner)):
        raise PeftError(
            "The model is a PeftModel already. Call model.add_adapter(name, config) for a further adapter, or unload() to start anew."
        )
    if find_switch(model) is not None:
        raise PeftError(
            "The model holds adapters already (from get_peft_model or inject_adapter_in_model). Use add_adapter on the PeftModel that was "
            "returned then, or take them off first with its unload()."
        )


__all__ = ["PeftModel"]
