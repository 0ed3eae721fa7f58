"""nn.Embedding and its subclasses. The canonical weight is the table transposed: W (width, vocabulary), a token is a one-hot row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..change import rows
from ..engine.substitute import call_with
from .base import Changes, Site, filled


class Lookup:
    """Geometry of a table: contracting with M (m, vocabulary) looks up the columns of M.

    The module itself does the look-up on the thin table, so whatever its forward does (scaling what it finds, padding) holds for the
    change as well.
    """

    plain: ClassVar[bool] = False

    def __init__(self, module: nn.Embedding, own: bool) -> None:
        self.module = module
        self.own = own

    @property
    def lookup_scale(self) -> Any:
        return getattr(self.module, "embed_scale", 1.0) if self.own else 1.0

    def contract(self, x: Tensor, m: Tensor) -> Tensor:
        table = m.T
        if self.own:
            out: Tensor = call_with(self.module, {"weight": table}, (x,), {}, embedding_dim=table.shape[1], max_norm=None)
            return out
        pad = self.module.padding_idx
        return F.embedding(x, table, padding_idx=pad, scale_grad_by_freq=self.module.scale_grad_by_freq)

    def mix(self, h: Tensor, n: Tensor) -> Tensor:
        return F.linear(h, n.to(h.dtype))

    def last(self, y: Tensor) -> Tensor:
        return y

    def unlast(self, y: Tensor) -> Tensor:
        return y

    def drop(self, x: Tensor, p: float) -> Tensor:
        return x  # token numbers cannot be scaled


class EmbeddingSite(Site):
    """y = Wᵀ[tokens], tokens (...) integers."""

    kind: ClassVar[str] = "embedding"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        assert isinstance(module, nn.Embedding)
        self.n_in, self.n_out = module.num_embeddings, module.embedding_dim
        self.mutates = module.max_norm is not None
        self.own_forward = self.codec.plain and type(module).forward is not nn.Embedding.forward

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.T

    def stored(self, w: Tensor) -> Tensor:
        return w.T

    def bias(self, module: nn.Module) -> Tensor | None:
        return None

    def dense(self, module: nn.Module, w: Tensor, b: Tensor | None) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        out = nn.Embedding(self.n_in, self.n_out, module.padding_idx, device="meta")
        return filled(out, module, {self.weight_name: w})

    def apply(
        self, module: nn.Module, changes: Changes, args: tuple[Any, ...], kwargs: Mapping[str, Any], frozen: Mapping[str, Any]
    ) -> Any:
        assert isinstance(module, nn.Embedding)
        if len(args) != 1 or kwargs:
            if not changes:
                return call_with(module, frozen, args, kwargs)
            return self.run_whole(module, changes, args, kwargs, frozen)
        geo = Lookup(module, self.own_forward)
        limit = module.max_norm

        def base(tokens: Tensor) -> Tensor:
            out: Tensor
            if limit is not None:  # the limit holds for the changed rows; nothing is renormalised in place
                out = call_with(module, frozen, (tokens,), {}, max_norm=None)
            else:
                out = call_with(module, frozen, (tokens,), {}) if frozen else module(tokens)
            return out

        y = rows(changes, base, args[0], geo) if changes else base(args[0])
        if limit is not None:
            norm = torch.linalg.vector_norm(y, module.norm_type, dim=-1, keepdim=True)
            y = torch.where(norm > limit, y * (limit / (norm + 1e-7)), y)
        return y.to(self.codec.dtype(module))
