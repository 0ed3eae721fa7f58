"""A linear layer whose weight a tensor-parallel plan has cut (DTensor): the changed product is formed whole, and of it the plan's part is handed on.

Every process holds the whole adapter and forms the same gradients of it, so nothing of it is sent, and a file is the same as everywhere.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..bases import Codec
from ..errors import ConfigError
from ..sharding import is_dtensor, is_unit, shape_of, whole


def is_parallel(module: nn.Module, w: Any) -> bool:
    """Whether a plan has cut the weight, rather than FSDP2, which has modules of its own class."""
    return type(w) not in (Tensor, nn.Parameter) and hasattr(w, "device_mesh") and not is_unit(module)


def is_cut(module: nn.Module) -> bool:
    """Whether a plan has cut one of the module's tensors. Not to be asked at rest of modules that FSDP2 keeps."""
    return any(is_parallel(m, p) for m in module.modules() for p in m._parameters.values() if p is not None)


def is_planned(model: nn.Module) -> bool:
    """Whether a plan has cut one of the model's tensors; asked at any time, FSDP2's modules are told apart."""
    return not any(map(is_unit, model.modules())) and is_cut(model)


def check_runs_as_copy(module: nn.Module, path: str) -> None:
    """Raise ConfigError if a copy of the module with other tensors would run the original: its forward is a function that knows the original alone."""
    for m in module.modules():
        if isinstance(m.__dict__.get("forward"), FunctionType):
            raise ConfigError(
                f"{path}: this {type(m).__name__} has been given a forward of its own, as a tensor-parallel plan does with norms between cut layers; "
                "it runs the original, so a trained copy would never act. Leave it out of the targets, or use FSDP2 (veneer.distributed.shard) or DDP."
            )


def check_copied(module: nn.Module, path: str) -> None:
    """Raise ConfigError if a module that a plan has cut is no plain linear layer, of which alone there is a `whole_copy`."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise ConfigError(
            f"{path}: a tensor-parallel plan has cut this {type(module).__name__}, so it cannot be trained whole (modules_to_save): only a linear layer can. "
            "Name the linear layers inside, or use FSDP2 (veneer.distributed.shard)."
        )


def whole_copy(module: Any) -> nn.Linear:
    """A linear layer of the same numbers, whole and without the plan's hooks. All processes have to take part."""
    out = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    for name, p in module._parameters.items():
        if p is not None:
            out._parameters[name] = nn.Parameter(whole(p).detach().clone(), requires_grad=p.requires_grad)
    return out.train(module.training)


def check_piece(module: nn.Module, site: Any) -> None:
    """Raise ConfigError if the weight of a plain linear layer is a piece of what the layer says of itself, and knows of no mesh."""
    w = module._parameters.get("weight")
    wanted = (site.n_in, site.n_out) if site.transposed else (site.n_out, site.n_in)
    if site.codec.plain and w is not None and shape_of(w) != wanted:
        raise ConfigError(
            f"the weight here has shape {shape_of(w)}, and the layer's is {wanted}: something keeps a piece of it in a way that veneer does not know. "
            "Use a plan that keeps DTensors (torch's parallelize_module, transformers 5.23's tp_plan), FSDP2 or DDP."
        )


def check_packed(module: nn.Module, codec: Codec) -> None:
    """Raise ConfigError if a packed weight has been cut as if its bytes were a matrix: no library reads such pieces, and no codec can tell them."""
    w = module._parameters.get("weight")
    if w is not None and is_dtensor(w) and not (codec.plain and w.is_floating_point()):
        raise ConfigError(
            f"a tensor-parallel plan (tp_plan, parallelize_module) or FSDP2 has cut the packed weight of this {type(module).__name__}, and its storage "
            "cannot be read from pieces. Under a plan load the model unquantised; with FSDP2 adapt the model before it is sharded; or use DDP."
        )


