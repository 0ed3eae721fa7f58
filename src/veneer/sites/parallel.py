"""A linear layer whose weight a tensor-parallel plan has cut (DTensor): the changed product is formed whole, and of it the plan's part is handed on.

Every process holds the whole adapter and forms the same gradients of it, so nothing of it is sent, and a file is the same as everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ConfigError


def is_parallel(module: nn.Module, w: Any) -> bool:
    """Whether a plan has cut the weight, rather than FSDP2, which has modules of its own class."""
    return type(w) not in (Tensor, nn.Parameter) and hasattr(w, "device_mesh") and not hasattr(module, "set_modules_to_forward_prefetch")


class Plan:
    """How one layer is cut: `columns`, its output features, or its input features.

    Raises:
        ConfigError: if it is cut in another way, or hands on or takes something else than local tensors in whole rows.
    """

    def __init__(self, module: nn.Module, w: Any, x: Any, name: str) -> None:
        mesh, dims = w.device_mesh, [getattr(p, "dim", None) for p in w.placements]
        if mesh.ndim != 1 or dims[0] not in (0, 1) or not isinstance(x, Tensor) or hasattr(x, "full_tensor"):
            raise ConfigError(
                f"{name}: adapters on tensor-parallel layers take a plan with one dimension, ColwiseParallel or RowwiseParallel, and local tensors as "
                f"inputs; this weight is placed {tuple(w.placements)} on a mesh of {mesh.ndim} dimensions. Leave the layer out of the targets."
            )
        self.group, self.columns, self.name = mesh.get_group(), dims[0] == 0, name
        (n_out, n_in), size = w.shape, mesh.size()
        if (n_out if self.columns else n_in) % size:
            raise ConfigError(f"{name}: {n_out if self.columns else n_in} features are not divided evenly by {size} processes.")
        with torch.no_grad():
            y = module(x)
        width, wanted = (n_out // size if self.columns else n_out), (*x.shape[:-1],)
        if tuple(y.shape) != (*wanted, width) or x.shape[-1] != (n_in if self.columns else n_in // size):
            raise ConfigError(
                f"{name}: the plan turns an input of shape {tuple(x.shape)} into {tuple(y.shape)}; adapters take whole rows in and out, so ColwiseParallel and "
                "RowwiseParallel with their default layouts. Leave the layer out of the targets, or use FSDP2."
            )

    def whole(self, x: Tensor) -> Tensor:
        """The layer's input with all its features."""
        out: Tensor = x if self.columns else _Gather.apply(x, self.group)  # type: ignore[no-untyped-call]
        return out

    def part(self, y: Tensor) -> Tensor:
        """What the plan leaves of the output here."""
        out: Tensor = _Cut.apply(y, self.group) if self.columns else y  # type: ignore[no-untyped-call]
        return out


def _join(x: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, -1)


def _own(x: Tensor, group: Any) -> Tensor:
    return x.chunk(dist.get_world_size(group), -1)[dist.get_rank(group)].contiguous()


class _Gather(torch.autograd.Function):
    """The features of all processes; of the gradient, which all have whole, the own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _join(x, group)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _own(dy, ctx.group), None


class _Cut(torch.autograd.Function):
    """The own part of the features; the gradient is put together from those of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _own(x, group)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _join(dy, ctx.group), None
