"""What a configuration is going to do to a model, before anything trains."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..bases import codec_for, stored_bytes
from ..engine.layer import adapted_layers
from ..engine.select import select
from ..engine.tree import places
from ..errors import ConfigError, PeftError, PeftWarning
from ..method import Method
from ..model import PeftModel
from ..sites import adaptable
from ..status import count_parameters
from ..types import name_of
from .footprint import Footprint, footprint, held, hollow, without_numbers
from .problems import Problem, against

Loss = Literal["model", "chunked"]


@dataclass(frozen=True)
class Hit:
    """One adapted module.

    Attributes:
        kind: of site, such as `linear`;  shape: (n_out, n_in) of its weight, or () where it is no single one;  rank: None for methods without one.
        parameters: that the adapter trains there.
    """

    kind: str
    shape: tuple[int, ...]
    rank: int | None
    parameters: int


@dataclass
class Plan:
    """What a run would be.

    Attributes:
        method: such as `LORA`;  config: what of the config fits the model.
        hits: by module: what the adapter is there;  missed: by module: why it gets none.
        whole: modules that train whole;  problems: all of them.
        trainable_parameters, all_parameters: numbers.
        flops: `forward` and `backward` of a batch, and `step`, all batches of an optimizer step together; empty if it was not asked for.
        memory: bytes of `weights`, `gradients`, `optimizer`, `activations` and `peak`, all of them together; the last two are there only if the step could be
            simulated. `activations` is what is alive beside the rest when most is: kept for the backward, and temporary.
        notes: what could not be told, and why.
    """

    method: str
    config: Any
    hits: dict[str, Hit] = field(default_factory=dict)
    missed: dict[str, str] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    trainable_parameters: int = 0
    all_parameters: int = 0
    flops: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    batch: tuple[int, int] = (0, 0)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether a run could start."""
        return not any(p.fatal for p in self.problems)

    def groups(self) -> dict[str, dict[str, int]]:
        """The hits by the last part of their names: how many, and their parameters."""
        out: dict[str, dict[str, int]] = {}
        for name, hit in self.hits.items():
            group = out.setdefault(name.rpartition(".")[2], {"count": 0, "parameters": 0})
            group["count"] += 1
            group["parameters"] += hit.parameters
        return out

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "config"}
        return {
            **out,
            "config": self.config.to_dict() if self.config is not None else None,
            "hits": {n: dataclasses.asdict(h) for n, h in self.hits.items()},
            "problems": [dataclasses.asdict(p) for p in self.problems],
            "ok": self.ok,
        }

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.trainable_parameters:,} of {self.all_parameters:,} parameters train"]
        lines += [f"  {n}: {g['count']} modules, {g['parameters']:,} parameters" for n, g in self.groups().items()]
        lines += [f"  {n}: trains whole" for n in self.whole]
        lines += [f"memory: {', '.join(f'{k} {v / 2**20:,.1f} MiB' for k, v in self.memory.items())}"] if self.memory else []
        lines += [f"work: {', '.join(f'{k} {v / 1e9:,.1f} GFLOP' for k, v in self.flops.items())}"] if self.flops else []
        lines += [f"problem: {p}" for p in self.problems] + [f"note: {n}" for n in self.notes]
        return "\n".join(lines)


