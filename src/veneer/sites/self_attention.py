"""Attention with projections q, k, v and o, or a fused c_attn, whatever its class: grouped heads, norms on q and k, rotary positions."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.substitute import call_with
from ..errors import ConfigError
from .whole import Rows, WholeSite, added, first_of, taken, with_first

_OUT = ("o_proj", "out_proj")
_ROTARY = "apply_rotary_pos_emb"  # what files of transformers' models call the function (q, k, cos, sin) -> (q, k)


class SelfAttentionSite(WholeSite):
    """Further tokens, seen by every query, are given keys and values by the module's own projections, without a position.

    What they give to the heads goes through o as well, without its bias; not so behind a fused c_attn, where it is added to the output as it is.

    Attributes:
        heads, groups: query heads, and how many of them share one key;  head: the width of one;  scale: what q·k is multiplied by.

    Raises:
        ConfigError: if the module does not compute softmax(scale · q kᵀ) v, as a trial with two tokens shows.
    """

    kind: ClassVar[str] = "self_attention"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.fused = "c_attn" in module._modules
        self.q = "c_attn" if self.fused else "q_proj"
        self.out = "c_proj" if self.fused else next(n for n in _OUT if n in module._modules)
        self.takes = list(inspect.signature(type(module).forward).parameters)[1:]
        self.n_in, width = _sides(_part(module, self.q))
        width = width // 3 if self.fused else width
        heads = next(
            (getattr(o, n) for o, n in ((module, "num_heads"), (getattr(module, "config", None), "num_attention_heads")) if hasattr(o, n)),
            0,
        )
        self.head = int(getattr(module, "head_dim", 0) or (width // heads if heads else 0))
        if not self.head or width % self.head or (heads and heads * self.head != width):
            raise ConfigError(
                f"The heads of a {type(module).__name__} cannot be told: {heads or 'unknown'} of width {self.head or 'unknown'} in {width}."
            )
        self.heads = width // self.head
        self.groups = 1 if self.fused else width // _sides(_part(module, "k_proj"))[1]
        norm = getattr(module._modules.get("q_norm"), "weight", None)
        self.wide = norm is not None and norm.ndim == 1 and len(norm) != self.head  # q and k are normed across the heads
        own = getattr(module, "scaling", None)
        own = float(own) if isinstance(own, (int, float)) else self.head**-0.5
        self.scale = self.head**-0.5 if self.fused else own  # as in PEFT, whatever else a fused layer scales by
        if not any(p.is_meta for p in module.parameters()):
            self._try(module, own)

    @staticmethod
    def matches(module: nn.Module) -> bool:
        held = module._modules
        fused = {"c_attn", "c_proj"} <= held.keys() and not getattr(module, "is_cross_attention", False)
        return fused or ({"q_proj", "k_proj", "v_proj"} <= held.keys() and any(n in held for n in _OUT))

    def run(self, module: nn.Module, effects: Sequence[tuple[Any, Rows]], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = {**dict(zip(self.takes, args, strict=False)), **kwargs}
        if torch.compiler.is_compiling():  # neither can the module be copied then
            output, raw = module(*args, **kwargs), _part(module, self.q)(given[self.takes[0]])
        else:
            seen = _Seen(_part(module, self.q))
            output = call_with(module, {}, args, kwargs, **{self.q: seen})
            raw = seen.output
        q, y = self.queries(module, raw, given.get("position_embeddings")), first_of(output)
        for effect, rows in effects:
            keys, values = self.keys_values(module, effect.tokens.to(q.dtype))
            z = effect.mix(taken(q, rows), keys, values, self.scale)
            y = added(y, rows, self.leave(module, z.transpose(1, 2).flatten(2)))
        return with_first(output, y)

    def queries(self, module: nn.Module, raw: Tensor, positions: Any = None) -> Tensor:
        """What q is in the end, (batch, heads, tokens, head), from what its projection gave, (batch, tokens, width)."""
        q = self._normed(module, "q_norm", raw.chunk(3, -1)[0] if self.fused else raw).transpose(1, 2)
        return q if positions is None else _rotary_of(module)(q, q[:, :1], *positions)[0]

    def keys_values(self, module: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens (..., n, n_in) without a position, both (..., heads, n, head)."""
        k, v = _part(module, self.q)(tokens).chunk(3, -1)[1:] if self.fused else [_part(module, n)(tokens) for n in ("k_proj", "v_proj")]
        k, v = (t.transpose(-3, -2) for t in (self._normed(module, "k_norm", k), v.unflatten(-1, (-1, self.head))))
        return (k, v) if self.groups == 1 else (k.repeat_interleave(self.groups, -3), v.repeat_interleave(self.groups, -3))

    def leave(self, module: nn.Module, z: Tensor) -> Tensor:
        """What the heads' outputs z (batch, tokens, width) give behind the module."""
        if self.fused:  # as in PEFT
            return z
        o = _part(module, self.out)
        bias = getattr(o, "bias", None)
        y: Tensor = o(z)
        return y if bias is None else torch.sub(y, bias.to(y.dtype))

    def _normed(self, module: nn.Module, name: str, x: Tensor) -> Tensor:
        """x (..., width) in heads, (..., heads, head), through the module's norm where it has one."""
        norm: Any = module._modules.get(name)
        if norm is not None and self.wide:
            x = norm(x)
        heads: Tensor = x.unflatten(-1, (-1, self.head))
        y: Tensor = heads if norm is None or self.wide else norm(heads)
        return y

    @torch.no_grad()
    def _try(self, module: nn.Module, scale: float) -> None:
        """Compare what the module makes of two tokens with what it is taken for."""
        device, dtype = self.where(module)
        noise = torch.Generator().manual_seed(0)
        turn = torch.randn(1, 2, self.head // 2, generator=noise).repeat(1, 1, 2).to(device)
        turns = (turn.cos().to(dtype), turn.sin().to(dtype)) if "position_embeddings" in self.takes else None
        x = torch.randn(1, 2, self.n_in, generator=noise).to(device, dtype)
        modes = [(m, m.training) for m in module.modules()]
        module.eval()
        try:
            q, k, v = self._three(module, x, turns)
            x = x / float((q @ k.mT * scale).float().std().sqrt().clamp(1e-4, 1))  # so that it matters what the queries are
            given = {self.takes[0]: x, "attention_mask": None, "position_embeddings": turns}
            y = first_of(module(**{name: value for name, value in given.items() if name in self.takes}))
            q, k, v = self._three(module, x, turns)
            both = [F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale) for causal in (True, False)]
            mine = [_part(module, self.out)(z.transpose(1, 2).flatten(2)) for z in both]
        except Exception as e:  # whatever a module of another shape does not like
            raise ConfigError(f"{type(module).__name__} is no attention of a known shape: {type(e).__name__}: {e}") from e
        finally:
            for m, mode in modes:
                m.training = mode
        size = float(y.float().abs().max())
        if min(float((y - z).float().abs().max()) for z in mine) > size * (1e-3 if dtype.itemsize >= 4 else 5e-2):
            raise ConfigError(
                f"{type(module).__name__} has the projections of an attention layer, but does not compute softmax(q kᵀ) v of just them, so it "
                "cannot be told what its queries are."
            )

    def _three(self, module: nn.Module, x: Tensor, turns: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a sequence x, as the module is taken to have them."""
        q, (k, v) = self.queries(module, _part(module, self.q)(x)), self.keys_values(module, x)
        q, k = (q, k) if turns is None else _rotary_of(module)(q, k, *turns)
        return q, k, v


class _Seen:
    """Stands for a module in one call and keeps what it gave."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self.module(*args, **kwargs)
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _part(module: nn.Module, name: str) -> Any:
    return module._modules[name]


def _rotary_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    cls: Any = type(module)  # Any: mypy takes classes of modules for unhashable
    return _rotary(cls)


@functools.cache
def _rotary(cls: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function with which the files of a class of attention turn queries and keys."""
    for c in cls.__mro__:
        found = getattr(sys.modules.get(c.__module__), _ROTARY, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise ConfigError(
        f"{cls.__name__} takes position_embeddings, and its file has no {_ROTARY}, so it cannot be told how it turns its queries."
    )


def _sides(projection: Any) -> tuple[int, int]:
    """(in, out) of a linear layer or a Conv1D of transformers, adapted or not."""
    if hasattr(projection, "in_features"):
        return int(projection.in_features), int(projection.out_features)
    n_in, n_out = projection.weight.shape
    return int(n_in), int(n_out)
