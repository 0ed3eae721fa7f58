"""LoRA-GA: a start along the gradient of the full weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, hint
from .base import Start, counted, wide
from .corda import _read, _targets, _write

_DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
_SCALES = ("stable", "weight_svd", "gd_scale", "unit")
_GRADIENT = "_peft_loraga_grad"


@dataclass
class LoraGAConfig:
    """Options of the LoRA-GA start.

    Args:
        direction: which of the gradient's first 2r singular vectors go to A and which to B.
        scale: how A and B are scaled;  stable_gamma: γ of "stable".
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        for name, known in (("direction", _DIRECTIONS), ("scale", _SCALES)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"lora_ga_config: {name} is one of {known}, got {value!r}.{hint(str(value), known)}")
        if self.stable_gamma <= 0:
            raise ConfigError(f"lora_ga_config: stable_gamma has to be positive, got {self.stable_gamma}.")


def lora_ga(w: Tensor, r: int, scaling: float, config: LoraGAConfig, module: nn.Module) -> Start:
    """A and B from singular vectors of the weight's averaged gradient. Wang et al. 2024, arXiv:2407.05000.

    Raises:
        ConfigError: if `preprocess_loraga` has not been run, or 2r is larger than a side of the weight.
    """
    gradient: Tensor | None = getattr(module, _GRADIENT, None)
    if gradient is None:
        raise ConfigError("init_lora_weights='lora_ga' needs gradients. Call preprocess_loraga(model, lora_config, train_step) first.")
    if 2 * r > min(w.shape):
        raise ConfigError(f"LoRA-GA takes 2r = {2 * r} directions of a weight {tuple(w.shape)}. Lower r.")
    grad = gradient.float()
    u, _, v = torch.svd_lowrank(grad, q=min(4 * r, min(grad.shape)), niter=4)
    if config.direction == "ArBr":
        b, a = u[:, 0 : 2 * r : 2], v[:, 1 : 2 * r : 2]
    elif config.direction == "A2rBr":
        b, a = u[:, :r], v[:, r : 2 * r]
    elif config.direction == "ArB2r":
        b, a = u[:, r : 2 * r], v[:, :r]
    else:
        order = torch.randperm(2 * r)
        b, a = u[:, order[:r]], v[:, order[r:]]
    factor = 1.0
    if config.scale == "stable":
        factor = w.shape[0] ** 0.25 / config.stable_gamma**0.5
    elif config.scale == "gd_scale":
        factor = 1 / scaling
    elif config.scale == "weight_svd":
        _, s, _ = torch.svd_lowrank(wide(w).float(), q=min(4 * r, min(w.shape)), niter=4)
        factor = float((s[:r] / abs(scaling)).sqrt().mean())
    return counted((a.T * factor).contiguous(), (b * factor).contiguous())


def preprocess_loraga(model: nn.Module, lora_config: Any, train_step: Callable[[], None], cache_file: str | None = None) -> None:
    """Average the gradient of each target's weight over `train_step`, which runs forward and backward as often as it likes.

    The model's own gradients and requires_grad flags are as before afterwards.

    Raises:
        ConfigError: if a target gets no gradient.
    """
    targets = dict(_targets(model, lora_config))
    cached = _read(cache_file)
    if cached is None:
        cached = _gradients(model, targets, train_step)
        if cache_file:
            _write(cache_file, cached)
    for name, module in targets.items():
        setattr(module, _GRADIENT, cached[name])


def _gradients(model: nn.Module, targets: dict[str, nn.Module], train_step: Callable[[], None]) -> dict[str, Tensor]:
    from ..sites import site_for

    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    handles = []

    def collect(name: str, module: nn.Module) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            assert p.grad is not None
            grad = site_for(module).canonical(p.grad).detach().float()
            sums[name] = sums[name] + grad if name in sums else grad.clone()
            counts[name] = counts.get(name, 0) + 1
            p.grad = None

        return hook

    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        for name, module in targets.items():
            weight: Any = module.weight
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(collect(name, module)))
        train_step()
    finally:
        for handle in handles:
            handle.remove()
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad
    silent = [n for n in targets if n not in sums]
    if silent:
        raise ConfigError(
            f"train_step gave no gradient to {silent[0]!r} (and {len(silent) - 1} more). It has to call backward() on a loss of this model."
        )
    return {n: sums[n] / counts[n] for n in targets}
