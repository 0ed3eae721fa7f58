"""HiRA: a low-rank matrix modulates the frozen weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from ..change import Change
from ..inits.base import kaiming_
from ..method import Init, Leaf, Targeted
from ..ops import Derived, Dropped, Geometry, Op


@dataclass
class HiraConfig(Targeted, peft_type="HIRA"):
    """W' = W + W ⊙ (B A).   A Kaiming-uniform, B zeros; an embedding's A zeros, B normal.   Huang et al. 2025, openreview TwJrTz9cRS.

    PEFT 0.21.2 ignores `rank_pattern` on all but further adapters of a layer; here it acts. Files are read with the ranks that they have.
    """

    r: int = 32
    hira_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = field(default_factory=dict)

    prefix: ClassVar[str] = "hira_"
    positive: ClassVar[Any] = ("r",)
    choices: ClassVar[Any] = {"init_weights": (True, False, "gaussian")}
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv"})
    stacking: ClassVar[Any] = "sum"
    patterns: ClassVar[Mapping[str, str]] = MappingProxyType({"r": "rank_pattern"})
    examples: ClassVar[Any] = ({"r": 4},)

    def as_made(self, tensors: Mapping[str, Tensor]) -> Any:
        if not self.rank_pattern:
            return self
        ends = (".hira_A", ".hira_embedding_A")
        held = {k.removeprefix("base_model.model.").rpartition(".")[0]: len(t) for k, t in tensors.items() if k.endswith(ends)}
        return self if all(self.at(n).r == r for n, r in held.items()) else self.over({n: {"r": r} for n, r in held.items()})

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        zero: Init = nn.init.zeros_ if self.init_weights else nn.init.normal_
        first: Init = {True: kaiming_, "gaussian": _narrow(1 / self.r)}.get(self.init_weights, nn.init.normal_)
        a, b = (self.r, site.n_in), (site.n_out, self.r)
        if site.kind == "embedding":
            return {"hira_embedding_A": Leaf(a, zero), "hira_embedding_B": Leaf(b, nn.init.normal_)}
        if site.kind == "conv":
            a, b = (self.r, site.n_in // math.prod(site.kernel), *site.kernel), (*b, *(1,) * len(site.kernel))
        return {"hira_A": Leaf(a, first), "hira_B": Leaf(b, zero)}

    def combine(self, parts: Any, site: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """W ⊙ Σ w B A is of the same form, its rank the sum of theirs."""
        a, b = ("hira_embedding_A", "hira_embedding_B") if site.kind == "embedding" else ("hira_A", "hira_B")
        down, up = parts.joined(a, 0, weighted=True), parts.joined(b, 1)
        return {"r": down.shape[0]}, {a: down, b: up}

    def change(self, p: Any, site: Any) -> Change:
        a, b = (p.hira_embedding_A, p.hira_embedding_B) if site.kind == "embedding" else (p.hira_A.flatten(1), p.hira_B.flatten(1))
        w: Tensor = site.weight()
        if site.kind == "embedding":
            return Change(add=Modulated(w, b * site.scaling, a))
        add = Derived(lambda b, a: w.to(a.dtype) * (b @ a), (b * site.scaling, a))
        return Change(add=Dropped(add, site.dropout) if site.dropout > 0 else add)


@dataclass(eq=False)
class Modulated(Op):
    """M = W ⊙ (B A) of a table, looked up in both: nothing of the table's size is made, unless the module does something of its own with what it finds."""

    w: Tensor
    up: Tensor
    down: Tensor

    def dense(self) -> Tensor:
        return self.w.to(self.up.dtype) * (self.up @ self.down)

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        if getattr(geo, "own", True):
            return super().rows(x, geo)
        found = geo.contract(x, self.w)
        return found * geo.mix(geo.contract(x, self.down), self.up)


def _narrow(std: float) -> Init:
    return lambda t: nn.init.normal_(t, std=std)