def plan(
    model: nn.Module,
    config: Any = None,
    *,
    batch_size: int = 8,
    length: int = 512,
    accumulate: int = 1,
    optimizer: str = "adamw",
    loss: Loss | Callable[[Any], Tensor] = "model",
    gradient_checkpointing: bool = False,
    simulate: bool = True,
) -> Plan:
    """What a config would do to a model: what is hit and missed and why, parameters, memory, work, and every problem at once.

    The model is not changed, nothing is allocated and no value computed: the step is run on shapes alone. Weights may be on the meta device.

    Args:
        model: any; with adapters already, if `config` is None.
        config: a method's config, or None for the adapters that are there.
        batch_size, length: rows, and tokens per row, of a batch;  accumulate: batches per optimizer step.
        optimizer: "adamw" and its like keep two numbers per trained one, "sgd" none.
        loss: "model": the model's own, from `input_ids` and `labels`, or the sum of what it gives where it takes no labels; "chunked": that of
            `veneer train`, which never holds all logits; or a function that runs the forward of the model it is given and returns the loss, for any
            other kind of inputs.
        gradient_checkpointing: as transformers' models do it.
        simulate: whether to run the step, which tells `flops`, `activations` and `peak`.

    Raises:
        ConfigError: if there is neither a config nor an adapter. What is wrong with the config is no error: see `Plan.problems`.
    """
    problems: list[Problem] = []
    adapted = next(adapted_layers(model), None) is not None or isinstance(model, PeftModel)
    if config is None and not adapted:
        raise ConfigError("plan(model, config) needs a config, such as LoraConfig(), for a model without adapters.")
    name = _method(config if config is not None else next(iter(getattr(model, "peft_config", {}).values()), None))
    packed = [p.name for p in places(_root(model)) if not codec_for(p.base).plain]
    if config is None:
        out = Plan(name, None, batch=(batch_size, length))
        _measure(out, model, optimizer, stored_bytes(model) if packed else held(model))
    else:
        fitting, problems = against(model, config)
        out = Plan(name, fitting, problems=problems, batch=(batch_size, length))
        if isinstance(fitting, Method):
            out.missed = missed(model, fitting)
    if not simulate and config is None:
        return out
    if packed:
        out.notes.append(f"The weights are packed ({packed[0]} and {len(packed) - 1} more), and a step with them cannot be simulated.")
        if config is not None:
            out.notes.append("Attach the adapter and call plan(model) for its parameters.")
        return out
    with without_numbers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        shape: Any = hollow(model)
        if config is not None:
            weights = held(shape)
            trial = copy.deepcopy(out.config)
            try:
                shape = PeftModel._class_for(trial)(shape, trial, "default", empty=True)
            except (PeftError, ValueError, TypeError) as e:
                if not any(p.fatal for p in out.problems):  # else it follows from those
                    out.problems.append(Problem("config", str(e)))
                out.memory["weights"] = weights
                out.all_parameters = count_parameters(shape)[1]
                return out
            out.config = trial
            _measure(out, shape, optimizer, held(shape))
        if simulate:
            _simulate(out, shape, batch_size, length, accumulate, loss, gradient_checkpointing)
    return out


def _method(config: Any) -> str:
    kind = getattr(config, "peft_type", None)
    return name_of(kind or "NONE")


