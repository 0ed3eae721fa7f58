"""Tensors that are spread over processes: told apart, made whole, put back in the same layout.

Three engines spread them in three ways: DTensor (FSDP2, tensor parallel), DeepSpeed's ZeRO-3, which empties a parameter between uses, and FSDP1,
whose parameters are views into one flat tensor while a unit runs (`gathered` opens them all).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_ORDINARY = (Tensor, nn.Parameter)
_reduced: weakref.WeakKeyDictionary[nn.Module, dict[int, Tensor]] = weakref.WeakKeyDictionary()


def is_dtensor(t: Any) -> bool:
    """Whether a tensor knows the mesh of processes that it is spread over."""
    return type(t) not in _ORDINARY and hasattr(t, "full_tensor")


def is_partitioned(t: Any) -> bool:
    """Whether it is a parameter that ZeRO-3 has emptied, so that its numbers are elsewhere."""
    return hasattr(t, "ds_id") and t.ds_status.name != "AVAILABLE"


def kept_by_zero(t: Any, state: bool = False) -> bool:
    """Whether DeepSpeed keeps a parameter in pieces (ZeRO-3); with `state`, or what its optimizer knows of it (ZeRO-1, ZeRO-2)."""
    return hasattr(t, "ds_id") or (state and hasattr(t, "_hp_mapping"))


def stepped_flat(t: Any, dimensions: int, optimizer: Any, pieces: Sequence[Tensor]) -> bool:
    """Whether an optimizer steps a tensor of these dimensions in flat pieces, as under ZeRO and FSDP1.

    Args:
        pieces: the optimizer's parameters. What an earlier model's optimizer has in pieces does not count.
    """
    if (engine := getattr(t, "_z3_optimizer", getattr(t, "_zero_optimizer", None))) is not None:
        return engine.optimizer is optimizer
    mapping = getattr(t, "_hp_mapping", None)
    if mapping is not None:  # ZeRO-2: a view into the piece; None where this process has nothing of the tensor
        return any(mapping.hp_fragment.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in pieces)
    return t.ndim != dimensions and any(t is p for p in pieces)  # FSDP1


def whole(t: Tensor) -> Tensor:
    """The tensor with all its numbers, without gradient if it was spread; itself if it was not. All processes have to take part."""
    if is_dtensor(t):
        full: Tensor = t.detach().full_tensor()  # type: ignore[attr-defined]
        return full
    if is_partitioned(t):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([t]):
            return t.data.clone()
    return t


def copied(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters are whole and known to no engine yet. Where ZeRO-3 keeps it in pieces, all processes have to take part."""
    fresh = {id(p): nn.Parameter(whole(p).detach().clone(), p.requires_grad) for p in module.parameters() if hasattr(p, "ds_id")}
    return copy.deepcopy(module, fresh)


def zero_fetches(module: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Let ZeRO-3 fetch these parameters whenever it runs the module, forwards and backwards, and now, if it has not."""
    known = getattr(module, "_external_params", {})
    for t in tensors:
        if hasattr(t, "ds_id") and id(t) not in known:
            from deepspeed.runtime.zero.partition_parameters import register_external_parameter

            register_external_parameter(module, t)
            if is_partitioned(t):
                t.all_gather()  # type: ignore[attr-defined]


def held(t: Tensor | None) -> Tensor | None:
    """A parameter with a hold on its numbers: ZeRO-3 takes them away from it as soon as its module has run. Others are returned as they are."""
    if t is None or not hasattr(t, "ds_id"):
        return t
    return t.view_as(t) if t.requires_grad else t.detach()


def shape_of(t: Tensor) -> tuple[int, ...]:
    """The shape that the tensor has when it is whole."""
    return tuple(getattr(t, "ds_shape", t.shape))


@torch.no_grad()
def fill(t: Tensor, value: Tensor) -> bool:
    """Write whole numbers, the same on every process, into a tensor that is spread; False if it is not."""
    if is_dtensor(t):
        t.copy_(spread_like(value.to(t.dtype), t))
    elif hasattr(t, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([t], modifier_rank=0):
            t.data.copy_(value)
    else:
        return False
    return True


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the layout of another; every process cuts out its own part, nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP2 has made this module one of its units."""
    return hasattr(module, "set_modules_to_forward_prefetch")


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put back in pieces what it has left whole after a call, so that what is written next is what it will gather."""
    for module in model.modules():
        if is_unit(module):
            module.reshard()  # type: ignore[operator]


def sharded_modules(model: nn.Module) -> set[int]:
    """The ids of all modules whose tensors FSDP2 keeps."""
    if not (dist.is_available() and dist.is_initialized()):
        return set()
    return {id(m) for unit in model.modules() if is_unit(unit) for m in unit.modules()}


def unreduced(tensors: Iterable[Tensor]) -> bool:
    """Whether one of these is to get a gradient in the forward of a DistributedDataParallel that is running, which does not know it.

    DistributedDataParallel adds up the gradients of what required one when it was made. Asked outside of its forward, where it runs one process or where it
    is told to send nothing (`no_sync`), the answer is no.
    """
    ddp: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None or not ddp.require_backward_grad_sync or not torch.is_grad_enabled():
        return False
    if ddp not in _reduced:
        _reduced[ddp] = _reduced_by(ddp)
    known = _reduced[ddp]
    return bool(known) and any(t.requires_grad and id(t) not in known for t in tensors)


def _reduced_by(ddp: Any) -> dict[int, Tensor]:
    """The parameters whose gradients a DistributedDataParallel adds up, and those that it was told to leave to the user; none if that is nobody's business."""
    if dist.get_world_size(ddp.process_group) == 1:
        return {}
    try:
        buckets = ddp.reducer._get_zeros_like_grad_buckets()
    except (AttributeError, RuntimeError):  # another release of torch; sparse gradients, which have no buckets before the first backward
        return {}
    left = [p for name, p in ddp.module.named_parameters(remove_duplicate=False) if name in ddp.parameters_to_ignore]
    return {id(p): p for p in [*left, *(p for bucket in buckets for p in bucket.parameters())]}


def is_flat(model: nn.Module) -> bool:
    """Whether FSDP1 keeps the model's parameters in pieces just now."""
    return any(type(m).__name__ == "FullyShardedDataParallel" and m.training_state.name == "IDLE" for m in model.modules())  # type: ignore[union-attr]


@contextmanager
def gathered(model: nn.Module, parameters: Sequence[Tensor] | None = None) -> Iterator[None]:
    """Within the block, what FSDP1 and ZeRO-3 keep in pieces is whole on every process; what rank 0 writes into it stays.

    DTensors are left as they are: `whole` reads them one by one.

    Args:
        parameters: gather these alone (ZeRO-3); by default all of the model.
    """
    with ExitStack() as stack:
        if is_flat(model):
            from torch.distributed.fsdp import FullyShardedDataParallel

            stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=True))
        spread = [p for p in (model.parameters() if parameters is None else parameters) if is_partitioned(p)]
        if spread:
            from deepspeed.runtime.zero import GatheredParameters

            stack.enter_context(GatheredParameters(spread, modifier_rank=0))
        yield
