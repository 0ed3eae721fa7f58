"""Which configuration to take: targets, rank of each layer, learning rate, batch, with the reasons."""

from __future__ import annotations

import copy
import itertools
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..bases import codec_for
from ..engine.select import select
from ..errors import ConfigError, PeftError, hint
from ..methods.lora import LoraConfig
from ..sites import supported
from .footprint import held
from .plan import Plan, plan
from .spectra import Search, allot, layer_spectra

_ROWS = 16  # rows of a step, all its batches together
_SPARE = 0.9  # the share of the memory that a plan may fill
_NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # bytes for each number, with its blocks' scales
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass
class Suggestion:
    """A configuration, and why.

    Attributes:
        config: of the adapter;  learning_rate: of AdamW;  batch_size, accumulate, length: of a step.
        quantize: the storage to load the model in, or None;  gradient_checkpointing: whether to trade time for memory.
        reasons: one sentence for each choice.
        plan: what it comes to: parameters, memory, work;  seconds_per_step: on this machine; None where no step was timed.
        ranks: by layer, as dealt out.
    """

    config: LoraConfig
    learning_rate: float
    batch_size: int
    accumulate: int
    length: int
    quantize: str | None
    gradient_checkpointing: bool
    reasons: list[str]
    plan: Plan
    seconds_per_step: float | None = None
    ranks: dict[str, int] = field(default_factory=dict)

    def recipe(self) -> dict[str, Any]:
        """The keys of a recipe for `veneer train`."""
        names = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
        fields = {n: getattr(self.config, n) for n in names}
        fields = {n: sorted(v) if isinstance(v, set) else v for n, v in fields.items() if v}
        out: dict[str, Any] = {
            "method": "lora",
            "method_fields": fields,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
        }
        out |= {"accumulate": self.accumulate, "length": self.length, "gradient_checkpointing": self.gradient_checkpointing}
        return {**out, "quantize": self.quantize} if self.quantize else out

    def __str__(self) -> str:
        return "\n".join(f"- {r}" for r in self.reasons)


