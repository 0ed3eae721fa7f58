"""What is in an adapter's folder or file, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.base import START_KEY
from ..checkpoint.keys import PREFIX
from ..checkpoint.load import AdapterFile, load_start, read_adapter, read_safetensors
from ..checkpoint.save import finite
from ..control.spectra import effective_rank, singular_values
from ..deltas.thin import of_product
from ..engine.layer import adapted_layers
from ..engine.names import match
from ..errors import ConfigError, LoadError, PeftError, hint
from ..method import Method, config_class
from .problems import Problem, build

_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"), ("lora_down.weight", "lora_up.weight"))
_CONFIG = "adapter_config.json"
_OWN = ("auto_mapping", "peft_version", "peft_type")


@dataclass
class LayerView:
    """One layer of an adapter.

    Attributes:
        rank: of its change; None where that is not known from the file.
        tensors: shape of each, by name;  norms: 2-norm of each.
        singular: of ΔW, falling; empty where ΔW is not known (see `inspect_adapter`).
        delta: ‖ΔW‖, Frobenius;  effective_rank: exp of the entropy of the singular values.
    """

    rank: int | None = None
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    singular: list[float] = field(default_factory=list)

    @property
    def delta(self) -> float | None:
        return math.sqrt(sum(s * s for s in self.singular)) if self.singular else None

    @property
    def effective_rank(self) -> float | None:
        return effective_rank(torch.tensor(self.singular)) if self.singular else None


@dataclass
class Inspection:
    """An adapter, looked at.

    Attributes:
        path: of the file;  method: such as `LORA`, "?" if nothing tells;  base: the name of the base model, if it is known.
        config: the fields of its config that are not at their defaults;  parameters, bytes, dtypes: of its tensors.
        layers: by the module's name;  problems: what is wrong, and what is suspicious (not fatal);  notes: what could not be told.
    """

    path: str
    method: str = "?"
    base: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    bytes: int = 0
    dtypes: list[str] = field(default_factory=list)
    layers: dict[str, LayerView] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing fatal is wrong."""
        return not any(p.fatal for p in self.problems)

    @property
    def ranks(self) -> dict[int, int]:
        """How many layers have each rank."""
        found = [v.rank for v in self.layers.values() if v.rank is not None]
        return {r: found.count(r) for r in sorted(set(found))}

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        layers = {n: {**dataclasses.asdict(v), "delta": v.delta, "effective_rank": v.effective_rank} for n, v in self.layers.items()}
        return {**dataclasses.asdict(self), "layers": layers, "ranks": self.ranks, "ok": self.ok}

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draw the spectra: a row for each layer, from the input up, and ‖ΔW‖ beside them; without spectra, the norms of the tensors.

        Raises:
            ConfigError: if there is nothing to draw, or matplotlib is not installed.
        """
        from ..control.pictures import heat

        seen = {n: v for n, v in self.layers.items() if v.singular}
        if seen:
            width = max(len(v.singular) for v in seen.values())
            grid = [[_log(v.singular[i]) if i < len(v.singular) else math.nan for i in range(min(width, 64))] for v in seen.values()]
            heat(path, "log10 of the singular values of ΔW", grid, "number", [v.delta or 0.0 for v in seen.values()], "‖ΔW‖")
            return
        if not self.layers:
            raise ConfigError(f"{self.path} holds no layers to draw.")
        names = sorted({t for v in self.layers.values() for t in v.norms})
        grid = [[_log(v.norms[n]) if n in v.norms else math.nan for n in names] for v in self.layers.values()]
        total = [math.sqrt(sum(x * x for x in v.norms.values())) for v in self.layers.values()]
        heat(path, "log10 of the norms of the tensors", grid, ", ".join(names)[:60], total, "norm")


def _log(x: float) -> float:
    return math.log10(x) if x > 0 else math.nan


def inspect_adapter(path: str | os.PathLike[str], model: nn.Module | None = None) -> Inspection:
    """Look at a saved adapter: method, base, ranks, norms, spectra of each layer, problems. Nothing is loaded into a model but a `model` given.

    Singular values of ΔW are known for LoRA from the file alone (with DoRA and its like: of the low-rank part), and for every other method if its base
    model is given, which then gets the adapter.

    Args:
        path: an adapter's folder, or a file of tensors.
        model: the base model, without adapters.

    Raises:
        LoadError: if there is no such folder or file. Damage is no error here, but a problem.
    """
    where = Path(path)
    if not where.exists():
        near = [p.name for p in where.parent.iterdir()] if where.parent.is_dir() else []
        raise LoadError(f"There is no adapter {str(path)!r}.{hint(where.name, near)}")
    out = Inspection(str(path))
    folder = where if where.is_dir() else where.parent
    config = _read_config(out, folder / _CONFIG, where.is_dir())
    file = _read_tensors(out, where)
    if file is None:
        return out
    if not file.tensors:
        out.problems.append(Problem("tensors", f"{file.path.name} holds no tensors, so there is no adapter in it. Save the adapter again."))
        return out
    out.parameters = sum(t.numel() for t in file.tensors.values())
    out.bytes = sum(t.nbytes for t in file.tensors.values())
    out.dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in file.tensors.values()})
    _read_layers(out, file, config)
    _check_values(out, file)
    if config is not None:
        _check_config(out, config)
    if model is not None and out.ok and where.is_dir():
        _measure(out, where, model)
    elif not any(v.singular for v in out.layers.values()):
        out.notes.append("ΔW of this method is known only with the base model: give it as `model`.")
    return out


def _read_config(out: Inspection, path: Path, needed: bool) -> Any:
    if not path.is_file():
        text = f"There is no {_CONFIG} beside the tensors, so method, base model and scaling are unknown."
        out.problems.append(Problem("config", text, fatal=needed))
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        out.problems.append(Problem("config", f"{path.name} is not JSON: {e}"))
        return None
    if not isinstance(found, dict) or not found.get("peft_type"):
        out.problems.append(Problem("config", f"{path.name} names no method: it has no `peft_type`, such as 'LORA'."))
        return None
    out.method, out.base = str(found["peft_type"]), found.get("base_model_name_or_path")
    if not out.base:
        out.notes.append(f"{path.name} does not name its base model.")
    try:
        cls = config_class(out.method)
    except ConfigError as e:
        out.problems.append(Problem("peft_type", str(e)))
        return None
    config, wrong = build(cls, {k: v for k, v in found.items() if k not in _OWN})
    out.problems += [dataclasses.replace(p, fatal=False) if "has no field" in p.text else p for p in wrong]
    plain, _ = build(cls, {})
    defaults = plain.to_dict() if plain is not None else {}
    values = config.to_dict() if config is not None else found
    out.config = {k: v for k, v in values.items() if v != defaults.get(k) and k not in (*_OWN, "base_model_name_or_path", "inference_mode")}
    return config


def _read_tensors(out: Inspection, where: Path) -> AdapterFile | None:
    try:
        if where.is_dir():
            return read_adapter(where)
        if where.suffix == ".safetensors":
            tensors, metadata = read_safetensors(where)
            start = load_start(where, metadata, where.parent) if START_KEY in metadata else None
            return AdapterFile(tensors, where, metadata, start)
        found = torch.load(where, map_location="cpu", weights_only=True)
        return AdapterFile({k: t for k, t in found.items() if isinstance(t, Tensor)}, where)
    except Exception as e:  # whatever is wrong with a file is what is asked for
        out.problems.append(
            Problem("tensors", str(e) if isinstance(e, PeftError) else f"{where.name} cannot be read: {type(e).__name__}: {e}")
        )
        return None


def _read_layers(out: Inspection, file: AdapterFile, config: Any) -> None:
    prefix = getattr(config, "prefix", "") or "lora_"
    groups: dict[str, dict[str, Tensor]] = {}
    start: dict[str, dict[str, Tensor]] = {}
    for held, into in ((file.tensors, groups), (file.start or {}, start)):
        for key, t in held.items():
            layer, leaf = _split(key, prefix)
            into.setdefault(layer, {})[leaf] = t
    for layer, tensors in groups.items():
        view = LayerView(tensors={n: tuple(t.shape) for n, t in tensors.items()})
        view.norms = {n: float(t.double().norm()) if t.is_floating_point() else float(t.count_nonzero()) for n, t in tensors.items()}
        pair = _pair(out, layer, tensors)
        if pair is not None:
            a, b = pair
            view.rank = a.shape[0]
            scale = _scale(config, layer, tensors, view.rank)
            a, b = a.double(), b.double()
            if bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all()):
                up, down = b.flatten(1) * scale, a.flatten(1)
                first = start.get(layer, {})
                if "lora_A0.weight" in first and "lora_B0.weight" in first:  # the change is counted from there
                    up, down = torch.cat([up, -scale * first["lora_B0.weight"]], 1), torch.cat([down, first["lora_A0.weight"]])
                view.singular = of_product(up.double(), down.double()).s.tolist()
        out.layers[layer] = view


def _split(key: str, prefix: str) -> tuple[str, str]:
    """(module, the tensor's name there)."""
    parts = key.removeprefix(PREFIX).split(".")
    at = next((i for i, p in enumerate(parts) if p.startswith((prefix, "lora_"))), max(len(parts) - 1, 0))
    return ".".join(parts[:at]) or "(outside the layers)", ".".join(parts[at:])


def _pair(out: Inspection, layer: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    for down, up in _PAIRS:
        there = [n for n in (down, up) if n in tensors]
        if len(there) == 1:
            out.problems.append(Problem("tensors", f"{layer}: there is {there[0]!r} and no {(up if there[0] == down else down)!r}."))
        if len(there) == 2:
            a, b = tensors[down], tensors[up]
            if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1]:
                text = f"{layer}: {down} is {tuple(a.shape)} and {up} {tuple(b.shape)}, which are no factors of one rank."
                out.problems.append(Problem("tensors", text, fatal=a.ndim < 2 or b.ndim < 2 or a.shape[0] % max(b.shape[1], 1) != 0))
                return None
            return a, b
    return None


def _scale(config: Any, layer: str, tensors: Mapping[str, Tensor], rank: int) -> float:
    if "alpha" in tensors:
        return float(tensors["alpha"]) / rank
    return float(config.at(layer).scale()) if isinstance(config, Method) else 1.0


def _check_values(out: Inspection, file: AdapterFile) -> None:
    broken = [k for k, t in file.tensors.items() if t.is_floating_point() and not finite(t)]
    if broken:
        more = f" and {len(broken) - 1} more tensors" if broken[1:] else ""
        out.problems.append(
            Problem("tensors", f"{broken[0]!r}{more} hold values that are not finite: the training diverged. Use an earlier checkpoint.")
        )
    seen = {n: v for n, v in out.layers.items() if v.singular}
    dead = [n for n, v in seen.items() if not v.delta]
    if dead:
        every = len(dead) == len(seen)
        what = (
            "every layer, so the adapter does nothing: it was saved before it was trained"
            if every
            else f"{len(dead)} of {len(seen)} layers"
        )
        out.problems.append(Problem("tensors", f"ΔW is zero on {what} ({dead[0]!r}).", fatal=every))
    named = [k for k in file.tensors if re.search(r"\.(lora_[AB]|modules_to_save)\.(?!weight|bias)[^.]+\.", k)]
    if named:
        text = f"Keys such as {named[0]!r} hold an adapter's name, which files have not. Save with save_pretrained, or get_peft_model_state_dict."
        out.problems.append(Problem("tensors", text))
    wasted = [n for n, v in seen.items() if v.rank and v.rank >= 4 and v.delta and (v.effective_rank or 0) < v.rank / 3]
    if wasted:
        view = seen[wasted[0]]
        out.problems.append(
            Problem(
                "rank", f"{len(wasted)} of {len(seen)} layers use less than a third of their rank, such as {wasted[0]!r} with an effective rank of "
                f"{view.effective_rank:.1f} of {view.rank}. A smaller r would do.", fatal=False,
            )
        )  # fmt: skip


def _check_config(out: Inspection, config: Any) -> None:
    for name, view in out.layers.items():
        wanted = getattr(config.at(name), "r", None) if isinstance(config, Method) else None
        if view.rank is not None and isinstance(wanted, int) and wanted > 0 and view.rank % wanted:
            text = f"{name}: the config says rank {wanted}, and the tensors have {view.rank}. The scaling is then not that of the training."
            out.problems.append(Problem("r", text))
            break
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, (set, list, tuple)):
        names = list(out.layers)
        idle = sorted(t for t in targets if not match(names, [t]))
        if idle:
            text = (
                f"The config names {idle[0]!r}{f' and {len(idle) - 1} more targets' if idle[1:] else ''}, of which the file has no tensors."
            )
            out.problems.append(Problem("target_modules", text + hint(idle[0], {n.rpartition(".")[2] for n in names}), fatal=False))


def _measure(out: Inspection, folder: Path, model: nn.Module) -> None:
    """Singular values of every layer's ΔW, from the model with the adapter."""
    from ..model import PeftModel

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            loaded = PeftModel.from_pretrained(model, folder)
        except (PeftError, ValueError) as e:
            out.problems.append(Problem("model", f"The adapter does not load into this model: {e}"))
            return
    out.problems += [Problem("model", str(w.message), fatal=False) for w in told]
    for path, layer in adapted_layers(loaded.get_base_model()):
        s = singular_values(layer, "default") if "default" in layer.attached else None
        view = out.layers.get(path)
        if s is not None and view is not None:
            view.singular = s.tolist()
            if view.rank is None:
                view.rank = getattr(layer.attached["default"].config, "r", None)
