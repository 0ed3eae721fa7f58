"""LoRA-FA: A stays as it is, and B follows the gradient of the full weight as well as it can."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from .pairs import Pair, damped, gram, pairs, solved

_DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW, in which the gradient of a B is first turned into g (A Aᵀ)⁻¹ / s², the step of B whose s B A comes nearest to the gradient of W.

    Zhang et al. 2023, arXiv:2308.03303; the projection: Wang et al. 2024, arXiv:2407.18242, theorem 1 with A held.

    Args:
        params: tensors, or groups of them.
        lr, betas, eps, weight_decay, correct_bias: of AdamW (the decay is decoupled).

    Attributes:
        pairs: by the id of a B, the pair it belongs to; `create_lorafa_optimizer` fills it. Tensors that are not in it take plain AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
            raise ConfigError(f"lr, eps and weight_decay are 0 or more and betas in [0, 1), got {lr=}, {eps=}, {weight_decay=}, {betas=}.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias})
        self.pairs: dict[int, Pair] = {}  # by id of B; no part of the state, which the model's tensors make anew

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what the closure gave."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group, self._gradient(p))
        return loss

    def _gradient(self, p: Tensor) -> Tensor:
        assert p.grad is not None
        pair = self.pairs.get(id(p))
        if pair is None:
            return p.grad
        return solved(p.grad, damped(gram(pair.a, 0), _DAMPING), 1) / pair.scaling**2

    def _move(self, p: Tensor, group: dict[str, Any], g: Tensor) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        low, high = group["betas"]
        state["exp_avg"].lerp_(g, 1 - low)
        state["exp_avg_sq"].mul_(high).addcmul_(g, g, value=1 - high)
        rate = group["lr"]
        if group["correct_bias"]:
            rate *= math.sqrt(1 - high ** state["step"]) / (1 - low ** state["step"])
        if group["weight_decay"] > 0:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-rate)


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: float, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """Freeze every A of the model's LoRA, and return the optimizer of the rest. A table's A, which starts at zero, goes on training.

    Differs from PEFT's: each layer is projected with its own scaling, which a `rank_pattern` or `alpha_pattern` makes differ.

    Args:
        model: with a LoRA that trains.
        r, lora_alpha, use_rslora: as in the adapter's config (None: as there).
        lr, weight_decay: of AdamW.

    Raises:
        ConfigError: if no pair of LoRA factors trains, or r, lora_alpha or use_rslora is not what the adapter's config has; nothing is frozen then.
    """
    held = [p for p in pairs(model, "LoRA-FA") if not p.embedding]
    for name, given in (("r", r), ("lora_alpha", lora_alpha), ("use_rslora", use_rslora)):
        for pair in held:
            config: Any = _config(model, pair)
            have = getattr(config, name, given)
            if given is not None and have != given:
                raise ConfigError(
                    f"create_lorafa_optimizer: {name}={given!r}, and the adapter {pair.adapter!r} has {name}={have!r}. Give {have!r}."
                )
    for pair in held:
        pair.a.requires_grad_(False)
    optimizer = LoraFAOptimizer([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    optimizer.pairs = {id(p.b): p for p in held}
    return optimizer


def _config(model: nn.Module, pair: Pair) -> Any:
    """The adapter's own config; a model with injected adapters may have none beside that of the layer."""
    configs: Any = getattr(model, "peft_config", None) or {}
    return configs.get(pair.adapter, pair.layer.attached[pair.adapter].config)
