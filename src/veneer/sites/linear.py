"""nn.Linear and transformers' Conv1D (which stores Wᵀ), their subclasses included, and the linear layers of quantisation libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ..bases import Stored, codec_for
from ..change import Change, bias, derived, fused, placed, rows
from ..engine.substitute import call_with
from ..kernels.autograd import ordinary
from ..kernels.derived import derived_linear
from ..kernels.dropout import dropped
from ..kernels.lowrank import few_rows, lowrank_linear
from ..kernels.packed import packed_linear
from ..kernels.products import linear
from ..kernels.rowwise import add_rowwise
from ..kernels.sparse import sparse_linear
from ..ops import Diag, LowRank, Rows, Vectored
from ..sharding import held
from .base import Changes, Site, filled, hooked
from .parallel import Plan, is_parallel


class LinearGeometry(Rows):
    def drop(self, x: Tensor, p: float) -> Tensor:
        return dropped(x, p)


_GEOMETRY = LinearGeometry()


class LinearSite(Site):
    """y = x Wᵀ + b, x (..., n_in)."""

    kind: ClassVar[str] = "linear"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.plan: Plan | None = None  # how a tensor-parallel layer is cut
        self.transposed = self.codec.plain and not isinstance(module, nn.Linear)
        if self.transposed:
            self.n_in, self.n_out = (int(n) for n in module.weight.shape)  # type: ignore[union-attr]
        elif self.codec.plain:
            self.n_out, self.n_in = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
            self.own_forward = type(module).forward is not nn.Linear.forward
        else:
            self.n_out, self.n_in = self.codec.shape(module)

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return (
            isinstance(module, nn.Linear)
            or any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)
            or (not isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)) and _packed_linear_layer(module))
        )

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.T if self.transposed else stored

    def stored(self, w: Tensor) -> Tensor:
        return w.T if self.transposed else w

    @property
    def ordinary(self) -> bool:
        return type(self) is LinearSite and self.codec.plain and not self.transposed and not self.own_forward

    def apply(
        self, module: nn.Module, changes: Changes, args: tuple[Any, ...], kwargs: Mapping[str, Any], frozen: Mapping[str, Any]
    ) -> Any:
        if not self.codec.plain:
            return self._packed(module, changes, args, kwargs)
        more = self.own_forward or len(args) != 1 or bool(kwargs)
        if more and all(c.fixed for c, _ in changes):
            return self.run_whole(module, changes, args, kwargs, frozen)
        x: Tensor = args[0]
        if not more and is_parallel(module, module._parameters.get(self.weight_name)):
            if self.plan is None:
                self.plan = Plan(module, module.weight, x, type(module).__name__)
            return self.plan.part(self._product(module, changes, self.plan.whole(x), frozen))
        if more or (hooked(module) and "_original_parameters" not in module.__dict__):  # ZeRO-3's hooks fetch what the layer has fetched
            return self._around(module, changes, args, kwargs, frozen)
        return self._product(module, changes, x, frozen)

    def _product(self, module: nn.Module, changes: Changes, x: Tensor, frozen: Mapping[str, Any]) -> Tensor:
        """The changed product, without the module's own call."""
        stored = frozen.get(self.weight_name)
        w = self.weight(module) if stored is None else self.canonical(stored)
        return self.times(w, frozen[self.bias_name] if self.bias_name in frozen else self.bias(module), changes, x)

    @staticmethod
    def times(w: Tensor, b: Tensor | None, changes: Changes, x: Tensor) -> Tensor:
        """x W'ᵀ + b', of the frozen w (n_out, n_in) and b (n_out,)."""
        b = bias(changes, b)
        if b is not None and b.dtype != w.dtype:
            b = b.to(w.dtype)
        if not changes:
            return linear(x, w, b)
        one = fused(changes, x)
        if one is not None:
            low, gain = one
            return lowrank_linear(x, w, b, low.down, low.up, low.scale, dropout=low.dropout, gain=gain)
        dense = derived(changes)
        if dense is not None:
            return derived_linear(x, w, b, dense.make, dense.parts, dense.factors)
        some = placed(changes)
        if some is not None:
            sparse, rest = some
            y = sparse_linear(x, w, b, sparse.index, sparse.values, sparse.shape)
            for op in rest:
                y = op.add_to(y, x, _GEOMETRY)
            return y
        if all(c.additive for c, _ in changes):  # the frozen product is taken once, of x itself: the bias goes with it
            return rows(changes, lambda z: linear(z, w, b), x, _GEOMETRY)
        y = rows(changes, lambda z: linear(z, w), x, _GEOMETRY)
        return y if b is None else y + b.to(y.dtype)

    @staticmethod
    def for_few(w: Tensor, b: Tensor | None, change: Change) -> Callable[[Tensor], Tensor] | None:
        """What `times` does of this one change to a few rows on the CPU without gradients, for as long as these tensors are the ones, whatever is written
        into them; None where more has to be asked, or computed, than the rows are worth."""
        if change.base is not None or change.shift is not None or not all(map(ordinary, (w, b, change.gain))):
            return None
        if b is not None and b.dtype != w.dtype:
            return None
        add, beside = change.add, [op for op in (change.left, change.right) if op is not None]
        if isinstance(add, LowRank) and not beside and add.dropout == 0 and ordinary(add.up) and ordinary(add.down):
            return partial(few_rows, w=w, b=b, a=add.down, up=add.up, scale=add.scale, gain=change.gain)
        if change.gain is not None or not all(isinstance(op, (Diag, Vectored)) for op in (add, *beside) if op is not None):
            return None
        within, after = (b, None) if change.left is None or change.left_on_bias else (None, b)

        def run(x: Tensor) -> Tensor:
            y = change.rows(lambda z: F.linear(z, w, within), x, _GEOMETRY)
            return y if after is None else y + after

        return run

    def _packed(self, module: nn.Module, changes: Changes, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """With W packed: multiplied by its storage, never kept whole. A module with hooks is called as a whole."""
        if not args:  # the input has a name: torch's own module knows it as well
            return self.run_whole(module, changes, args, kwargs, {})
        x, *rest = args
        b, stored = self.bias(module), Stored(self.codec, module)
        if rest or kwargs or hooked(module):
            shift = b.detach() if b is not None else None

            def call(z: Tensor) -> Tensor:
                y: Tensor = module(z, *rest, **kwargs)
                return y if shift is None else y - shift.to(y.dtype)

            stored = Stored(self.codec, module, call)
        new = bias(changes, b)
        one = fused(changes, x)
        if one is not None:
            low, gain = one
            return lowrank_linear(x, stored, new, low.down, low.up, low.scale, dropout=low.dropout, gain=gain)
        y = rows(changes, lambda z: packed_linear(z, stored), x, _GEOMETRY)
        return y if new is None else y + new.to(y.dtype)

    def splits(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the module does to each row of the batch what it does to all, and its product may be taken apart from the changes."""
        x = args[0] if args else None
        alone = len(args) == 1 and not kwargs and isinstance(x, Tensor) and x.ndim > 1
        return alone and not (self.own_forward or hooked(module))

    def apply_rows(self, module: nn.Module, lows: Sequence[LowRank], owner: Sequence[int], x: Tensor, frozen: Mapping[str, Any]) -> Tensor:
        """The module's output, with a low-rank change of its own for each row of the batch (`owner`: which, -1 for none); see `splits`."""
        z = x.reshape(len(owner), -1, x.shape[-1])
        b = frozen.get(self.bias_name, self.bias(module))
        if self.codec.plain:
            stored = frozen.get(self.weight_name)
            y = linear(z, self.weight(module) if stored is None else self.canonical(stored), b)
        else:
            y = packed_linear(z, Stored(self.codec, module))
            y = y if b is None else y + b.to(y.dtype)
        return add_rowwise(y, z, [(low.down, low.up, low.scale) for low in lows], owner).view(*x.shape[:-1], self.n_out)

    def dense(self, module: nn.Module, w: Tensor, b: Tensor | None) -> nn.Module:
        out = nn.Linear(self.n_in, self.n_out, bias=b is not None, device="meta")
        return filled(out, module, {self.weight_name: w, self.bias_name: b})

    def _around(
        self, module: nn.Module, changes: Changes, args: tuple[Any, ...], kwargs: Mapping[str, Any], frozen: Mapping[str, Any]
    ) -> Tensor:
        """Through the module's own call, so that its hooks run and its storage multiplies; its bias is taken off for the changes."""
        x, *rest = args

        def base(z: Tensor) -> Tensor:
            out: Tensor = call_with(module, frozen, (z, *rest), kwargs) if frozen else module(z, *rest, **kwargs)
            return out

        # of additive changes the bias stays in the base's output, and is not asked for: it may have to be brought in
        alone = all(c.additive for c, _ in changes)
        b = None if alone else held(frozen[self.bias_name] if self.bias_name in frozen else self.bias(module))
        if b is not None:
            y = rows(changes, lambda z: base(z) - b.to(z.dtype), x, _GEOMETRY)
            new = bias(changes, b)
            return y if new is None else y + new.to(y.dtype)
        y = rows(changes, base, x, _GEOMETRY)
        for c, _ in changes:
            y = y if c.shift is None else y + c.shift.to(y.dtype)
        return y


def _packed_linear_layer(module: nn.Module) -> bool:
    codec = codec_for(module)
    return not codec.plain and "linear" in codec.kinds
