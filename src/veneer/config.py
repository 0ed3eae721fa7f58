"""`PeftConfig`: the fields every method has, and adapter_config.json (the format of PEFT 0.21.2, both ways)."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import re
import uuid
import warnings
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .engine.defaults import CONFIG_NAME
from .errors import ConfigError, PeftWarning, hint
from .types import PeftType, TaskType

PEFT_FORMAT_VERSION = "0.21.2"  # the version of PEFT whose file format is written

_HUB_KWARGS = frozenset(
    {"subfolder", "repo_type", "revision", "library_name", "library_version", "cache_dir", "local_dir", "user_agent"}
    | {"force_download", "etag_timeout", "token", "local_files_only", "headers", "endpoint", "tqdm_class", "dry_run"}
)
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass
class PeftConfigMixin:
    """The fields that name the method and the task, and reading and writing them all.

    Args:
        task_type: what the model is for, one of `TaskType`, or None.
        peft_type: the method, one of `PeftType` (or the name of one registered by the user); filled by each method's
            config.
        auto_mapping: class and library of the base model, for models without a task type.
        peft_version: the PEFT version whose format the config has.

    Raises:
        ConfigError: if a field has a wrong type or value.
    """

    task_type: str | TaskType | None = field(default=None, metadata={"help": "What the model is for"})
    peft_type: str | PeftType | None = field(default=None, metadata={"help": "The method of the adapter"})
    auto_mapping: dict[str, Any] | None = field(default=None, metadata={"help": "Class and library of the base model"})
    peft_version: str | None = field(default=None, metadata={"help": "The PEFT version whose format the config has"})

    not_saved: ClassVar[frozenset[str]] = frozenset({"runtime_config"})

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            known = [t.value for t in TaskType]
            raise ConfigError(
                f"Invalid task type: {self.task_type!r}. It must be one of {', '.join(known)}.{hint(str(self.task_type), known)}"
            )
        if self.peft_version is None:
            self.peft_version = PEFT_FORMAT_VERSION
        for name in (f.name for f in dataclasses.fields(self)):
            if name in _FIELD_RULES:
                accepts, expected = _FIELD_RULES[name]
                value = getattr(self, name)
                if value is not None and not accepts(value):
                    raise ConfigError(f"{type(self).__name__}.{name} must be {expected} or None, got {value!r}.")
        for name in ("modules_to_save", "target_parameters"):
            if isinstance(getattr(self, name, None), str):
                setattr(self, name, [getattr(self, name)])
        self._check_layers()

    def _check_layers(self) -> None:
        """The fields that choose layers act on a list of targets only."""
        if getattr(self, "layers_pattern", None) and getattr(self, "layers_to_transform", None) is None:
            raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified: the layers' numbers.")
        targets = getattr(self, "target_modules", None)
        if isinstance(targets, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name, None) not in (None, [], ""):
                    raise ConfigError(
                        f"`{name}` cannot be used when `target_modules` is a str ({targets!r}). Give a list of names, "
                        r"or choose the layers in the regular expression: r'.*\.layers\.(0|1)\..*q_proj'."
                    )

    def to_dict(self) -> dict[str, Any]:
        """All fields that are saved, by name; nested configs as dicts."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in self.not_saved}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json into a folder, made if missing. The file is replaced as a whole or not at all.

        Args:
            save_directory: the adapter's folder.
            auto_mapping_dict: takes the place of the field `auto_mapping` in the file.

        Raises:
            NotADirectoryError: if there is a file where the folder should be.
            ConfigError: if a field cannot be written as JSON.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"Provided path ({folder}) should be a directory, not a file")
        values = self.to_dict()
        if kwargs.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        # within a field, order may matter: of patterns the first that fits counts, and experts are known by their place
        text = json.dumps({k: _plain(values[k], k) for k in sorted(values)}, indent=2)
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".{CONFIG_NAME}.{uuid.uuid4().hex}"
        try:
            with beside.open("x", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            beside.replace(folder / CONFIG_NAME)
        finally:
            beside.unlink(missing_ok=True)

    def push_to_hub(self, repo_id: str, *, token: bool | str | None = None, **kwargs: Any) -> str:
        """Upload adapter_config.json to the Hub (needs huggingface_hub); returns the commit's address.

        Args:
            kwargs: `commit_message`, `commit_description`, `private`, `revision`, `create_pr`; others are for `save_pretrained`.
        """
        from .checkpoint.hub import upload

        return upload(self.save_pretrained, repo_id, "Upload config", token, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any) -> Any:
        """The config of a saved adapter, as the class of its method.

        Args:
            pretrained_model_name_or_path: the adapter's folder, or, where no such folder exists, its name on the Hub
                (needs huggingface_hub).
            subfolder: where in that folder the adapter is.
            kwargs: `revision, cache_dir, token, local_files_only, ...` for the Hub. Fields of the config are taken
                where the file has none.

        Raises:
            ValueError: if there is no adapter_config.json.
            ConfigError: if the file is no valid config.
        """
        path = _find(pretrained_model_name_or_path, subfolder, cls._split_kwargs(kwargs)[0])
        loaded = cls.from_json_file(path)
        target = cls._class_for(loaded, path)
        fields = target._split_kwargs(kwargs)[1]
        unused = {k: v for k, v in fields.items() if k in loaded and loaded[k] != v}
        if unused:
            said = ", ".join(f"{k}={v!r} (file: {loaded[k]!r})" for k, v in unused.items())
            warnings.warn(
                f"{path} decides over what was passed: {said}. Set the fields on the config after reading it.",
                PeftWarning,
                stacklevel=2,
            )
        return target._build(fields | loaded, path)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The fields in a config file, as a dict.

        Raises:
            ConfigError: if the file is not a JSON object.
        """
        try:
            loaded = json.loads(Path(path_json_file).read_text(encoding="utf-8-sig"))  # with a byte order mark or without
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise ConfigError(f"{path_json_file} is not JSON: {e}") from e
        if not isinstance(loaded, dict):
            raise ConfigError(f"{path_json_file} must hold a JSON object with the fields of a config, not a {type(loaded).__name__}")
        for name in cls.not_saved & set(loaded):
            if loaded.pop(name):
                warnings.warn(f"{path_json_file}: `{name}` is ignored; it can only be set at run time.", PeftWarning, stacklevel=2)
        return loaded

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """The config of the method named by `peft_type` (by default this class) with the given fields.

        Raises:
            ConfigError: if there is no such method, or no `peft_type` is given.
        """
        return cls._class_for(kwargs, "the fields")._build(kwargs, "the fields")

    @classmethod
    def _class_for(cls, values: Mapping[str, Any], source: object) -> type[PeftConfigMixin]:
        if values.get("peft_type") is not None:
            from .method import config_class

            return config_class(values["peft_type"])
        if cls in (PeftConfigMixin, PeftConfig, PromptLearningConfig):
            raise ConfigError(
                f"The config is missing the required key `peft_type` ({source}), so its method is unknown. "
                "Add it, or use the method's own class, such as LoraConfig."
            )
        return cls

    @classmethod
    def _build(cls, values: Mapping[str, Any], source: object) -> Any:
        """A config from fields of which some may be unknown: those are dropped, with a warning if they say anything."""
        values = cls.check_kwargs(**values)
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        unknown = {k: v for k, v in values.items() if k not in known and says_something(v)}
        if unknown:
            said = ", ".join(f"{k}={v!r}" for k, v in sorted(unknown.items()))
            written = f" It was written by PEFT {values['peft_version']}." if values.get("peft_version") else ""
            warnings.warn(
                f"Fields that {cls.__name__} does not know are ignored ({source}): {said}. If they change what the "
                f"adapter computes, its results will differ from those in training.{written}",
                PeftWarning,
                stacklevel=3,
            )
        return cls(**{k: v for k, v in values.items() if k in known})

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The fields read from a file, as this class takes them. For methods whose old files mean something else."""
        return kwargs

    @classmethod
    def _split_kwargs(cls, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Divides keyword arguments into those for the Hub, fields of this config, and others."""
        fields = {f.name for f in dataclasses.fields(cls) if f.init}
        parts: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = ({}, {}, {})
        for k, v in kwargs.items():
            parts[0 if k in _HUB_KWARGS else 1 if k in fields else 2][k] = v
        return parts

    @classmethod
    def _get_peft_type(cls, model_id: str | os.PathLike[str], **hf_hub_download_kwargs: Any) -> str:
        """The `peft_type` of a saved adapter."""
        subfolder = hf_hub_download_kwargs.pop("subfolder", None)
        path = _find(model_id, subfolder, hf_hub_download_kwargs)
        loaded = cls.from_json_file(path)
        if not loaded.get("peft_type"):
            raise ConfigError(f"{path} is missing the required key `peft_type`, so the adapter's method is unknown.")
        return str(loaded["peft_type"])

    @staticmethod
    def _get_peft_version() -> str:
        """The PEFT version whose file format is written."""
        return PEFT_FORMAT_VERSION

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method trains inputs of the model (virtual tokens), not its weights."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is the adaption prompt."""
        return False


@dataclass
class PeftConfig(PeftConfigMixin):
    """The fields that the configs of all methods have.

    Args:
        base_model_name_or_path: the name of the base model, as it was loaded.
        revision: the revision of the base model.
        inference_mode: True for an adapter that is not to be trained.
    """

    base_model_name_or_path: str | None = field(default=None, metadata={"help": "The name of the base model"})
    revision: str | None = field(default=None, metadata={"help": "The revision of the base model"})
    inference_mode: bool = field(default=False, metadata={"help": "Whether the adapter is not to be trained"})


@dataclass
class PromptLearningConfig(PeftConfig):
    """The fields of the methods that train virtual tokens.

    Args:
        num_virtual_tokens: how many tokens are put before the input.
        token_dim: width of the base model's embeddings.
        num_transformer_submodules: 2 for an encoder with a decoder, else 1.
        num_attention_heads: attention heads of the base model.
        num_layers: layers of the base model.
        modules_to_save: modules trained whole beside the tokens.
    """

    num_virtual_tokens: int = field(default=None, metadata={"help": "How many tokens are put before the input"})  # type: ignore[assignment]  # PEFT's
    token_dim: int = field(default=None, metadata={"help": "Width of the base model's embeddings"})  # type: ignore[assignment]  # PEFT's
    num_transformer_submodules: int | None = field(default=None, metadata={"help": "2 for an encoder with a decoder, else 1"})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Attention heads of the base model"})
    num_layers: int | None = field(default=None, metadata={"help": "Layers of the base model"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained whole beside the tokens"})

    @property
    def is_prompt_learning(self) -> bool:
        return True


# ---------------------------------------------------------------- what the common fields accept


def says_something(value: object) -> bool:
    """Whether a field that is not known may matter by this value."""
    return not (value is None or value is False or value in ("", [], {}))


def _is_names(value: object) -> bool:
    return _is_list(value) and all(isinstance(v, str) and v for v in value)  # type: ignore[attr-defined]


def _is_list(value: object) -> bool:
    return isinstance(value, (Sequence, AbstractSet)) and not isinstance(value, (str, bytes))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ints(value: object) -> bool:
    return _is_list(value) and all(map(_is_int, value))  # type: ignore[call-overload]


def _is_pattern(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_pattern_table(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_pattern, value))


_NAMES_OR_PATTERN = (lambda v: _is_names(v) or _is_pattern(v), "a list of module names or a regular expression")
_NAMES = (lambda v: _is_names(v) or isinstance(v, str), "a list of names")
_TABLE = (_is_pattern_table, "a dict from regular expressions for module names to numbers")

_FIELD_RULES: dict[str, tuple[Any, str]] = {
    "target_modules": _NAMES_OR_PATTERN,
    "exclude_modules": _NAMES_OR_PATTERN,
    "layers_pattern": _NAMES_OR_PATTERN,
    "modules_to_save": _NAMES,
    "target_parameters": _NAMES,
    "layers_to_transform": (lambda v: _is_int(v) or _is_ints(v), "the number of a layer or a list of them"),
    "rank_pattern": _TABLE,
    "alpha_pattern": _TABLE,
    "trainable_token_indices": (
        lambda v: _is_ints(v) or (isinstance(v, Mapping) and all(isinstance(k, str) and _is_ints(i) for k, i in v.items())),
        "a list of token ids, or a dict from the names of embeddings to such lists",
    ),
    "auto_mapping": (lambda v: isinstance(v, Mapping), "a dict"),
    "base_model_name_or_path": (lambda v: isinstance(v, (str, os.PathLike)), "a name or a path"),
    "revision": (lambda v: isinstance(v, str), "a str"),
    "inference_mode": (lambda v: isinstance(v, bool), "a bool"),
}


def _plain(value: Any, name: str) -> Any:
    """`value` in the types of JSON; sets become sorted lists."""
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {k: _plain(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, AbstractSet):
        return [_plain(v, name) for v in sorted(value)]
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(v, name) for v in value]
    raise ConfigError(f"The field `{name}` cannot be written to {CONFIG_NAME}: {value!r} is a {type(value).__name__}.")


# ---------------------------------------------------------------- finding the file


def _find(name: str | os.PathLike[str], subfolder: str | None, hub_kwargs: Mapping[str, Any]) -> str:
    """The path of adapter_config.json of an adapter: a local folder wins, then the Hub."""
    given = os.fspath(name)
    folder = Path(given, subfolder) if subfolder else Path(given)
    if given and (folder / CONFIG_NAME).is_file():
        return str(folder / CONFIG_NAME)
    missing = f"Can't find {CONFIG_NAME!r} at {given!r}" + (f" (subfolder {subfolder!r})" if subfolder else "")
    if given and Path(given).exists():
        raise ValueError(missing + _what_is_there(Path(given), folder))
    if not _REPO_ID.fullmatch(given):
        raise ValueError(f"{missing}. There is no such folder, and it is no name on the Hub (`owner/name`).")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as e:
        raise ImportError(f"{missing}. There is no such folder; to look on the Hub, run `pip install huggingface_hub`.") from e
    try:
        return str(hf_hub_download(given, CONFIG_NAME, subfolder=subfolder, **hub_kwargs))
    except Exception as e:  # whatever the Hub, the network or the cache answers, the file was not found
        raise ValueError(f"{missing}. There is no such folder, and the Hub gave: {type(e).__name__}: {e}") from e


def _what_is_there(given: Path, folder: Path) -> str:
    """What the caller probably meant, for an existing path without a config."""
    if given.is_file():
        return f". That is a file: give its folder, {str(given.parent)!r}."
    inside = sorted(p.parent.name for p in (folder if folder.is_dir() else given).glob(f"*/{CONFIG_NAME}"))
    if inside:
        return f". There are adapters in its subfolders {inside}: give subfolder={inside[0]!r}."
    if (folder / "config.json").is_file():
        return ". It holds a config.json: it is a whole model, not an adapter."
    return ". The folder exists, but it holds no adapter."
