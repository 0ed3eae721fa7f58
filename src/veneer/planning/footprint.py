"""What a training step costs, found by running it without numbers: bytes that are alive together, and floating-point operations."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is on, as long as they live. Views and writes in place make none.

    Attributes:
        now, peak: bytes;  flops: of matrix products, convolutions and attention, two for each multiplication with its addition.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def know(self, model: nn.Module) -> LiveBytes:
        """Do not count a model's own tensors."""
        for t in (*model.parameters(), *model.buffers()):
            storage = t.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._count_flops(func, args, kwargs, out)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._meet(t)
        return out

    def _meet(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _count_flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        from torch.utils.flop_counter import flop_registry

        packet = func._overloadpacket
        if packet.__name__.endswith("_"):  # in place it is the same work
            packet = getattr(torch.ops.aten, packet.__name__[:-1], packet)
        if packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **kwargs, out_val=out))
        elif "_scaled_dot_product_flash_attention_for_cpu" in str(packet):  # which the registry does not have
            q, k = args[-3 if "backward" not in str(packet) else 1], args[1 if "backward" not in str(packet) else 2]
            self.flops += (10 if "backward" in str(packet) else 4) * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]


@contextmanager
def without_numbers() -> Iterator[Any]:
    """Within the block, tensors have shapes, dtypes and devices, and no values: nothing is allocated and nothing computed."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # torch's own deepcopy does
        yield mode


def hollow(model: nn.Module) -> nn.Module:
    """A copy of a model without values, sharing nothing with it; to be called and used in `without_numbers`. Tensors on the meta device go to the CPU."""
    memo: dict[int, Any] = {}
    for t in (*model.parameters(), *model.buffers()):
        device = "cpu" if t.device.type == "meta" else t.device
        new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
        memo[id(t)] = nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new
    return copy.deepcopy(model, memo)


def held(model: nn.Module) -> int:
    """Bytes of all storages of a model's tensors, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return sum(storages.values())


@dataclass(frozen=True)
class Footprint:
    """What one step takes beside the weights and the optimizer's state.

    Attributes:
        peak: bytes, gradients of what trains included;  forward, backward: floating-point operations of a batch.
    """

    peak: int
    forward: int
    backward: int


def footprint(model: nn.Module, loss: Callable[[], Tensor]) -> Footprint:
    """Run a forward and a backward.

    Args:
        model: in the mode that it trains in, its gradients None.
        loss: runs the forward.
    """
    with LiveBytes().know(model) as live:
        value = loss()
        forward = live.flops
        value.backward()
        del value
    for p in model.parameters():
        p.grad = None
    return Footprint(live.peak, forward, live.flops - forward)
