"""What a recipe says about optimizers and controls, made of it.

optimizer: loraplus                 # adamw, loraplus, lorafa, riemannian
optimizer_fields: {loraplus_lr_ratio: 16}
rates: {decay: 0.9, bands: [0.5, 1.0], patterns: {lora_B: 4}, weight_decay: {lora_A: 0.1}}
clipping: {norm: 1.0, by: module, patterns: {lora_B: 0.5}}      # or a number
freezing: {every: 100}              # or a list of phases, such as {step: 0, layers: "-2:"}
statistics: {every: 10, tensorboard: true}                      # or a number
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..control import Control, FreezingSchedule, LayerClipping, Rates, parameter_groups
from ..control.freezing import read_phases
from ..control.statistics import LayerStatistics
from ..errors import ConfigError, hint
from ..optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from .processes import is_first

if TYPE_CHECKING:
    from .recipe import Recipe

STATISTICS = "statistics.jsonl"
_ADAM = ("betas", "eps", "amsgrad", "fused")
OPTIMIZERS: Mapping[str, Sequence[str]] = {
    "adamw": _ADAM,
    "loraplus": ("loraplus_lr_ratio", "loraplus_weight_decay", "loraplus_lr_embedding", *_ADAM),
    "lorafa": (),
    "riemannian": ("reg", *_ADAM),
}


def problems_of(recipe: Recipe) -> list[tuple[str, str]]:
    """(field, what is wrong) for what can be seen to be wrong without a model."""
    out: list[tuple[str, str]] = []

    def tried(field: str, make: Callable[[], Any]) -> None:
        try:
            make()
        except ConfigError as e:
            out.append((field, str(e)))

    if recipe.optimizer not in OPTIMIZERS:
        text = f"Unknown optimizer {recipe.optimizer!r}. There are {', '.join(OPTIMIZERS)}.{hint(str(recipe.optimizer), OPTIMIZERS)}"
        out.append(("optimizer", text))
    else:
        tried("optimizer_fields", lambda: _optimizer_fields(recipe))
        if recipe.rates and recipe.optimizer != "adamw":
            text = f"rates act with optimizer: adamw, not with {recipe.optimizer}, which makes groups of its own. LoRA+ with rates is "
            out.append(("rates", text + "optimizer: adamw, rates: {patterns: {lora_B: 16}}."))
        if recipe.optimizer == "lorafa" and recipe.method.lower() != "lora":
            out.append(("optimizer", f"The optimizer lorafa works on method: lora, not on {recipe.method!r}."))
    tried("rates", lambda: _rates(recipe))
    tried("clipping", lambda: _clipping(recipe))
    if recipe.freezing is not None:
        tried("freezing", lambda: read_phases(recipe.freezing, 2))
    tried("statistics", lambda: _statistics(recipe))
    return out


def _known(what: str, given: Any, known: Sequence[str]) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{what} has keys and values, got {given!r}.")
    for key in given:
        if key not in known:
            raise ConfigError(f"{what}: unknown key {key!r}. There are {', '.join(known) or 'none'}.{hint(str(key), known)}")


def _optimizer_fields(recipe: Recipe) -> dict[str, Any]:
    _known("optimizer_fields", recipe.optimizer_fields, OPTIMIZERS[recipe.optimizer])
    try:
        torch.optim.AdamW([torch.zeros(1)], **{k: v for k, v in recipe.optimizer_fields.items() if k in _ADAM})
    except (TypeError, ValueError, RuntimeError) as e:
        raise ConfigError(f"optimizer_fields: AdamW does not take {recipe.optimizer_fields}: {e}.") from e
    return dict(recipe.optimizer_fields)


def _rates(recipe: Recipe) -> Rates | None:
    _known("rates", recipe.rates, [f.name for f in dataclasses.fields(Rates)])
    return Rates(**recipe.rates) if recipe.rates else None


def _clipping(recipe: Recipe) -> dict[str, Any] | None:
    if recipe.clipping is None:
        return None
    spec = recipe.clipping if isinstance(recipe.clipping, Mapping) else {"norm": recipe.clipping}
    _known("clipping", spec, ("norm", "by", "patterns"))
    if "norm" not in spec:
        raise ConfigError("clipping: `norm` is missing, the largest norm of a layer's gradient.")
    return dict(spec)


def _statistics(recipe: Recipe) -> dict[str, Any] | None:
    if not recipe.statistics:
        return None
    spec = recipe.statistics if isinstance(recipe.statistics, Mapping) else {"every": recipe.statistics}
    _known("statistics", spec, ("every", "tensorboard"))
    every = spec.get("every", 10)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ConfigError(f"statistics: every is a number of steps, 1 or more, got {every!r}.")
    return {"every": every, "tensorboard": bool(spec.get("tensorboard", False))}


def optimizer_of(recipe: Recipe, model: Any) -> torch.optim.Optimizer | None:
    """The recipe's optimizer; None: the Trainer's own AdamW.

    Raises:
        ConfigError: if it does not fit the model.
    """
    lr, fields = recipe.learning_rate, _optimizer_fields(recipe)
    if "betas" in fields:
        fields["betas"] = tuple(fields["betas"])
    if recipe.optimizer == "loraplus":
        fields = {"loraplus_lr_ratio": 16.0, "loraplus_weight_decay": recipe.weight_decay, **fields}
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=lr, **fields)
    if recipe.optimizer == "lorafa":
        config = model.peft_config["default"]
        return create_lorafa_optimizer(model, config.r, config.lora_alpha, lr, recipe.weight_decay)
    if recipe.optimizer == "riemannian":
        return create_riemannian_optimizer(model, torch.optim.AdamW, lr=lr, weight_decay=recipe.weight_decay, **fields)
    if not recipe.rates and not fields:
        return None
    return torch.optim.AdamW(rate_groups(recipe, model), lr=lr, **fields)


def rate_groups(recipe: Recipe, model: Any) -> list[dict[str, Any]]:
    """The parameter groups of AdamW with the recipe's rates.

    Raises:
        ConfigError: if they do not fit the model.
    """
    return parameter_groups(model, recipe.learning_rate, _rates(recipe), recipe.weight_decay)


def controls_of(recipe: Recipe, model: Any) -> list[Control]:
    """The recipe's controls, in the order in which they act.

    Raises:
        ConfigError: if they do not fit the model.
    """
    out: list[Control] = []
    if recipe.freezing is not None:
        from ..control import trained

        out.append(FreezingSchedule(model, read_phases(recipe.freezing, trained(model)[1].count)))
    clipping = _clipping(recipe)
    if clipping is not None:
        out.append(LayerClipping(model, **clipping))
    statistics = _statistics(recipe)
    if statistics is not None:
        place = Path(recipe.out)  # of several processes, which measure the same, one writes
        board = str(place / "tensorboard") if statistics["tensorboard"] and is_first() else None
        out.append(LayerStatistics(model, statistics["every"], json_path=place / STATISTICS if is_first() else None, tensorboard=board))
    return out
