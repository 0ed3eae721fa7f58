"""Any nn.Parameter of any module by name, 3-D expert weights included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import BuiltinFunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..change import weight
from ..engine.offload import fetched
from ..engine.substitute import call_with
from ..errors import ConfigError
from ..ops import LowRank
from ..sharding import is_partitioned, whole
from .base import Changes, Site


class ParameterSite(Site):
    """W is the parameter: (n_out, n_in), or E experts (E, n_out, n_in), stored (E, n_in, n_out) where the module says `is_transposed`."""

    kind: ClassVar[str] = "parameter"

    def __init__(self, module: nn.Module, name: str) -> None:
        self.weight_name = name
        super().__init__(module)
        if not self.codec.plain:
            raise ConfigError(
                f"target_parameters cannot adapt {name!r}: its module is quantised ({self.codec.name}), so there is no parameter that holds the weight. "
                "Name the module in target_modules."
            )
        p = self._of(module)
        if is_partitioned(p):
            raise ConfigError(
                f"target_parameters cannot adapt {name!r}: DeepSpeed's ZeRO-3 keeps it in pieces. Adapt the model before it is cut (without zero.Init), name "
                "modules in target_modules, or use ZeRO-2, FSDP2 (veneer.distributed.shard) or DDP."
            )
        if p.ndim not in (2, 3):
            raise ConfigError(f"target_parameters can adapt 2-D and 3-D parameters; {name!r} has shape {tuple(p.shape)}.")
        self.transposed = p.ndim == 3 and bool(getattr(module, "is_transposed", False))
        *lead, n_out, n_in = self.canonical(p).shape
        self.n_out, self.n_in = n_out, n_in
        self.experts = lead[0] if lead else 0
        self.own_forward = True

    def _of(self, module: nn.Module) -> Tensor:
        holder = module.get_submodule(self.weight_name.rpartition(".")[0])
        return fetched(holder, lambda: getattr(holder, self.weight_key))

    def weight(self, module: nn.Module) -> Tensor:
        return self.canonical(whole(self._of(module)))

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.mT if self.transposed else stored

    def stored(self, w: Tensor) -> Tensor:
        return w.mT if self.transposed else w

    def bias(self, module: nn.Module) -> Tensor | None:
        return None

    def substituted(self, module: nn.Module, changes: Changes, frozen: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(frozen)
        w = frozen.get(self.weight_name, self._of(module))
        out[self.weight_name] = self.stored(weight(changes, self.canonical(w)))
        return out

    def apply(
        self, module: nn.Module, changes: Changes, args: tuple[Any, ...], kwargs: Mapping[str, Any], frozen: Mapping[str, Any]
    ) -> Any:
        lazy = all(c.additive and isinstance(c.add, LowRank) for c, _ in changes) and not torch.compiler.is_compiling()
        lazy = lazy and isinstance(F.linear, BuiltinFunctionType)  # DeepSpeed puts one in its place that takes tensors alone
        if not lazy:
            return self.run_whole(module, changes, args, kwargs, frozen)
        stored = frozen.get(self.weight_name, self._of(module))
        parts = [(c.add.up * c.add.scale, c.add.down) for c, _ in changes if isinstance(c.add, LowRank)]
        thin = Thin(stored, torch.cat([u for u, _ in parts], -1), torch.cat([d for _, d in parts], -2), self.transposed)
        return call_with(module, {**frozen, self.weight_name: thin}, args, kwargs)


class Thin:
    """Stands for W + U V in a module's forward without ever forming U V.

    Products with it are done thin; indexing, transposing and splitting it give the like of it; whatever else is asked of it is answered
    by the sum of the part asked for.

    Args:
        w: (..., n_out, n_in), or (..., n_in, n_out) if `flipped`: in the layout the module knows.
        up: (..., n_out, r);  down: (..., r, n_in).
    """

    def __init__(self, w: Tensor, up: Tensor, down: Tensor, flipped: bool) -> None:
        self.w, self.up, self.down, self.flipped = w, up.to(w.dtype), down.to(w.dtype), flipped

    def whole(self) -> Tensor:
        """W + U V formed, for what has no thin way."""
        d = self.up @ self.down
        return self.w + (d.mT if self.flipped else d)

    def times(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """x · W with `product` a batched matrix product and W in the layout (in, out)."""
        return product(x, self.w) + product(product(x, self.down.mT), self.up.mT)

    def aligned(self) -> Thin:
        """The same with a rank whose rows are multiples of 16 bytes, which grouped products ask for."""
        more = -self.down.shape[-2] % (16 // self.down.element_size())
        if not more:
            return self
        return self._like(self.w, nn.functional.pad(self.up, (0, more)), nn.functional.pad(self.down, (0, 0, 0, more)), self.flipped)

    def _like(self, w: Tensor, up: Tensor, down: Tensor, flipped: bool) -> Thin:
        return Thin(w, up, down, flipped)

    @property
    def mT(self) -> Thin:  # noqa: N802  the tensor's own name
        return self._like(self.w.mT, self.up, self.down, not self.flipped)

    @property
    def T(self) -> Any:  # noqa: N802
        return self.mT if self.w.ndim == 2 else self.whole().T

    def t(self) -> Thin:
        return self.mT

    def transpose(self, dim0: int, dim1: int) -> Any:
        n = self.w.ndim
        return self.mT if {dim0 % n, dim1 % n} == {n - 1, n - 2} else self.whole().transpose(dim0, dim1)

    def permute(self, *args: Any, dims: Any = None) -> Any:
        order = tuple(dims or (args[0] if len(args) == 1 and not isinstance(args[0], int) else args))
        n = self.w.ndim
        return self.mT if tuple(d % n for d in order) == (*range(n - 2), n - 1, n - 2) else self.whole().permute(order)

    def __getitem__(self, key: Any) -> Any:
        if self.w.ndim == 3 and isinstance(key, (int, slice, Tensor)):  # some of the experts
            return self._like(self.w[key], self.up[key], self.down[key], self.flipped)
        return self.whole()[key]

    def __iter__(self) -> Any:
        return iter([self[i] for i in range(len(self.w))])

    def __len__(self) -> int:
        return len(self.w)

    def unbind(self, dim: int = 0) -> Any:
        return tuple(self) if dim == 0 else self.whole().unbind(dim)

    def to(self, *args: Any, **kwargs: Any) -> Thin:
        return self._like(self.w.to(*args, **kwargs), self.up.to(*args, **kwargs), self.down.to(*args, **kwargs), self.flipped)

    def contiguous(self) -> Thin:
        return self

    def __matmul__(self, other: Any) -> Any:
        return self.whole() @ other

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return self._product(other)

    def _product(self, x: Tensor) -> Tensor:
        # the layout decides which side is the input: x @ W needs W as (in, out)
        if self.flipped:
            return self.times(x, torch.matmul)
        d = x @ self.up
        return x @ self.w + d @ self.down

    def __getattr__(self, name: str) -> Any:
        # shape, dtype, device and the like are the weight's own; anything computed from values needs the whole sum
        if name in {
            "shape",
            "dtype",
            "device",
            "ndim",
            "size",
            "dim",
            "stride",
            "is_cuda",
            "layout",
            "requires_grad",
            "numel",
            "is_floating_point",
        }:
            return getattr(self.w, name)
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in {"matmul", "__matmul__", "__rmatmul__", "bmm", "mm"} and len(args) == 2 and isinstance(args[1], Thin) and not kwargs:
            x, thin = args
            if not isinstance(x, Thin):
                return thin._product(x)
        if name == "linear":
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            if isinstance(given["weight"], Thin) and not isinstance(given["input"], Thin):
                y, b = given["weight"].mT._product(given["input"]), given.get("bias")
                return y if b is None else y + b
        if name in {"_grouped_mm", "grouped_mm"} and len(args) > 1 and isinstance(args[1], Thin) and not isinstance(args[0], Thin):
            x, thin = args[0], args[1].aligned()
            first, second = (thin.down.mT, thin.up.mT) if thin.flipped else (thin.up, thin.down)
            return func(x, thin.w, *args[2:], **kwargs) + func(func(x, first, *args[2:], **kwargs), second, *args[2:], **kwargs)
        if name in {"transpose", "permute", "t", "unbind"} and args and isinstance(args[0], Thin):
            return getattr(args[0], name)(*args[1:], **kwargs)
        plain = [
            a.whole()
            if isinstance(a, Thin)
            else [b.whole() if isinstance(b, Thin) else b for b in a]
            if isinstance(a, (list, tuple))
            else a
            for a in args
        ]
        return func(*plain, **{k: v.whole() if isinstance(v, Thin) else v for k, v in kwargs.items()})


def _by_the_sum(name: str) -> Any:
    def operator_of(self: Thin, *others: Any) -> Any:
        return getattr(self.whole(), name)(*others)

    return operator_of


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):  # Python looks for operators in the class alone
    for _side in ("", "r"):
        setattr(Thin, f"__{_side}{_name}__", _by_the_sum(f"__{_side}{_name}__"))
for _name in ("neg", "abs", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Thin, f"__{_name}__", _by_the_sum(f"__{_name}__"))