def suggest(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]] | None = None,
    memory: str | float = "24GB",
    *,
    parameters: int | None = None,
    length: int | None = None,
    search: Search = "gradient",
    batches: int = 2,
    task_type: str | None = None,
) -> Suggestion:
    """Propose how to fine-tune a model within a memory.

    The method is LoRA on the linear layers; where the frozen weights alone would not fit, on weights packed in 4 bits. With data, the parameters are dealt
    out rank by rank to the layers where they are worth most; without, every layer has the same rank. The model is not changed.

    Args:
        model: a transformers model, or any whose forward takes the batches.
        data: batches, dicts of the arguments of the model's forward, with `labels` for the search by gradients. The first `batches` are looked at; a few
            hundred tokens in all are enough.
        memory: of the device: "24GB", "16GiB", or bytes.
        parameters: how many may train; by default as many as the rank 8 on every linear layer takes.
        length: tokens of a row in training; by default those of the data, else 512.
        search: "gradient" or "eva": what tells where ranks are worth most; see `layer_spectra`.
        task_type: for the config; by default told from the model's class.

    Raises:
        ConfigError: if the memory cannot be read or is too small for any of it, there is no such search, the model has no linear layers,
            or too few parameters may train.
    """
    room = _bytes(memory)
    known = get_args(Search)
    if search not in known:
        raise ConfigError(f"Unknown search {search!r}: {' or '.join(known)}.{hint(search, known)}")
    reasons: list[str] = []
    kind = type(model).__name__
    task_type = task_type or (
        "CAUSAL_LM" if "CausalLM" in kind or "LMHead" in kind else "SEQ_CLS" if "SequenceClassification" in kind else None
    )
    layers = _linear_layers(model, task_type)
    costs = {n: sum(_sides(m)) for n, m in layers.items()}
    budget = parameters if parameters is not None else 8 * sum(costs.values())
    if budget < min(costs.values()):
        raise ConfigError(f"parameters={budget} are too few: one rank on the smallest linear layer takes {min(costs.values())}.")
    seen = list(itertools.islice(data, batches)) if data is not None else []
    if data is not None and not seen:
        raise ConfigError("The data give no batch.")
    if task_type == "CAUSAL_LM" and search == "gradient":
        seen = [{"labels": b["input_ids"], **b} if "input_ids" in b else b for b in seen]
    speed = None
    if seen:
        most = max(1, min(64, max(8, 4 * budget // sum(costs.values()))))
        started = time.perf_counter()
        gains, tokens = layer_spectra(model, layers, seen, most, search)
        seconds = time.perf_counter() - started
        numbers = sum(math.prod(_sides(m)) for m in layers.values())
        speed = 2 * tokens * numbers * (2 if search == "gradient" else 1) / seconds
        ranks = allot(gains, costs, budget, per_cost=search == "gradient")
        how = "the gradients of their weights" if search == "gradient" else "how their inputs vary (EVA)"
        top = _best(ranks)
        reasons.append(
            f"Ranks: dealt out by {how} over {tokens} tokens in {seconds:.1f} s, {_range(ranks.values())} by layer; the most went to {top}."
        )
    else:
        ranks = dict.fromkeys(layers, max(1, budget // sum(costs.values())))
        if sum(costs.values()) > budget:  # not even one everywhere: the cheapest ranks first, spread over the depth
            ranks = allot({n: [1.0] for n in layers}, costs, budget, per_cost=True)
        reasons.append(f"Ranks: {_range(ranks.values())} on every layer, since there are no data to tell layers apart.")
    ranks = {n: r for n, r in ranks.items() if r}
    config = _config(layers, ranks, task_type)
    whole = len(ranks) == len(layers)
    reasons.insert(
        0,
        f"Targets: {'all' if whole else f'{len(ranks)} of'} {len(layers)} linear layers: at equal parameters, low ranks everywhere learn more than high "
        "ranks on the attention alone.",
    )
    width = getattr(getattr(model, "config", None), "hidden_size", None) or max(min(_sides(m)) for m in layers.values())
    rate = float(f"{5e-4 * (2000 / width) ** 0.775:.1e}")
    # the rate: Schulman and others 2025, "LoRA Without Regret": ten times 5e-5, falling with the width as in their fit
    reasons.append(
        f"Learning rate: {rate:g}, ten times what full fine-tuning at a width of {width} takes; lora_alpha is 2 r on every layer, so that it hardly "
        "depends on the rank."
    )
    length = length or next((int(t.shape[1]) for b in seen for t in b.values() if isinstance(t, Tensor) and t.ndim == 2), 512)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    length = min(length, limit) if isinstance(limit, int) else length
    found = _fit(model, config, room, length, seen, reasons)
    step = found.plan.flops.get("step")
    if step and speed:
        found.seconds_per_step = step / speed
        reasons.append(f"Time: about {found.seconds_per_step:.1f} s a step here, at the {speed / 1e9:,.0f} GFLOP/s of the rank search.")
    found.learning_rate, found.ranks = rate, ranks
    return found


def _bytes(memory: str | float) -> int:
    """Bytes of "24GB" and the like."""
    if isinstance(memory, str):
        m = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]i?|)b?\s*", memory.lower())
        if m is None or m[1].count(".") > 1:
            raise ConfigError(f"memory is bytes or a text such as '24GB' or '16GiB', got {memory!r}.")
        memory = float(m[1]) * _UNITS[m[2]]
    if not memory > 0:
        raise ConfigError(f"memory has to be positive, got {memory}.")
    return int(memory)


def _linear_layers(model: nn.Module, task_type: Any) -> dict[str, nn.Module]:
    """Those that LoRA on all linear layers would adapt: a classifier's head trains whole."""
    try:
        found = select(
            model, LoraConfig(target_modules="all-linear", task_type=task_type), supports=lambda m: supported(m) == "linear"
        ).modules
    except PeftError as e:
        raise ConfigError(f"There is nothing to suggest for this model: {e}") from e
    return dict(found)


def _sides(layer: Any) -> tuple[int, int]:
    """(n_out, n_in)."""
    if hasattr(layer, "out_features"):
        return int(layer.out_features), int(layer.in_features)
    return int(layer.weight.shape[1]), int(layer.weight.shape[0])  # transformers' Conv1D


def _config(layers: Mapping[str, nn.Module], ranks: Mapping[str, int], task_type: str | None) -> LoraConfig:
    targets: Any = "all-linear" if len(ranks) == len(layers) else set(ranks)
    plain = LoraConfig(target_modules=targets, task_type=task_type)  # type: ignore[arg-type]
    out: LoraConfig = plain.over({n: {"r": r, "lora_alpha": 2 * r} for n, r in ranks.items()})  # type: ignore[assignment]
    return out


def _best(ranks: Mapping[str, int]) -> str:
    by: dict[str, list[int]] = {}
    for name, r in ranks.items():
        by.setdefault(name.rpartition(".")[2], []).append(r)
    mean = {n: sum(v) / len(v) for n, v in by.items()}
    best = sorted(mean, key=lambda n: -mean[n])[:2]
    return " and ".join(f"{n} ({mean[n]:.1f} on average)" for n in best)


def _range(values: Iterable[int]) -> str:
    low, high = min(all_ := list(values)), max(all_)
    return str(low) if low == high else f"{low} to {high}"


def _fit(model: nn.Module, config: LoraConfig, room: int, length: int, seen: list[Any], reasons: list[str]) -> Suggestion:
    """The storage, the batch and the checkpointing that fit."""
    usable = int(_SPARE * room)
    weights = held(model)
    linear: list[Any] = [m for m in _linear_layers(model, config.task_type).values() if codec_for(m).plain]
    packed = weights - sum(int(m.weight.nbytes - m.weight.numel() * _NF4) for m in linear)
    loss: Any = _loss_of(model, seen)
    known: dict[tuple[int, bool], Plan] = {}

    def planned(rows: int, checkpointing: bool, base: int) -> Plan:
        if (rows, checkpointing) not in known:
            known[rows, checkpointing] = plan(
                model, config, batch_size=rows, length=length, loss=loss, gradient_checkpointing=checkpointing
            )
        out = copy.deepcopy(known[rows, checkpointing])
        for key in ("weights", "peak"):
            if key in out.memory:
                out.memory[key] -= weights - base
        return out

    can = hasattr(model, "gradient_checkpointing_enable")
    ways = [(q, c) for q in (None, "nf4") for c in (False, True) if (can or not c) and (linear or not q)]
    for quantize, checkpointing in ways:  # from the fastest to the smallest
        base = packed if quantize else weights
        if quantize is None and weights > 0.7 * usable and linear:
            continue
        one = planned(1, checkpointing, base)
        if "peak" not in one.memory:
            reasons.append(f"Batch: 1 row, since the step could not be simulated: {one.notes[-1] if one.notes else ''}")
            return Suggestion(config, 0.0, 1, _ROWS, length, quantize, False, reasons, one)
        fixed = one.memory["peak"] - one.memory["activations"]
        rows = min(_ROWS, (usable - fixed) // max(one.memory["activations"], 1))
        if rows >= 1 and (rows >= 2 or checkpointing or not can):
            rows = 2 ** int(math.log2(rows))
            final = planned(rows, checkpointing, base) if rows > 1 else one
            while rows > 1 and final.memory["peak"] > usable:
                rows //= 2
                final = planned(rows, checkpointing, base)
            final.flops["step"] = _ROWS // rows * (final.flops["forward"] + final.flops["backward"])
            reasons.append(_storage_reason(weights, base, quantize, room))
            reasons.append(
                f"Batch: {rows} rows of {length} tokens, {_ROWS // rows} of them a step: a predicted peak of {final.memory['peak'] / 2**20:,.0f} MiB"
                f"{', with gradient checkpointing, without which it would not fit' if checkpointing else ''}."
            )
            return Suggestion(config, 0.0, rows, _ROWS // rows, length, quantize, checkpointing, reasons, final)
    raise ConfigError(
        f"{room / 1e9:.3g} GB are too little: one row of {length} tokens takes {one.memory['peak'] / 1e9:.3g} GB even so, and a tenth stays free. "
        "Give a shorter length or more memory."
    )


def _storage_reason(weights: int, base: int, quantize: str | None, room: int) -> str:
    if quantize:
        said = f"Method: LoRA on weights packed as {quantize} (QLoRA): as they are they take {weights / 1e9:.2f} GB of {room / 1e9:.2f} GB"
        return f"{said}, packed {base / 1e9:.2f} GB."
    said = f"Method: LoRA on the weights as they are: their {weights / 1e9:.2f} GB leave room in {room / 1e9:.2f} GB"
    return f"{said}, so packing them would only cost time."


def _loss_of(model: nn.Module, seen: list[Any]) -> Any:
    """How to run a step of this model: as `veneer train` does where it is a language model, else as the data do."""
    kind = type(model).__name__
    if "CausalLM" in kind or "LMHead" in kind:
        return "chunked"
    if hasattr(model, "config") or not seen:
        return "model"
    first = seen[0]

    def run(shape: Any) -> Tensor:
        out = shape(**{n: torch.zeros_like(t) if isinstance(t, Tensor) else t for n, t in first.items()})
        loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
        return loss if loss is not None else (out if isinstance(out, Tensor) else out[0]).sum()

    return run