def _root(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[no-any-return]


def _measure(out: Plan, model: Any, optimizer: str, weights: int) -> None:
    """Fill in what the adapted model tells."""
    for path, layer in adapted_layers(_root(model)):
        for a in layer.attached.values():
            numbers = sum(a.tensor(n).numel() for n, leaf in a.leaves.items() if leaf.trainable and n not in a.derived)
            one = hasattr(layer.site, "n_out")
            shape = (layer.site.n_out, layer.site.n_in) if one else ()
            at = a.config
            out.hits[a.place.name if a.place is not None else path] = Hit(layer.site.kind, shape, getattr(at, "r", None), numbers)
    out.whole = sorted(getattr(model, "modules_to_save", None) or ())
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    states = {"sgd": 0}.get(optimizer, 2)
    out.trainable_parameters, out.all_parameters = sum(p.numel() for p in trained), count_parameters(model)[1]
    out.memory = {"weights": weights, "gradients": gradients, "optimizer": states * gradients + (4 * len(trained) if states else 0)}


def missed(model: nn.Module, config: Method) -> dict[str, str]:
    """By module: why it gets no adapter. Modules without tensors of their own are not listed.

    Args:
        model: without the adapter;  config: one that fits it, or nearly.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        try:
            selection: Any = select(model, config, supports=lambda m: adaptable(m, config.kinds), strict=False)
        except PeftError:
            selection = None
    hit = {selection.names[p] for p in selection.modules} if selection is not None else set()
    whole = {selection.names[p] for p in selection.to_save} if selection is not None else set()
    skipped: Mapping[str, str] = selection.skipped if selection is not None else {}
    out = {}
    for place in places(_root(model)):
        fits = bool(adaptable(place.base, config.kinds))
        if place.name in hit or (not fits and not any(True for _ in place.base.parameters(recurse=False))):
            continue
        if any(place.name == w or place.name.startswith(f"{w}.") for w in whole):
            out[place.name] = "trained whole (modules_to_save)"
        elif place.name in skipped:
            out[place.name] = skipped[place.name]
        elif any(place.name.startswith(f"{h}.") for h in hit):
            out[place.name] = "adapted as a part of the module around it"
        elif not fits:
            out[place.name] = f"{type(config).__name__} cannot adapt a {type(place.base).__name__}"
        elif getattr(config, "layers_to_transform", None) is not None:
            out[place.name] = (
                f"target_modules does not name it, or its layer is not among layers_to_transform={config.layers_to_transform!r}"  # type: ignore[attr-defined]
            )
        else:
            out[place.name] = "target_modules does not name it"
    return out


def _simulate(out: Plan, shape: Any, rows: int, length: int, accumulate: int, loss: Any, checkpointing: bool) -> None:
    if checkpointing:
        inner: Any = _root(shape)
        if not hasattr(inner, "gradient_checkpointing_enable"):
            out.problems.append(Problem("gradient_checkpointing", f"a {type(inner).__name__} has no gradient_checkpointing_enable()."))
            return
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        shape.prepare_model_for_gradient_checkpointing(inner)
    shape.train()
    try:
        found = footprint(shape, _runner(shape, rows, length, loss))
    except Exception as e:  # any model may fail in any way; the plan is still worth having
        first = (str(e).strip().splitlines() or [""])[0]
        out.notes.append(f"The step could not be simulated, so activations and work are unknown: {type(e).__name__}: {first}")
        return
    _take(out, found, accumulate)


def _take(out: Plan, found: Footprint, accumulate: int) -> None:
    held = out.memory["weights"] + out.memory["optimizer"]
    out.memory["activations"] = max(found.peak - out.memory["gradients"], 0)
    out.memory["peak"] = held + max(found.peak, out.memory["gradients"])
    out.flops = {"forward": found.forward, "backward": found.backward, "step": accumulate * (found.forward + found.backward)}


def _runner(shape: Any, rows: int, length: int, loss: Any) -> Callable[[], Tensor]:
    """The forward of a batch that only has a shape."""
    if callable(loss):
        return lambda: loss(shape)  # type: ignore[no-any-return]
    device = next(shape.parameters()).device
    limit = getattr(getattr(_root(shape), "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise ConfigError(f"length={length} is more than the model's {limit} positions")
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    if loss == "chunked":
        from ..training.loss import HeadlessLoss, summed_cross_entropy

        headless = HeadlessLoss.at_head(_root(shape))
        if headless is None:
            return _own(shape, ids)
        head = headless.head
        if any(c.is_prompt_learning for c in getattr(shape, "peft_config", {}).values()):
            with torch.no_grad():
                out = headless.hidden(shape, {"input_ids": ids[:1]}).shape[1]
            if out != length:  # the prompt comes out too: training takes the model's own loss
                return _own(shape, ids)

        def run() -> Tensor:
            h = headless.hidden(shape, {"input_ids": ids})[:, :-1]
            return summed_cross_entropy(h.reshape(-1, h.shape[-1]), head.weight, head.bias, ids[:, 1:].reshape(-1))

        return run

    return _own(shape, ids)


def _own(shape: Any, ids: Tensor) -> Callable[[], Tensor]:
    """The model's own loss, or the sum of what it gives."""

    def run() -> Tensor:
        kind = type(_root(shape)).__name__
        if "SequenceClassification" in kind:
            return shape(input_ids=ids, labels=ids[:, 0]).loss  # type: ignore[no-any-return]
        if "CausalLM" in kind or "LMHead" in kind or "ConditionalGeneration" in kind or "MaskedLM" in kind:
            return shape(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]
        made = shape(input_ids=ids)
        first = made if isinstance(made, Tensor) else made[0]
        return first.float().sum()  # type: ignore[no-any-return]

    return run