def check_cut(module: nn.Module, site: Any, path: str) -> bool:
    """Whether a tensor-parallel plan has cut the module, asked while it runs (then FSDP's tensors are whole).

    Raises:
        ConfigError: if it has, in a place where an adapter would act on a piece as if it were the whole, or not at all.
    """
    # packed pieces may be no DTensors: transformers says so of every packed layer, or of every layer of its plan, and binds a forward to a cut one
    packed = not site.codec.plain and any(getattr(module, said, False) for said in ("_hf_quantized_needs_local_tp", "_is_hooked"))
    if not is_cut(module) and not (packed and "forward" in module.__dict__ and "_hf_hook" not in module.__dict__):
        return False
    if site.kind not in ("linear", "embedding") or not site.codec.plain or site.own_forward:
        base = getattr(module, "get_base_layer", lambda: module)()
        what = f"stored as {site.codec.name!r}" if not site.codec.plain else f"which is adapted in its {site.kind}"
        raise ConfigError(
            f"{path}: a tensor-parallel plan has cut this {type(base).__name__}, {what}; there an adapter would act on a piece as if it were the whole. "
            "Under tensor parallel adapters take linear layers and embeddings: leave this one out of the targets, or use FSDP2 (veneer.distributed.shard)."
        )
    return True


class Plan:
    """How one layer is cut, by `columns` (its output features) or by its input features, and what it takes and hands on: the part or the whole.

    Raises:
        ConfigError: if it is cut in another way, hands on or takes something else than local tensors in whole rows, or trains its bias.
    """

    def __init__(self, module: nn.Module, w: Any, x: Any, name: str) -> None:
        mesh, dims = w.device_mesh, [getattr(p, "dim", None) for p in w.placements]
        if mesh.ndim != 1 or type(w.placements[0]).__name__ != "Shard" or not isinstance(x, Tensor) or hasattr(x, "full_tensor"):
            raise ConfigError(
                f"{name}: adapters on tensor-parallel layers take a plan with one dimension, ColwiseParallel or RowwiseParallel, and local tensors as "
                f"inputs; this weight is placed {tuple(w.placements)} on a mesh of {mesh.ndim} dimensions. Leave the layer out of the targets."
            )
        b = module._parameters.get("bias")
        if b is not None and b.requires_grad:
            raise ConfigError(
                f"{name}: the bias of a tensor-parallel layer cannot be trained beside its adapter. Take bias='none', or FSDP2."
            )
        self.group, self.columns, self.name = mesh.get_group(), dims[0] in (0, -2), name
        (n_out, n_in), size = w.shape, mesh.size()
        with torch.no_grad():
            y = module(x)
        ins, outs = ({n_in}, {n_out, n_out // size}) if self.columns else ({n_in, n_in // size}, {n_out})
        if hasattr(y, "full_tensor") or y.shape[:-1] != x.shape[:-1] or x.shape[-1] not in ins or y.shape[-1] not in outs:
            raise ConfigError(
                f"{name}: the plan turns an input of shape {tuple(x.shape)} into {tuple(y.shape)}; adapters take whole rows in and out, so ColwiseParallel and "
                "RowwiseParallel with local tensors. Leave the layer out of the targets, or use FSDP2."
            )
        self.joins, self.cuts = x.shape[-1] != n_in, y.shape[-1] != n_out
        if (self.joins or self.cuts) and (n_out if self.columns else n_in) % size:
            raise ConfigError(f"{name}: {n_out if self.columns else n_in} features are not divided evenly by {size} processes.")

    def whole(self, x: Tensor) -> Tensor:
        """The layer's input with all its features."""
        out: Tensor = _Gather.apply(x, self.group) if self.joins else x  # type: ignore[no-untyped-call]
        return out

    def part(self, y: Tensor) -> Tensor:
        """What the plan leaves of the output here."""
        out: Tensor = _Cut.apply(y, self.group) if self.cuts else y  # type: ignore[no-untyped-call]
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
