"""One adapted layer in double precision, and what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import veneer as V


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted(config: Any, n_in: int = 12, n_out: int = 8, *, conv: bool = False, moved: float = 0.3, **kwargs: Any) -> tuple[Any, Any]:
    """(model, its one adapted layer), every trained number moved."""
    torch.manual_seed(0)
    config.target_modules = {"lin"}
    lin = nn.Conv2d(n_in, n_out, 3, **kwargs) if conv else nn.Linear(n_in, n_out, **kwargs)
    model = V.get_peft_model(nn.Sequential(nn.ModuleDict({"lin": lin}))[0].double(), config, autocast_adapter_dtype=False)
    layer = model.get_base_model().lin
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * moved)
    return model.eval(), layer


def weight(layer: Any) -> Tensor:
    """W' (n_out, n_in), as the output for one-hot inputs tells it."""
    bias = layer.base_layer.bias
    y: Tensor = layer(torch.eye(layer.site.n_in, dtype=torch.float64))
    return (y if bias is None else y - bias).T.detach()


def leaf(layer: Any, name: str) -> Tensor:
    t: Tensor = layer.leaf("default", name).detach()
    return t


def frozen(layer: Any) -> Tensor:
    w: Tensor = layer.frozen_weight().detach()
    return w
