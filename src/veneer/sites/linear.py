"""nn.Linear and transformers' Conv1D (which stores Wᵀ), their subclasses included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ..change import bias, derived, fused, placed, rows
from ..engine.substitute import call_with
from ..kernels.derived import derived_linear
from ..kernels.lowrank import lowrank_linear
from ..kernels.sparse import sparse_linear
from ..ops import Rows
from .base import Changes, Site, hooked


class LinearGeometry(Rows):
    def drop(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p)


_GEOMETRY = LinearGeometry()


class LinearSite(Site):
    """y = x Wᵀ + b, x (..., n_in)."""

    kind: ClassVar[str] = "linear"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.transposed = not isinstance(module, nn.Linear)
        if self.transposed:
            self.n_in, self.n_out = (int(n) for n in module.weight.shape)  # type: ignore[union-attr]
        else:
            self.n_out, self.n_in = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
            own = type(module).forward is not nn.Linear.forward
            self.own_forward = own and self.codec.plain

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or any(
            c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__
        )

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.T if self.transposed else stored

    def stored(self, w: Tensor) -> Tensor:
        return w.T if self.transposed else w

    def apply(
        self, module: nn.Module, changes: Changes, args: tuple[Any, ...], kwargs: Mapping[str, Any], frozen: Mapping[str, Any]
    ) -> Any:
        more = self.own_forward or len(args) != 1 or bool(kwargs)
        if more and all(c.fixed for c, _ in changes):
            return self.run_whole(module, changes, args, kwargs, frozen)
        x: Tensor = args[0]
        if more or hooked(module) or not self.codec.plain:
            return self._around(module, changes, args, kwargs, frozen)
        stored = frozen.get(self.weight_name)
        w = self.weight(module) if stored is None else self.canonical(stored)
        b = bias(changes, frozen.get(self.bias_name, module.bias))  # type: ignore[arg-type]
        if b is not None and b.dtype != w.dtype:
            b = b.to(w.dtype)
        one = fused(changes)
        if one is not None:
            low, gain = one
            return lowrank_linear(x, w, b, low.down, low.up, low.scale, dropout=low.dropout, gain=gain)
        dense = derived(changes)
        if dense is not None:
            return derived_linear(x, w, b, dense.make, dense.parts)
        some = placed(changes)
        if some is not None:
            sparse, rest = some
            y = sparse_linear(x, w, b, sparse.index, sparse.values, sparse.shape)
            for op in rest:
                y = op.add_to(y, x, _GEOMETRY)
            return y
        if all(c.additive for c, _ in changes):  # the frozen product is taken once, of x itself: the bias goes with it
            return rows(changes, lambda z: F.linear(z, w, b), x, _GEOMETRY)
        y = rows(changes, lambda z: F.linear(z, w), x, _GEOMETRY)
        return y if b is None else y + b.to(y.dtype)

    def _around(
        self, module: nn.Module, changes: Changes, args: tuple[Any, ...], kwargs: Mapping[str, Any], frozen: Mapping[str, Any]
    ) -> Tensor:
        """Through the module's own call, so that its hooks run and its storage multiplies; its bias is taken off for the changes."""
        x, *rest = args

        def base(z: Tensor) -> Tensor:
            out: Tensor = call_with(module, frozen, (z, *rest), kwargs) if frozen else module(z, *rest, **kwargs)
            return out

        b = frozen[self.bias_name] if self.bias_name in frozen else self.bias(module)
        if b is not None and any(not c.additive for c, _ in changes):
            y = rows(changes, lambda z: base(z) - b.to(z.dtype), x, _GEOMETRY)
            new = bias(changes, b)
            return y if new is None else y + new.to(y.dtype)
        y = rows(changes, base, x, _GEOMETRY)
        for c, _ in changes:
            y = y if c.shift is None else y + c.shift.to(y.dtype)
        return y
