"""Everything that is wrong with a configuration, found at once: each part is tried by itself, against the model where it needs one."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import PeftConfig
from ..engine.names import check_pattern
from ..engine.select import select
from ..errors import ConfigError, PeftError, PeftWarning, hint
from ..sites import adaptable


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        field: of the config or the recipe;  text: what is wrong, what was expected and the nearest right thing.
        fatal: whether it keeps the run from starting; else it is a warning.
    """

    field: str
    text: str
    fatal: bool = True

    def __str__(self) -> str:
        return self.text if self.field in self.text else f"{self.field}: {self.text}"


def build(cls: type[PeftConfig], given: Mapping[str, Any]) -> tuple[PeftConfig | None, list[Problem]]:
    """A config of the fields that are right, and what is wrong with the others; None if none can be made.

    Args:
        cls: the method's config class;  given: field -> value.
    """
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    problems = [Problem(k, f"{cls.__name__} has no field {k!r}.{hint(k, known)}") for k in given if k not in known]
    fields = {k: v for k, v in given.items() if k in known}
    whole, error = _tried(cls, fields)
    if whole is not None:
        return whole, problems
    for name, value in list(fields.items()):
        alone, why = _tried(cls, {name: value})
        rest, _ = _tried(cls, {k: v for k, v in fields.items() if k != name})
        if alone is None and (rest is not None or _tried(cls, {})[0] is not None):
            problems.append(Problem(name, str(why)))
            del fields[name]
    whole, error = _tried(cls, fields)
    if whole is None:  # fields that do not go together, or one that is missing
        problems.append(Problem(", ".join(fields) or cls.__name__, str(error)))
        for name in list(fields):
            left, _ = _tried(cls, {k: v for k, v in fields.items() if k != name})
            if left is not None:
                return left, problems
    return whole, problems


def _tried(cls: type[PeftConfig], fields: Mapping[str, Any]) -> tuple[PeftConfig | None, Exception | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        try:
            return cls(**copy.deepcopy(dict(fields))), None
        except (PeftError, TypeError, ValueError) as e:
            return None, e


def against(model: nn.Module, config: Any) -> tuple[Any, list[Problem]]:
    """A copy of the config with what fits the model, and a problem for each entry that does not."""
    config = copy.deepcopy(config)
    problems: list[Problem] = []
    if config.is_prompt_learning or not hasattr(config, "kinds"):
        return config, problems

    def attempt(**fields: Any) -> str | None:
        trial = copy.deepcopy(config)
        for name in ("modules_to_save", "target_parameters", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform"):
            if hasattr(trial, name) and name not in fields:
                setattr(trial, name, {} if name.endswith("pattern") else None)
        for name, value in fields.items():
            setattr(trial, name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("error", PeftWarning)
            try:
                select(model, trial, supports=lambda m: adaptable(m, trial.kinds))
            except (PeftError, PeftWarning) as e:
                return str(e)
        return None

    targets = getattr(config, "target_modules", None)
    if isinstance(targets, (list, tuple, set, frozenset)):
        keep = set(targets)
        for entry in sorted(targets):
            why = attempt(target_modules={entry}, modules_to_save=None)
            if why is not None:
                problems.append(Problem("target_modules", why))
                keep.discard(entry)
        config.target_modules = keep
    elif hasattr(config, "target_modules") and not getattr(config, "target_parameters", None):
        why = attempt(target_modules=targets)
        if why is not None:
            problems.append(Problem("target_modules", why))
            config.target_modules = set()
    fits = bool(getattr(config, "target_modules", True)) or targets is None
    base = {"target_modules": config.target_modules if fits else "all-linear"} if hasattr(config, "target_modules") else {}
    for name in ("modules_to_save", "target_parameters", "exclude_modules"):
        entries = getattr(config, name, None)
        if isinstance(entries, str):
            entries = [entries]
        for entry in sorted(entries or ()):
            why = attempt(**base, **{name: entry if isinstance(getattr(config, name), str) else [entry]})
            if why is not None and name in why:
                problems.append(Problem(name, why))
                value = getattr(config, name)
                setattr(config, name, None if isinstance(value, str) else type(value)(e for e in value if e != entry) or None)
    layers = getattr(config, "layers_to_transform", None)
    if layers is not None:
        why = attempt(**base, layers_to_transform=layers, layers_pattern=getattr(config, "layers_pattern", None))
        if why is not None:
            problems.append(Problem("layers_to_transform", why))
            config.layers_to_transform = None
    names = _names(model, config)
    for name in ("rank_pattern", "alpha_pattern"):
        for key in list(getattr(config, name, None) or {}) if names else ():
            try:
                check_pattern(name, {key: 1}, names, config)
            except ConfigError as e:
                problems.append(Problem(name, str(e)))
                getattr(config, name).pop(key)
    return config, problems


def _names(model: nn.Module, config: Any) -> list[str]:
    """What the config hits without its patterns; empty if nothing."""
    trial = copy.deepcopy(config)
    for name in ("rank_pattern", "alpha_pattern"):
        if hasattr(trial, name):
            setattr(trial, name, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        try:
            found = select(model, trial, supports=lambda m: adaptable(m, trial.kinds), strict=False)
        except PeftError:
            return []
    return [found.names[p] for p in found.modules] + found.parameters
