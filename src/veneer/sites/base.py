"""The contract of a site: how a kind of module holds its weight, reads its input and is run with a changed weight."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..bases import Codec, codec_for
from ..change import Change, Stacking, bias, weight
from ..engine.offload import fetched
from ..engine.substitute import call_with
from ..sharding import whole

Changes = Sequence[tuple[Change, Stacking]]


class Adaptable(ABC):
    """A place that adapters can be put on. Holds no reference to the module.

    Attributes:
        kind: `linear`, `embedding`, `conv`, `attention` or `parameter` for one weight (see `Site`); `module` for all tensors of one;
            `self_attention` and `block` for what acts around a whole (see `WholeSite`).
        n_out, n_in: the sides of the weight, 0 where it is not about one.
        kernel: spatial kernel of a convolution, empty otherwise;  groups, channels: its groups and input channels;  experts: E of a 3-D parameter, else 0.
        batch_dim: which dimension of the first input counts the rows of a batch.
    """

    kind: ClassVar[str]
    n_out: int = 0
    n_in: int = 0
    kernel: tuple[int, ...] = ()
    groups: int = 1
    experts: int = 0
    channels: int = 0
    batch_dim: int = 0

    def __init__(self, module: nn.Module) -> None:
        self.codec: Codec = type(codec_for(module))()  # its own: an object that layers share is compared for each in compiled code
        self.mutates = False  # the module's forward writes into its own weight

    @abstractmethod
    def where(self, module: nn.Module) -> tuple[torch.device, torch.dtype]:
        """The device of the module's numbers, and the floating dtype that it computes in."""

    @abstractmethod
    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors that an adapter may change, by name inside the module, as the module has them now."""

    @property
    def ordinary(self) -> bool:
        """Whether it is a linear layer's own product with a plain weight (n_out, n_in), and nothing else."""
        return False

    @abstractmethod
    def substituted(self, module: nn.Module, changes: Any, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """These tensors by name under the changes, formed whole. `frozen`: tensors that take the place of the module's own."""

    @abstractmethod
    def apply(self, module: nn.Module, changes: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], frozen: Mapping[str, Any]) -> Any:
        """The module's output under the changes. `frozen`: tensors that take the place of the module's own (a merged layer's originals)."""


class Site(Adaptable):
    """Where one frozen weight lives; the canonical weight W is (n_out, n_in).

    Attributes:
        weight_name, bias_name: the module's own names of the two tensors.
    """

    weight_name: str = "weight"
    bias_name: str = "bias"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.own_forward = False  # the module computes something of its own: run it whole with W' in place of W

    @abstractmethod
    def canonical(self, stored: Tensor) -> Tensor:
        """The stored tensor as (n_out, n_in), a view."""

    @abstractmethod
    def stored(self, w: Tensor) -> Tensor:
        """W in the module's own layout, a view; the inverse of `canonical`."""

    @property
    def weight_key(self) -> str:
        """What the module that holds the weight calls it."""
        return self.weight_name.rpartition(".")[2]

    def where(self, module: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.codec.device(module, self.weight_key), self.codec.dtype(module, self.weight_key)

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        b = self.bias(module)
        stored = self.stored(self.weight(module))
        return {self.weight_name: stored} if b is None else {self.weight_name: stored, self.bias_name: b}

    def weight(self, module: nn.Module) -> Tensor:
        """The frozen W (n_out, n_in) as the module has it now."""
        return self.canonical(fetched(module, lambda: self.codec.weight(module, self.weight_name)))

    def bias(self, module: nn.Module) -> Tensor | None:
        b: Tensor | None = getattr(module, self.bias_name, None)
        return b if b is None else whole(fetched(module, lambda: getattr(module, self.bias_name)))

    def dense(self, module: nn.Module, w: Tensor, b: Tensor | None) -> nn.Module:
        """torch's own module that does what this one does with `w` (in the layout of `stored`) and `b` in the place of packed tensors."""
        raise NotImplementedError(f"a {self.kind} site is never packed")

    def substituted(self, module: nn.Module, changes: Changes, frozen: Mapping[str, Any]) -> dict[str, Any]:
        stored = frozen.get(self.weight_name)
        w = self.weight(module) if stored is None else self.canonical(stored)
        b = frozen.get(self.bias_name, self.bias(module))
        out = dict(frozen)
        out[self.weight_name] = self.stored(weight(changes, w))
        if b is not None or any(c.shift is not None for c, _ in changes):
            new = bias(changes, b)
            out[self.bias_name] = new if new is None else new.to(w.dtype)
        return out

    def run_whole(
        self, module: nn.Module, changes: Changes, args: tuple[Any, ...], kwargs: Mapping[str, Any], frozen: Mapping[str, Any]
    ) -> Any:
        """The module itself, run with W' formed whole: right for whatever its forward does. For a packed one, torch's own module."""
        if not self.codec.plain:
            tensors = self.substituted(module, changes, frozen)
            return self.dense(module, tensors[self.weight_name], tensors.get(self.bias_name))(*args, **kwargs)
        return call_with(module, self.substituted(module, changes, frozen), args, kwargs)


def filled(new: nn.Module, old: nn.Module, tensors: Mapping[str, Tensor | None]) -> nn.Module:
    """A new module, given its tensors, and the hooks and mode of the one whose place it takes."""
    for name, t in tensors.items():
        if t is not None and not isinstance(t, nn.Parameter):  # a result of this call, with its gradient
            del new._parameters[name]
            new.__dict__[name] = t
        else:
            new._parameters[name] = t
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        new.__dict__[hooks] = old.__dict__[hooks]
    return new.train(old.training)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


@functools.cache
def _weights() -> tuple[type[Site], ...]:
    from .attention import AttentionSite
    from .conv import ConvSite
    from .embedding import EmbeddingSite
    from .linear import LinearSite

    return (AttentionSite, LinearSite, EmbeddingSite, ConvSite)


@functools.cache
def _wholes() -> tuple[type[Adaptable], ...]:
    from .block import BlockSite
    from .module import ModuleSite
    from .self_attention import SelfAttentionSite

    return (ModuleSite, SelfAttentionSite, BlockSite)


def site_for(module: nn.Module) -> Site:
    """The site of the weight of a module.

    Raises:
        TypeError: for a module of no supported kind.
    """
    for kind in _weights():
        if kind.matches(module):  # type: ignore[attr-defined]
            return kind(module)
    raise TypeError(f"{type(module).__name__} cannot be adapted: it is no linear, embedding, convolution or attention layer")


def supported(module: nn.Module) -> str | None:
    """The kind of weight a module holds, or None."""
    return next((k.kind for k in _weights() if k.matches(module)), None)  # type: ignore[attr-defined]


def adaptable(module: nn.Module, kinds: Collection[str]) -> type[Adaptable] | None:
    """The first of these kinds of site that a module is, or None."""
    return next((k for k in (*_weights(), *_wholes()) if k.kind in kinds and k.matches(module)), None)  # type: ignore[attr-defined]
