"""The pairs of LoRA factors that train in a model, and the r x r matrices that go with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..engine.layer import AdaptedLayer, adapted_layers
from ..errors import ConfigError

_NAMES = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True, eq=False)
class Pair:
    """One adapter on one layer: ΔW = scaling · B A.

    Attributes:
        path: of the layer;  a: (r, n_in), of a convolution (r, channels, *kernel);  b: (n_out, r), of a convolution (n_out, r, 1 …).
        embedding: whether the layer is a table, whose A starts at zero instead of B.
    """

    path: str
    layer: AdaptedLayer
    adapter: str
    a: nn.Parameter
    b: nn.Parameter
    embedding: bool

    @property
    def scaling(self) -> float:
        """What it is now."""
        return float(self.layer.scaling[self.adapter] * self.layer.factor)


def pairs(model: nn.Module, purpose: str) -> list[Pair]:
    """Every pair of which a factor trains.

    Raises:
        ConfigError: if there is none, or a layer has a pair for each expert or group.
    """
    root: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    found = list(_all(root, purpose))
    if not found:
        raise ConfigError(
            f"{purpose} works on LoRA's factors A and B, and no such pair trains in this model. Attach a LoRA, or take a plain optimizer."
        )
    return found


def _all(root: nn.Module, purpose: str) -> Iterator[Pair]:
    for path, layer in adapted_layers(root):
        for adapter, attached in layer.attached.items():
            for down, up in _NAMES:
                if down not in attached.leaves or up not in attached.leaves:
                    continue
                a, b = attached.tensor(down), attached.tensor(up)
                if not isinstance(a, nn.Parameter) or not isinstance(b, nn.Parameter) or not (a.requires_grad or b.requires_grad):
                    continue
                if getattr(layer.site, "experts", 0) or a.shape[0] != b.shape[1]:
                    raise ConfigError(
                        f"{purpose}: {path!r} has a pair of factors for each expert or group ({tuple(a.shape)} and {tuple(b.shape)}), which are no "
                        "single A and B. Leave it out with exclude_modules, or take a plain optimizer."
                    )
                yield Pair(path, layer, adapter, a, b, down == "lora_embedding_A")


def gram(t: Tensor, dim: int) -> Tensor:
    """A Aᵀ (dim 0) or Bᵀ B (dim 1), (r, r) in float32."""
    m = t.detach().float().movedim(dim, 0).flatten(1)
    return m @ m.T


def solved(g: Tensor, metric: Tensor, dim: int) -> Tensor:
    """metric⁻¹ applied to a gradient along the dimension of the rank; metric (r, r) is symmetric and positive. Of one that is singular in float32, as where
    there are fewer inputs than ranks, the pseudo-inverse: of all steps that come as near, the smallest."""
    m = g.float().movedim(dim, 0)
    thin, (factor, failed) = m.flatten(1), torch.linalg.cholesky_ex(metric)
    sides = factor.diagonal()
    singular = int(failed) or bool(sides.min() < 1e-3 * sides.max())
    out = (torch.linalg.pinv(metric, hermitian=True, rtol=1e-6) @ thin if singular else torch.cholesky_solve(thin, factor)).view(m.shape)
    return out.movedim(0, dim).to(g.dtype)


def damped(metric: Tensor, reg: float) -> Tensor:
    """metric + reg · 1."""
    return metric + reg * torch.eye(len(metric), device=metric.device)
