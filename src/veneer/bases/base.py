"""The contract of a codec: how a frozen weight is stored, read, multiplied and written back."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import MergeError
from ..kernels.products import linear


class Codec(ABC):
    """One kind of storage. Holds no state: everything is read off the module, by the names of classes, never by importing their library.

    Class attributes:
        name: what `quantization_backend` calls it in a status; None for plain weights.
        plain: whether the weight is a floating tensor in the layer's own layout, which torch multiplies.
        kinds: the kinds of site whose modules can be stored like this.
        unwritable: why a changed weight cannot be stored in this way again; empty if it can.
    """

    name: ClassVar[str | None] = None
    plain: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    unwritable: ClassVar[str] = ""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether the module's weight is stored in this way."""

    @abstractmethod
    def weight(self, module: nn.Module, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        """The weight, dequantised: (n_out, n_in) of a linear layer, a table, a kernel. In `dtype`, or else in the one it stands for."""

    def dtype(self, module: nn.Module, name: str = "weight") -> torch.dtype:
        """The floating dtype that the weight stands for."""
        return torch.float32

    def device(self, module: nn.Module, name: str = "weight") -> torch.device:
        """Where the weight is."""
        return next(iter(self.packed(module).values())).device

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(n_out, n_in) of a linear layer."""
        for n_in, n_out in (("in_features", "out_features"), ("infeatures", "outfeatures")):
            if hasattr(module, n_in):
                return int(getattr(module, n_out)), int(getattr(module, n_in))
        return tuple(self.weight(module).shape)  # type: ignore[return-value]

    def multiply(self, module: nn.Module, x: Tensor) -> Tensor:
        """x Wᵀ, without the bias, in the dtype of x, as the storage multiplies it; called without gradients."""
        return linear(x, self.weight(module, dtype=x.dtype))

    def packed(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors that the weight is stored in, by name: what never changes while adapters train."""
        return dict(flat("weight", module.weight))

    def written(self, module: nn.Module, w: Tensor) -> nn.Module:
        """Another module like this one, with `w` (in the layout of `weight`) stored in the same way.

        Raises:
            MergeError: if that cannot be done; says why.
        """
        why = self.unwritable or "this version of veneer does not write it"
        raise MergeError(f"A changed weight cannot be stored as {self.name!r} again: {why}. Merge with store='dense'.")

    def settle(self, module: nn.Module) -> None:  # noqa: B027  most storages have nothing of the kind
        """Turn off what would change the packed tensors of a module when it runs, or carry gradients into it."""

    def check(self, module: nn.Module) -> None:  # noqa: B027
        """Raise ConfigError if layers of this module's settings cannot be adapted; names what can."""


class ByForward(Codec):
    """A linear layer of which no more is known than its public interface: sizes, packed tensors, and a forward that multiplies. Abstract."""

    @abstractmethod
    def packed(self, module: nn.Module) -> dict[str, Tensor]: ...

    def weight(self, module: nn.Module, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        w = by_identity(module, self.shape(module)[1], self.dtype(module), self.device(module))
        return w if dtype is None else w.to(dtype)

    def dtype(self, module: nn.Module, name: str = "weight") -> torch.dtype:
        return next((t.dtype for t in self.packed(module).values() if t.is_floating_point()), torch.float16)

    def multiply(self, module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = twin(module, bias=None)(x.to(self.dtype(module)))
        return y.to(x.dtype)


@dataclass(frozen=True, eq=False)
class Stored:
    """A packed weight, as the kernels know it: something to multiply by, or to dequantise.

    Args:
        call: multiplies in the place of the storage's own product, where a module has to be called as a whole.
    """

    codec: Codec
    module: nn.Module
    call: Any = None

    def times(self, x: Tensor) -> Tensor:
        """x Wᵀ in the dtype of x."""
        y: Tensor = self.codec.multiply(self.module, x) if self.call is None else self.call(x)
        return y

    def whole(self, dtype: torch.dtype) -> Tensor:
        """W (n_out, n_in), dequantised for this one use."""
        return self.codec.weight(self.module, dtype=dtype)


_ORDINARY = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def codec_for(module: nn.Module) -> Codec:
    """The codec of a module's storage; the first that matches, plain floating tensors last."""
    w = module._parameters.get("weight")
    if type(module) in _ORDINARY and type(w) is nn.Parameter and w.is_floating_point():
        return codecs()[-1]  # the others know their modules, or their tensors, by their classes
    return next(c for c in codecs() if c.matches(module))


@functools.cache
def codecs() -> tuple[Codec, ...]:
    """All codecs, plain tensors last."""
    from .aqlm import Aqlm
    from .awq import Awq
    from .bnb4bit import Bnb4bit
    from .bnb8bit import Bnb8bit
    from .eetq import Eetq
    from .gptq import Gptq
    from .hqq import Hqq
    from .plain import Plain
    from .quanto import Quanto
    from .torchao import TorchAO

    return (Bnb4bit(), Bnb8bit(), TorchAO(), Quanto(), Hqq(), Gptq(), Awq(), Aqlm(), Eetq(), Plain())


def class_names(thing: Any) -> Iterator[tuple[str, str]]:
    """(name, top package) of the classes of an object: how a library is recognised without importing it."""
    return ((c.__name__, c.__module__.partition(".")[0]) for c in type(thing).__mro__)


def flat(name: str, t: Any) -> Iterator[tuple[str, Tensor]]:
    """The ordinary tensors inside a tensor, which may be of a subclass that keeps several."""
    names = t.__tensor_flatten__()[0] if hasattr(t, "__tensor_flatten__") else ()
    if not names:
        yield name, t.data
    for n in names:
        yield from flat(f"{name}.{n}", getattr(t, n))


def tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts and plain objects."""
    if isinstance(value, Tensor):
        yield name, value.data
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from tensors_in(f"{name}.{k}", v)


def twin(module: nn.Module, **parameters: Any) -> Any:
    """A module that shares all of another's tensors and hooks, except for these parameters: registering others leaves the other alone."""
    new = copy.copy(module)
    for store in ("_parameters", "_buffers", "_modules"):
        new.__dict__[store] = dict(module.__dict__[store])
    for name, value in parameters.items():
        for store in ("_parameters", "_buffers"):
            new.__dict__[store].pop(name, None)
        new.__dict__.pop(name, None)
        if isinstance(value, nn.Parameter):
            new.__dict__["_parameters"][name] = value
        else:
            new.__dict__[name] = value
    return new


@torch.no_grad()
def by_identity(module: nn.Module, n_in: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """W (n_out, n_in) of a linear layer that offers nothing but its forward: what it makes of the unit vectors, some at a time."""
    bare = twin(module, bias=None).eval()
    columns = [bare(part).to(dtype) for part in torch.eye(n_in, dtype=dtype, device=device).split(1024)]
    return torch.cat(columns).mT.contiguous()


def stored_bytes(model: nn.Module) -> int:
    """The bytes of all weights of a model as they are stored, packed ones and their scales included; shared ones count once."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        codec = codec_for(module)
        packed = {} if codec.plain else codec.packed(module)
        own = [p for n, p in module._parameters.items() if p is not None and (codec.plain or n == "bias")]
        found |= {t.data_ptr(): t for t in (*packed.values(), *own)}
    return sum(t.numel() * t.element_size() for t in found.values())
