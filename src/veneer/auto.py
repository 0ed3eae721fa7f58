"""AutoPeftModel: base model and adapter in one call, from the adapter's folder alone."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, ClassVar

from .config import PeftConfig
from .errors import ConfigError
from .model import _HUB, PeftModel

_LIBRARIES = ("diffusers", "lerobot", "megatron-core", "transformers")  # that a folder may name as its base's home


class AutoPeftModel:
    """Loads the base model that an adapter's folder names, and the adapter onto it. Only `from_pretrained` makes one."""

    _auto_class: ClassVar[str | None] = None  # of transformers; None: the class that the folder names
    _task: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"{type(self).__name__} is made with `{type(self).__name__}.from_pretrained(folder)`, not by its constructor.")

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
        """The base model with the adapter.

        Args:
            pretrained_model_name_or_path: the adapter's folder or its name on the Hub.
            revision: of the adapter; that of the base model stands in the adapter's config.
            import_allowlist: further packages that the folder may import its base model's class from.
            kwargs: for the base model's from_pretrained.

        Raises:
            ConfigError: if the folder does not tell its base model, or names a class outside the allowed packages.
        """
        hub = {k: kwargs[k] for k in _HUB if k in kwargs and k != "revision"}
        where = {**hub, **({"revision": revision} if revision is not None else {})}
        peft_config = PeftConfig.from_pretrained(pretrained_model_name_or_path, **where)
        base = peft_config.base_model_name_or_path
        if base is None:
            raise ConfigError(
                f"{os.fspath(pretrained_model_name_or_path)!r} does not say which base model it is for. Load it yourself and call PeftModel.from_pretrained."
            )
        task = getattr(peft_config.task_type, "value", peft_config.task_type)
        if cls._task is not None and task is not None and task != cls._task:
            raise ValueError(
                f"Expected target PEFT class for {cls._task}, but you have asked for an adapter of the task type {task}. Use the matching AutoPeftModelFor... class."
            )
        target = cls._target(peft_config, import_allowlist)
        options = {k: v for k, v in kwargs.items() if k not in ("low_cpu_mem_usage_adapter",)}
        model = target.from_pretrained(
            base, revision=peft_config.revision or "main", **{k: v for k, v in options.items() if k != "subfolder"}
        )
        _resize(model, pretrained_model_name_or_path, where, kwargs)
        return PeftModel.from_pretrained(model, pretrained_model_name_or_path, adapter_name, is_trainable, config, **where)

    @classmethod
    def _target(cls, config: PeftConfig, allowed: list[str] | None) -> Any:
        if cls._auto_class is not None:
            return getattr(importlib.import_module("transformers"), cls._auto_class)
        task = getattr(config.task_type, "value", config.task_type)
        by_task = {c._task: c for c in AutoPeftModel.__subclasses__()}
        if task in by_task:
            return by_task[task]._target(config, allowed)
        mapping = config.auto_mapping or {}
        library, name = mapping.get("parent_library"), mapping.get("base_model_class")
        if not library or not name:
            raise ConfigError(
                "The adapter's config has neither a task_type nor an auto_mapping. Load the base model yourself and call PeftModel.from_pretrained."
            )
        if library.split(".")[0] not in (*_LIBRARIES, *(a.split(".")[0] for a in allowed or ())):
            raise ConfigError(
                f"The adapter wants to import {name!r} from {library!r}, which is not among {', '.join(_LIBRARIES)}. If you trust it, pass "
                f"import_allowlist=[{library.split('.')[0]!r}]."
            )
        return getattr(importlib.import_module(library), name)


def _resize(model: Any, folder: Any, where: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Give the embeddings the length of the tokenizer in the adapter's folder, where that is longer."""
    local = Path(os.fspath(folder)) / (where.get("subfolder") or "")
    if not (local / "tokenizer_config.json").is_file() or not hasattr(model, "resize_token_embeddings"):
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(local, trust_remote_code=kwargs.get("trust_remote_code", False))
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
