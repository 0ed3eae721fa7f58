"""AutoPeftModel: base model and adapter in one call, from the adapter's folder alone."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from .checkpoint import resolve_file
from .config import PeftConfig
from .errors import ConfigError
from .model import PeftModel
from .tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from .types import name_of

_LIBRARIES = ("diffusers", "lerobot", "megatron-core", "transformers")  # that a folder may name as its base's home
_FOR_ADAPTER = ("autocast_adapter_dtype", "ephemeral_gpu_offload")


class AutoPeftModel:
    """Loads the base model that an adapter's folder names, and the adapter onto it. Only `from_pretrained` makes one."""

    _auto_class: ClassVar[str | None] = None  # of transformers
    _task: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is designed to be instantiated using `{name}.from_pretrained(folder)`, not its constructor.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base model with the adapter. Its class is the one that the folder names (`auto_mapping`), else that of the task.

        If the folder holds a tokenizer with more tokens than the base model has, the embeddings are resized to it.

        Args:
            pretrained_model_name_or_path: the adapter's folder or its name on the Hub.
            adapter_name, is_trainable, config: as in `PeftModel.from_pretrained`.
            revision: of the adapter; that of the base model stands in the adapter's config.
            import_allowlist: further packages that the folder may import its base model's class from.
            kwargs: for the base model's from_pretrained; those that say where to find a file (`token, cache_dir, ...`) for the adapter's
                too, `subfolder, autocast_adapter_dtype, ephemeral_gpu_offload` for the adapter's alone.

        Raises:
            ConfigError: if the folder does not tell its base model, or names a class outside the allowed packages.
            ValueError: if the adapter is for another task.
        """
        folder = os.fspath(pretrained_model_name_or_path)
        where = PeftConfig._split_kwargs(kwargs)[0] | ({"revision": revision} if revision is not None else {})
        peft_config = PeftConfig.from_pretrained(folder, **where)
        if peft_config.base_model_name_or_path is None:
            raise ConfigError(
                f"{folder!r} does not say which base model it is for. Load that yourself and call PeftModel.from_pretrained(model, folder)."
            )
        task = _task_of(peft_config)
        if cls._task is not None and task is not None and task != cls._task:
            made, asked = (MODEL_TYPE_TO_PEFT_MODEL_MAPPING[t].__name__ for t in (task, cls._task))
            raise ValueError(f"Expected target PEFT class: {made}, but you have asked for: {asked}. Load it with Auto{made}.")
        target = cls._target(peft_config, import_allowlist)
        options = {k: v for k, v in kwargs.items() if k not in (*_FOR_ADAPTER, "subfolder", "revision")}
        if peft_config.revision is not None:
            options["revision"] = peft_config.revision
        model = target.from_pretrained(peft_config.base_model_name_or_path, **options)
        _resize(model, folder, where, kwargs)
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[cls._task] if cls._task is not None else PeftModel
        mine = {k: kwargs[k] for k in _FOR_ADAPTER if k in kwargs}
        return kind.from_pretrained(model, folder, adapter_name, is_trainable, config, **mine, **where)

    @classmethod
    def _target(cls, config: PeftConfig, allowed: list[str] | None) -> Any:
        """The base model's class."""
        mapping = config.auto_mapping or {}
        library, name = mapping.get("parent_library"), mapping.get("base_model_class")
        if library and name:
            return getattr(_import(library, name, allowed), name)
        task = _task_of(config) if cls._task is None else cls._task
        auto = next((c._auto_class for c in AutoPeftModel.__subclasses__() if c._task == task), None) if task is not None else None
        if auto is None:
            raise ConfigError(
                "Cannot infer the auto class from the config: it has neither a task_type nor an auto_mapping. Load the base model yourself "
                "and call PeftModel.from_pretrained(model, folder)."
            )
        return getattr(importlib.import_module("transformers"), auto)


def _task_of(config: PeftConfig) -> str | None:
    return None if config.task_type is None else name_of(config.task_type)


def _import(library: str, name: str, allowed: list[str] | None) -> Any:
    """A module that a folder asks for, if it is one that a folder may ask for."""
    package = library.partition(".")[0]
    if package not in _LIBRARIES and package not in (allowed or ()) and library not in (allowed or ()):
        raise ConfigError(
            f"The auto mapping wants to import {library!r} (for {name!r}), which is not in the import allowlist ({', '.join(_LIBRARIES)}). "
            f"If you are sure that importing this library is safe, specify `import_allowlist=[{package!r}]` in `from_pretrained()`."
        )
    return importlib.import_module(library)


def _resize(model: Any, folder: str, where: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Give the embeddings the length of the tokenizer that is with the adapter, where that is longer."""
    if not hasattr(model, "resize_token_embeddings"):
        return
    found = resolve_file(folder, "tokenizer_config.json", **where)
    if found is None:
        return
    from transformers import AutoTokenizer

    options = {k: v for k, v in where.items() if k in ("revision", "subfolder", "token", "cache_dir", "local_files_only")}
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=kwargs.get("trust_remote_code", False), **options)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For language models."""

    _auto_class = "AutoModelForCausalLM"
    _task = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For encoder-decoders."""

    _auto_class = "AutoModelForSeq2SeqLM"
    _task = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For sequence classifiers."""

    _auto_class = "AutoModelForSequenceClassification"
    _task = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For token classifiers."""

    _auto_class = "AutoModelForTokenClassification"
    _task = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For extractive question answering."""

    _auto_class = "AutoModelForQuestionAnswering"
    _task = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For encoders."""

    _auto_class = "AutoModel"
    _task = "FEATURE_EXTRACTION"
