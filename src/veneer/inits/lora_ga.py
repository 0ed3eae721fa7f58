"""LoRA-GA: a start along the gradient of the full weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, hint
from .base import Start, counted, sketched, wide
from .calibration import check_reached, read, targets, write

_DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
_SCALES = ("stable", "weight_svd", "gd_scale", "unit")
_GRADIENT = "_peft_loraga_grad"
_NITER = 4


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


@dataclass
class Gradient:
    """The first 2r left (n_out, 2r) and right (n_in, 2r) singular vectors of a weight's averaged gradient."""

    u: Tensor
    v: Tensor


def lora_ga(w: Tensor, r: int, scaling: float, config: LoraGAConfig, module: nn.Module | None) -> Start:
    """A and B from singular vectors of the weight's averaged gradient. Wang et al. 2024, arXiv:2407.05000, algorithm 1.

    Both are unit vectors times one factor. (PEFT multiplies B by the gradient's singular values too, which makes it vanish against A.)

    Raises:
        ConfigError: if `preprocess_loraga` has not been run, or 2r is larger than a side of the weight.
    """
    gradient: Gradient | None = getattr(module, _GRADIENT, None)
    if gradient is None:
        raise ConfigError("init_lora_weights='lora_ga' needs gradients. Call preprocess_loraga(model, lora_config, train_step) first.")
    if 2 * r > min(w.shape):
        raise ConfigError(f"LoRA-GA takes 2r = {2 * r} directions of a weight {tuple(w.shape)}. Lower r.")
    u, v = gradient.u, gradient.v
    if 2 * r > u.shape[1]:
        raise ConfigError(f"preprocess_loraga has kept {u.shape[1]} directions, and 2r={2 * r}. Run it again with this rank.")
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
        _, s, _ = sketched(wide(w), r, _NITER)
        factor = float((s / abs(scaling)).sqrt().mean())
    return counted((a.T * factor).contiguous(), (b * factor).contiguous())


def preprocess_loraga(model: nn.Module, lora_config: Any, train_step: Callable[[], None], cache_file: str | None = None) -> None:
    """Average the gradient of each target's weight over `train_step`, which runs forward and backward as often as it likes.

    The model's own gradients and requires_grad flags are as before afterwards; of each gradient, only the directions that the start
    needs are kept.

    Args:
        cache_file: the gradients are written there, or read from there if it exists.

    Raises:
        ConfigError: if a target gets no gradient, or has a quantised weight.
        LoadError: if the file does not hold every target.
    """
    modules = dict(targets(model, lora_config))
    cached = read(cache_file, [f"{n}.{_GRADIENT}" for n in modules])
    if cached is None:
        cached = {f"{n}.{_GRADIENT}": g for n, g in _gradients(model, modules, train_step).items()}
        if cache_file:
            write(cache_file, cached)
    kept = {}
    for name in modules:
        u, _, v = sketched(wide(cached.pop(f"{name}.{_GRADIENT}")), 2 * lora_config.at(name).r, _NITER)
        kept[name] = Gradient(u.clone(), v.T.contiguous())
    for name, module in modules.items():
        setattr(module, _GRADIENT, kept[name])


def _gradients(model: nn.Module, modules: dict[str, nn.Module], train_step: Callable[[], None]) -> dict[str, Tensor]:
    """The mean gradient (n_out, n_in) of each target's weight, in float32."""
    from ..bases import codec_for
    from ..sites import site_for

    sums: dict[Tensor, Tensor] = {}
    counts: dict[Tensor, int] = {}
    packed = [n for n, m in modules.items() if not codec_for(m).plain]
    if packed:
        raise ConfigError(f"The weight of {packed[0]!r} is quantised and gets no gradient. Run preprocess_loraga on the unquantised model.")
    weights: dict[str, Any] = {n: m.weight for n, m in modules.items()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    handles = []

    def hook(p: Tensor) -> None:
        assert p.grad is not None
        sums[p] = sums[p] + p.grad if p in sums else p.grad.detach().float()
        counts[p] = counts.get(p, 0) + 1
        p.grad = None

    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        for w in set(weights.values()):
            w.requires_grad_(True)
            handles.append(w.register_post_accumulate_grad_hook(hook))
        train_step()
    finally:
        for handle in handles:
            handle.remove()
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad
    check_reached(modules, {n for n, w in weights.items() if w in sums}, "train_step called no backward() that gave a gradient to")
    return {n: site_for(modules[n]).canonical(sums[w] / counts[w]) for n, w in weights.items()}
