"""LoRA+: B learns faster than A."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError
from .pairs import pairs

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: Callable[..., Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer of the class asked for, in which B has the learning rate lr · ratio and A has lr. Hayou et al. 2024, arXiv:2402.12354.

    Tensors of one dimension (biases, magnitudes) have the rate of B; what an adapter trains on an embedding has its own. Biases and the tensors of norms
    get no weight decay.

    Args:
        model: with a LoRA that trains.
        lr: of A;  loraplus_lr_ratio: at least 1; the paper suggests 16 where the task is far from what the model knows.
        kwargs: `loraplus_weight_decay` (0) and `loraplus_lr_embedding` (1e-6); all others go to the optimizer.

    Raises:
        ConfigError: if no pair of LoRA factors trains, or a number is not positive.
    """
    decay, embedding = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    for name, value in (("lr", lr), ("loraplus_lr_ratio", loraplus_lr_ratio), ("loraplus_lr_embedding", embedding)):
        if not value > 0:
            raise ConfigError(f"{name} has to be positive, got {value}.")
    if decay < 0:
        raise ConfigError(f"loraplus_weight_decay is 0 or more, got {decay}.")
    held = pairs(model, "LoRA+")
    ups, tables = {id(p.b) for p in held if not p.embedding}, {id(t) for p in held if p.embedding for t in (p.a, p.b)}
    undecayed = {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    undecayed |= {id(p) for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias"}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(lr, decay): [], (embedding, decay): [], (lr * loraplus_lr_ratio, decay): []}
    for p in model.parameters():
        if p.requires_grad:
            rate = embedding if id(p) in tables else lr * loraplus_lr_ratio if id(p) in ups or p.ndim == 1 else lr
            groups.setdefault((rate, 0.0 if id(p) in undecayed else decay), []).append(p)
    return optimizer_cls([{"params": ps, "lr": rate, "weight_decay": d} for (rate, d), ps in groups.items() if ps], lr=lr, **kwargs)
