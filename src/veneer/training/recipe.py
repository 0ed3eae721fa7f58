"""What to train, on what, how long: one dataclass, from the command line or a YAML file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import PeftConfig
from ..errors import ConfigError, hint
from ..method import config_class, load_methods
from ..planning.problems import build
from .controls import problems_of
from .quantise import check_storage

DTYPES = ("auto", "float32", "bfloat16", "float16")
PACKING = ("stream", "rows")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")
TASKS = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}


@dataclass
class Recipe:
    """Everything a run is made of.

    Args:
        model: a folder or a name on the Hub;  data, eval_data: a file, folder or name on the Hub.
        eval_fraction: share of the data held out where no eval_data is given.
        task: "causal-lm" or "sequence-classification";  method: such as "lora";  method_fields: fields of its config.
        out: the folder that the adapter, the record and the picture go to.
        steps: optimizer steps; if not given, `epochs` passes over the data.
        batch_size: rows per step and process;  accumulate: steps whose gradients are added up;  length: tokens per row.
        packing: "stream": all text as one stream, cut into rows of `length`; "rows": rows stay apart, cut at `length`, and a batch's rows are laid
            end to end without padding, each seeing itself alone.
        learning_rate, warmup, weight_decay, schedule: of AdamW;  dtype: of the frozen weights.
        quantize: the storage that the frozen weights are packed in, such as "nf4"; see `veneer.training.quantise`.
        optimizer, optimizer_fields: "adamw", or one of PEFT's with its fields;  rates, clipping, freezing: by layer; see `veneer.training.controls`.
        statistics: of the layers, every so many steps, or a dict of options; 0 for none.
        save_every: steps between checkpoints, 0 for none;  resume: go on from the last checkpoint in `out`.
        resume_anyway: and do so with other data or settings than the run was started with.
    """

    model: str = ""
    data: str = ""
    out: str = ""
    eval_data: str | None = None
    eval_fraction: float = 0.05
    task: str = "causal-lm"
    method: str = "lora"
    method_fields: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    length: int = 512
    packing: str = "stream"
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    schedule: str = "linear"
    optimizer: str = "adamw"
    optimizer_fields: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, Any] = field(default_factory=dict)
    clipping: Any = None
    freezing: Any = None
    statistics: Any = 0
    dtype: str = "auto"
    quantize: str | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    save_every: int = 0
    resume: bool = False
    resume_anyway: bool = False

    def check(self, needed: Sequence[str] = ("model", "data", "out")) -> None:
        """Raise ConfigError for what can be seen to be wrong before anything is loaded; see `problems`."""
        for _, text in self.problems(needed):
            raise ConfigError(text)

    def problems(self, needed: Sequence[str] = ("model", "data", "out")) -> Iterator[tuple[str, str]]:
        """(field, what is wrong) for all of that.

        Args:
            needed: the fields that have to be given.
        """
        for name in needed:
            if not getattr(self, name):
                yield name, f"--{name} is missing: say which {name} to use, on the command line or in the recipe."
        if self.task not in TASKS:
            yield "task", f"Unknown task {self.task!r}. There are {', '.join(TASKS)}.{hint(self.task, TASKS)}"
        if self.dtype not in DTYPES:
            yield "dtype", f"Unknown dtype {self.dtype!r}: {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.{hint(self.dtype, DTYPES)}"
        if self.packing not in PACKING:
            yield "packing", f"Unknown packing {self.packing!r}: {' or '.join(PACKING)}.{hint(self.packing, PACKING)}"
        if self.quantize is not None:
            try:
                check_storage(self.quantize)
            except ConfigError as e:
                yield "quantize", str(e)
        if self.schedule not in SCHEDULES:
            yield "schedule", f"Unknown schedule {self.schedule!r}: {', '.join(SCHEDULES)}.{hint(self.schedule, SCHEDULES)}"
        if self.method_fields.get("inference_mode"):
            yield "inference_mode", "method_fields: with inference_mode nothing trains. Leave it out."
        if self.method_fields.get("init_lora_weights") == "eva":
            text = (
                "init_lora_weights='eva' needs data before the training, and a recipe gives it none: it would start as a plain LoRA. Call "
            )
            yield (
                "init_lora_weights",
                text + "initialize_lora_eva_weights in a loop of your own, or let `veneer suggest --search eva` deal out the ranks.",
            )
        yield from problems_of(self)
        for name in ("batch_size", "accumulate", "length", "learning_rate", "epochs"):
            if getattr(self, name) <= 0:
                yield name, f"{name} has to be positive, got {getattr(self, name)}."
        for name in ("weight_decay", "save_every"):
            if getattr(self, name) < 0:
                yield name, f"{name} is 0 or more, got {getattr(self, name)}."
        if not 0 <= self.warmup <= 1:
            yield "warmup", f"warmup is a share of the steps, in [0, 1], got {self.warmup}."
        if not 0 <= self.seed < 2**32:
            yield "seed", f"seed lies in [0, 2**32), got {self.seed}."
        if self.steps is not None and self.steps <= 0:
            yield "steps", f"steps has to be positive, got {self.steps}."
        if not 0 <= self.eval_fraction < 1:
            yield "eval_fraction", f"eval_fraction lies in [0, 1), got {self.eval_fraction}."
        if self.resume_anyway and not self.resume:
            yield (
                "resume_anyway",
                "resume_anyway says that a run may go on with other data or settings, so it goes with resume. Give --resume too.",
            )
        if file := next((p for p in (Path(self.out), *Path(self.out).parents) if p.is_file()), None):
            yield "out", f"{str(file)!r} is a file; --out names a folder, in folders."
        elif self.out and Path(self.model).is_dir() and Path(self.out).absolute().resolve() == Path(self.model).resolve():
            yield "out", f"{self.out!r} is the model's own folder, which would be read with the adapter from then on. Give another --out."
        elif self.out and (Path(self.out) / "config.json").exists():
            yield "out", f"{self.out!r} holds a model, whose tokenizer would be written over. Give another --out."
        if self.out and (Path(self.out) / "adapter_config.json").exists() and not self.resume:
            yield (
                "out",
                f"{self.out!r} holds an adapter already, which is not overwritten. Give another --out, or --resume to go on with its run.",
            )
        elif self.out and not self.resume and (found := self.checkpoint()) is not None:
            text = f"{self.out!r} holds {found[0].name} of a run that did not come to its end, which is not overwritten. Give another --out, or --resume"
            yield "out", f"{text} to go on with it."

    def checkpoint(self) -> tuple[Path, int] | None:
        """The last checkpoint in `out` that was written to its end, and its step. The Trainer writes trainer_state.json last."""
        found = []
        for state in (Path(self.out) / "checkpoints").glob("checkpoint-*/trainer_state.json"):
            try:
                found.append((int(json.loads(state.read_text(encoding="utf-8"))["global_step"]), state.parent))
            except (ValueError, KeyError, TypeError):  # cut off
                continue
        step, folder = max(found, default=(0, None))
        return (folder, step) if folder is not None else None

    def config(self) -> PeftConfig:
        """The method's config.

        Raises:
            ConfigError: for an unknown method or field; names the nearest.
        """
        cls, values = self.fields()
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        for key in values:
            if key not in known:
                options = {f.name for f in dataclasses.fields(self)}
                raise ConfigError(f"{cls.__name__} has no field {key!r}.{hint(key, known | options)}")
        try:
            return cls(**values)
        except TypeError as e:  # text where a number belongs
            raise ConfigError("; ".join(str(p) for p in build(cls, values)[1]) or f"{cls.__name__}: {e}") from e

    def fields(self) -> tuple[type[PeftConfig], dict[str, Any]]:
        """The method's config class, and the values for it, known fields or not.

        Raises:
            ConfigError: for an unknown method; names the nearest.
        """
        names = {n.lower().replace("_", "-"): n for n in load_methods()}
        name = self.method.lower().replace("_", "-")
        if name not in names:
            raise ConfigError(f"Unknown method {self.method!r}. There are {', '.join(sorted(names))}.{hint(name, names)}")
        cls = config_class(names[name])
        known = {f.name: f for f in dataclasses.fields(cls) if f.init}
        anywhere = "target_modules" in known and "linear" in getattr(cls, "kinds", ()) and not hasattr(cls, "default_targets")
        values: dict[str, Any] = {"target_modules": "all-linear"} if anywhere else {}  # others know their place: norms, tokens, blocks
        for key, value in self.method_fields.items():
            name = key.replace("-", "_")
            values[name] = _number(value) if name in known and type(known[name].default) in (int, float) else value
        if "lora_alpha" in known and "lora_alpha" not in values and isinstance(values.get("r"), int):
            values["lora_alpha"] = values["r"]
        if isinstance(values.get("target_modules"), str) and "," in values["target_modules"]:
            values["target_modules"] = [t.strip() for t in values["target_modules"].split(",")]
        return cls, {**values, "task_type": TASKS.get(self.task)}


def _number(value: Any) -> Any:
    """The number that text says, if it does: YAML reads 1e-3 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read_recipe(path: str | None, given: Mapping[str, Any]) -> Recipe:
    """A recipe from a YAML file with `given` (from the command line) over it. Method fields may stand under `method_fields`.

    Raises:
        ConfigError: if the file cannot be read, or has a key that no recipe has.
    """
    values: dict[str, Any] = {}
    if path is not None:
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise ConfigError(f"There is no recipe {path!r}.") from None
        except OSError as e:
            raise ConfigError(f"The recipe {path!r} cannot be read: {e.strerror}.") from e
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise ConfigError(f"{path} is not YAML: {e}") from e
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path} has to hold keys and values, such as `model: ...`.")
    known = {f.name: f for f in dataclasses.fields(Recipe)}
    clean: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{path}: unknown key {key!r}.{hint(name, known)}")
        clean[name] = value
    clean.update({k: v for k, v in given.items() if v is not None and k != "method_fields"})
    clean = {name: _of_kind(name, str(known[name].type), v) for name, v in clean.items() if v is not None}
    fields = {**clean.pop("method_fields", {}), **given.get("method_fields", {})}
    return Recipe(**clean, method_fields=fields)


def _of_kind(name: str, kind: str, value: Any) -> Any:
    """A value of a recipe as its field takes it. YAML reads 1e-3 as text and 1.0e3 as no whole number.

    Raises:
        ConfigError: if it is of another kind.
    """
    kind = kind.removesuffix(" | None")
    if kind in ("int", "float") and not isinstance(value, bool):
        try:
            number = value if isinstance(value, int) else float(value)
        except (ValueError, TypeError):
            number = math.nan
        if math.isfinite(number) and kind == "float":
            return float(number)
        if math.isfinite(number) and number == int(number):
            return int(number)
    if (kind == "str" and isinstance(value, str)) or (kind == "bool" and isinstance(value, bool)) or kind == "Any":
        return value
    if kind.startswith("dict") and isinstance(value, Mapping):
        return dict(value)
    wanted = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}.get(kind, "keys and values")
    quotes = f" Put it in quotes: {name}: '{value}'." if kind == "str" and isinstance(value, (int, float)) else ""
    raise ConfigError(f"{name} has to be {wanted}, got {value!r}.{quotes}")
