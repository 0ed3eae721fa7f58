"""The plan of a recipe: everything about a run that can be known before weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, PeftError
from ..model import PeftModel
from ..planning.footprint import hollow, without_numbers
from ..planning.plan import Plan, plan
from ..planning.problems import Problem, build
from .controls import controls_of, optimizer_of
from .data import check_columns, read_rows
from .prepare import check_model
from .quantise import BITS, HEADS
from .recipe import TASKS, Recipe, read_recipe

_NOT_FIELDS = ("auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "task_type", "inference_mode", "revision")


def read_config(path: str | None, given: dict[str, Any]) -> Recipe:
    """A recipe from YAML, or from the adapter_config.json of an adapter or the folder that has one, with `given` over it.

    Raises:
        ConfigError: if it cannot be read, or has a key that no recipe has.
    """
    file = Path(path) if path is not None else None
    if file is not None and file.is_dir():
        file = file / "adapter_config.json"
    if file is None or file.suffix != ".json":
        return read_recipe(path, given)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no config {str(file)!r}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file} is not JSON: {e}") from e
    if not isinstance(found, dict) or "peft_type" not in found:
        raise ConfigError(f"{file} names no method: it has no `peft_type`, such as 'LORA'.")
    fields = {k: v for k, v in found.items() if k not in _NOT_FIELDS and v is not None}
    task = next((t for t, name in TASKS.items() if name == found.get("task_type")), None)
    own = {"method": str(found["peft_type"]).lower(), **({"task": task} if task else {})}
    if found.get("base_model_name_or_path"):
        own["model"] = found["base_model_name_or_path"]
    chosen = {k: v for k, v in given.items() if v is not None}
    return read_recipe(None, {**own, **chosen, "method_fields": {**fields, **given.get("method_fields", {})}})


def hollow_model(recipe: Recipe, labels: int = 2) -> nn.Module:
    """The recipe's model on the meta device, from its config.json alone.

    Raises:
        ConfigError: if there is no such model, or it is none for the task.
    """
    import transformers

    check_model(recipe.model)
    try:
        config = transformers.AutoConfig.from_pretrained(recipe.model)
        dtype = (getattr(config, "dtype", None) or torch.float32) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        auto = transformers.AutoModelForCausalLM if recipe.task == "causal-lm" else transformers.AutoModelForSequenceClassification
        if recipe.task != "causal-lm":
            config.num_labels = labels
            config.get_text_config().pad_token_id = config.get_text_config().pad_token_id or 0  # any, for a batch to run
        with torch.device("meta"):
            model: nn.Module = auto.from_config(config, dtype=dtype)
        model.tie_weights()  # type: ignore[operator]
    except (OSError, ValueError) as e:
        raise ConfigError(f"{recipe.model!r} cannot be loaded for {recipe.task}: {(str(e).strip().splitlines() or [''])[0]}") from e
    return model


def forecast(recipe: Recipe) -> Plan:
    """What `veneer train` would do with a recipe. Data and the output folder are looked at if they are given."""
    problems = [Problem(field, text) for field, text in recipe.problems(needed=("model",))]
    labels = 2
    if recipe.data:
        try:
            labels = _labels(recipe)
        except ConfigError as e:
            problems.append(Problem("data", str(e)))
    config: Any = None
    try:
        cls, values = recipe.fields()
        config, wrong = build(cls, values)
        problems += wrong
    except ConfigError as e:
        problems.append(Problem("method", str(e)))
    model = None
    if recipe.model and recipe.task in TASKS and not any(p.field == "dtype" for p in problems):
        try:
            model = hollow_model(recipe, labels)
        except ConfigError as e:
            problems.append(Problem("model", str(e)))
    if model is None or config is None:
        return Plan(recipe.method.upper(), config, problems=problems, batch=(recipe.batch_size, recipe.length))
    sizes: dict[str, Any] = {
        "batch_size": max(recipe.batch_size, 1),
        "length": max(recipe.length, 1),
        "accumulate": max(recipe.accumulate, 1),
    }
    loss: Any = "chunked" if recipe.task == "causal-lm" else "model"
    out = plan(model, config, **sizes, loss=loss, gradient_checkpointing=recipe.gradient_checkpointing)
    out.problems = problems + out.problems
    if out.hits or out.trainable_parameters:
        out.problems += _control_problems(recipe, model, out.config, {p.field for p in problems})
    if recipe.quantize is not None and recipe.quantize in BITS and "weights" in out.memory:
        _pack(out, model, recipe.quantize)
    return out


def _labels(recipe: Recipe) -> int:
    rows = read_rows(recipe.data)
    if recipe.task == "causal-lm":
        check_columns(rows, [["messages"], ["prompt", "completion"], ["text"]], recipe.data)
        return 2
    check_columns(rows, [["text", "label"]], recipe.data)
    return max(2, len({str(r["label"]) for r in rows}))


def _control_problems(recipe: Recipe, model: nn.Module, config: Any, known: set[str]) -> list[Problem]:
    """What of the controls does not fit the adapted model."""
    import copy

    out = []
    with without_numbers():
        trial = copy.deepcopy(config)
        shape: Any = PeftModel._class_for(trial)(hollow(model), trial, "default", empty=True)
        for field in ("optimizer", "rates", "clipping", "freezing"):
            if known & {field, f"{field}_fields"}:
                continue
            only = Recipe(**{f: getattr(recipe, f) for f in ("method", "learning_rate", "weight_decay")})
            setattr(only, field, getattr(recipe, field))
            only.optimizer_fields = recipe.optimizer_fields if field == "optimizer" else {}
            try:
                (optimizer_of if field in ("optimizer", "rates") else controls_of)(only, shape)
            except PeftError as e:
                out.append(Problem(field, str(e)))
    return out


def _pack(out: Plan, model: nn.Module, storage: str) -> None:
    """Count the linear weights as they are stored when packed."""
    packed = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] not in ("lm_head", *HEADS)]
    saved = sum(int(w.numel() * (w.element_size() - BITS[storage] / 8)) for w in packed)
    for key in ("weights", "peak"):
        if key in out.memory:
            out.memory[key] -= saved
    out.notes.append(
        f"Weights in {storage} are counted with {BITS[storage]:.2f} bits for each number; the step is that of unpacked weights."
    )
