"""nn.Conv1d, Conv2d, Conv3d and their subclasses. The canonical weight is (channels out, channels in / groups · kernel)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..change import bias, rows
from ..engine.substitute import call_with
from ..kernels.dropout import dropped
from ..sharding import held
from .base import Changes, Site, filled, hooked

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_KINDS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


class Windows:
    """Geometry of a convolution: contracting with M (m, channels · kernel) is a convolution with m channels."""

    plain: ClassVar[bool] = False

    def __init__(self, module: Any, own: bool) -> None:
        self.module, self.own = module, own

    def contract(self, x: Tensor, m: Tensor) -> Tensor:
        conv = self.module
        channels = m.shape[1] // math.prod(conv.kernel_size)
        kernel = m.reshape(m.shape[0], channels, *conv.kernel_size)
        groups = conv.groups if channels * conv.groups == conv.in_channels and conv.groups > 1 else 1
        if self.own:
            out: Tensor = call_with(conv, {"weight": kernel, "bias": None}, (x,), {}, groups=groups, out_channels=m.shape[0])
            return out
        return convolve(conv, x, kernel, None, groups)

    def mix(self, h: Tensor, n: Tensor) -> Tensor:
        d = len(self.module.kernel_size)
        n = n.to(h.dtype)
        return _CONV[d](h, n.reshape(*n.shape, *(1,) * d))

    def last(self, y: Tensor) -> Tensor:
        return y.movedim(-1 - len(self.module.kernel_size), -1)

    def unlast(self, y: Tensor) -> Tensor:
        return y.movedim(-1, -1 - len(self.module.kernel_size))

    def drop(self, x: Tensor, p: float) -> Tensor:
        return dropped(x, p)


def convolve(conv: Any, x: Tensor, kernel: Tensor, b: Tensor | None, groups: int) -> Tensor:
    """What nn.ConvNd computes, its padding mode included, with another kernel, bias and grouping."""
    padding = conv.padding
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    return _CONV[len(conv.kernel_size)](x, kernel, b, conv.stride, padding, conv.dilation, groups)


class ConvSite(Site):
    """y = conv(x, W) + b, x (batch, channels, ...)."""

    kind: ClassVar[str] = "conv"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        conv: Any = module
        self.kernel, self.groups = tuple(conv.kernel_size), int(conv.groups)
        self.n_out, self.n_in = int(conv.out_channels), int(conv.in_channels // conv.groups) * math.prod(self.kernel)
        self.channels = int(conv.in_channels)
        known = next(k for k in _KINDS if isinstance(module, k))
        own = type(module).forward is not known.forward or type(module)._conv_forward is not known._conv_forward  # type: ignore[attr-defined]
        self.own_forward = own and self.codec.plain

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return isinstance(module, tuple(_KINDS)) and not isinstance(module, nn.modules.conv._ConvTransposeNd)

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.reshape(self.n_out, self.n_in)

    def stored(self, w: Tensor) -> Tensor:
        return w.reshape(self.n_out, -1, *self.kernel)

    def dense(self, module: nn.Module, w: Tensor, b: Tensor | None) -> nn.Module:
        conv: Any = module
        known = next(k for k in _KINDS if isinstance(module, k))
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        options = {n: getattr(conv, n) for n in names}
        out = known(conv.in_channels, conv.out_channels, conv.kernel_size, bias=b is not None, device="meta", **options)
        return filled(out, module, {self.weight_name: w, self.bias_name: b})

    def apply(
        self, module: nn.Module, changes: Changes, args: tuple[Any, ...], kwargs: Mapping[str, Any], frozen: Mapping[str, Any]
    ) -> Any:
        wide = self.groups > 1
        if len(args) != 1 or kwargs or any(c.right is not None or c.base is not None for c, _ in changes):
            return self.run_whole(module, changes, args, kwargs, frozen)
        if self.own_forward and not wide:
            return self.run_whole(module, changes, args, kwargs, frozen)
        geo = Windows(module, self.own_forward)
        x: Tensor = args[0]
        inside = all(c.additive and c.shift is None for c, _ in changes)  # then the bias may come with the base's output
        own: Any = module.bias if inside else self.bias(module)
        b = held(frozen.get(self.bias_name, own))

        def dequantised(z: Tensor) -> Tensor:
            return convolve(module, z, self.codec.weight(module, dtype=z.dtype), b if inside else None, self.groups)  # type: ignore[arg-type]

        def base(z: Tensor) -> Tensor:
            if self.own_forward or hooked(module):
                call = module if self.codec.plain else partial(checkpoint, module, use_reentrant=False)
                out: Tensor = call_with(module, frozen, (z,), {}) if frozen else call(z)
                return out if b is None or inside else out - _shaped(b, self.kernel)
            if not self.codec.plain:
                packed: Tensor = checkpoint(dequantised, z, use_reentrant=False)
                return packed
            w = frozen.get(self.weight_name, module.weight)
            return convolve(module, z, w, b if inside else None, self.groups)  # type: ignore[arg-type]

        y = rows(changes, base, x, geo)
        new = None if inside else bias(changes, b)  # type: ignore[arg-type]
        return y if new is None else y + _shaped(new.to(y.dtype), self.kernel)


def _shaped(b: Tensor, kernel: tuple[int, ...]) -> Tensor:
    return b.view(-1, *(1,) * len(kernel))
