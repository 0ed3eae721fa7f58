"""Intruder dimensions: directions that a LoRA has brought into a weight and that are like none of its own, made smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .deltas import thin
from .engine.combine import CombineReport, finished, layers_of
from .engine.parts import Combined, Parts, Recipe, Total, by_group, is_thin
from .engine.route import check_known
from .errors import ConfigError
from .inits.base import singular
from .methods.lora import LoraConfig


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], object] | None = print,
) -> CombineReport:
    """Make a LoRA that forgets less than a given one, from it alone, and let it act.

    An intruder is one of the `top_k` left singular vectors u of W + ΔW with |cos(u, v)| < `threshold_epsilon` for every left singular vector v of W.
    The new ΔW is ΔW + (λ - 1) Σ σ u vᵀ over the intruders, cut to the old rank. Shuttleworth et al. 2024, arXiv:2410.21228.

    Args:
        peft_model: a PeftModel with LoRA adapters.
        old_adapter_name, new_adapter_name: the adapter that is read, and the name of the new one.
        top_k: how many singular vectors of each changed weight are looked at.
        threshold_epsilon: below which similarity one is an intruder.
        mitigation_lambda: λ, what is left of an intruder.
        logging_sink: gets one line per layer; None for silence.

    Returns:
        by layer, the rank and what cutting lost.

    Raises:
        ConfigError: if the adapter is no LoRA without options that scale rows or depend on the input, or the new name is taken.
        RouteError: if there is no old one.
    """
    say = logging_sink or (lambda line: None)
    check_known([old_adapter_name], list(peft_model.peft_config))
    config = peft_model.peft_config[old_adapter_name]
    if not isinstance(config, LoraConfig) or config.unmergeable:
        raise ConfigError("The provided model is not using LoRA and is therefore not supported.")
    if new_adapter_name in peft_model.peft_config:
        raise ConfigError(f"There is already an adapter {new_adapter_name!r}. Choose another name.")
    root, mine = peft_model.get_base_model(), {old_adapter_name: config}
    report, here, tensors = CombineReport(), {}, {}
    for layer, path in layers_of(root, mine).items():
        parts = Parts.of(layer, {old_adapter_name: 1.0}, mine, Recipe())
        (change,) = parts.changes
        found = parts.piece(change)
        if not is_thin(change) or change.gain is not None or not isinstance(found, tuple):
            raise ConfigError(f"{path!r}: only a plain LoRA has its intruders reduced, and this one is more (DoRA?). Convert it first.")
        up, down, scale = found
        more_up, more_down, count = _intruders(by_group(parts.site.weight(), parts.site), up * scale, down, top_k, threshold_epsilon)
        say(f"{path}: Intruders: {count}" if count else f"{path}: No intruders")
        total, lost = Total(up * scale / layer.factor, down), 0.0
        if count:
            cut = thin.of_product(
                torch.cat([up * scale, more_up], -1), torch.cat([down, (mitigation_lambda - 1) * more_down], -2)
            )  # fmt: skip
            r = down.shape[-2]
            us, v = cut.factors(r)
            root_s = cut.s[..., :r].sqrt()  # shared out between the two, so that both train alike
            us, v = us / root_s.clamp_min(1e-30).unsqueeze(-2), v * root_s.unsqueeze(-1)
            total, lost = Total((us / layer.factor).to(up), v.to(down)), cut.error(r)
        if change.shift is not None:
            total.shift = change.shift / layer.factor
        here[parts.site.called], tensors[layer] = LoraConfig.holding(total, parts.site)
        report.layers[path] = Combined(down.shape[-2] * parts.site.groups, lost)
    made = finished(root, config.over(here), mine, tensors, report)
    peft_model.base_model.inject(made.config, new_adapter_name, empty=True)
    made.fill(new_adapter_name)
    say(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)
    return report


def _intruders(w: Tensor, up: Tensor, down: Tensor, top_k: int, epsilon: float) -> tuple[Tensor, Tensor, int]:
    """The intruders' U S and V in W + up @ down, and how many; of a stack of weights each, filled up with zeros."""
    if w.ndim > 2:
        each = [_intruders(m, u, d, top_k, epsilon) for m, u, d in zip(w, up, down, strict=True)]
        k = max(n for _, _, n in each)
        ups, downs = torch.stack([u[:, :k] for u, _, _ in each]), torch.stack([d[:k] for _, d, _ in each])
        return ups, downs, k
    w = thin.wide(w)
    own = singular(w, min(w.shape))[0]
    u, s, v = singular(w + thin.wide(up) @ thin.wide(down), min(top_k, *w.shape))
    strange = (u.mT @ own).abs().amax(1) < epsilon
    kept = strange.to(s)
    order = torch.argsort(kept, descending=True, stable=True)  # the intruders first
    return (u * (s * kept))[:, order].to(up), v[order].to(down), int(strange.sum())
