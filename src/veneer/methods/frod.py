"""FRoD: the weight in a basis that layers of the same role share, with trained coordinates and a sparse trained mixture.

Longer than most: it draws the places of its sparse part for one role after another, as PEFT does, and restores from a file what PEFT computes anew.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError, PeftWarning
from ..inits.roles import Places, block_of, category, common_basis, solver
from ..method import Leaf, Targeted
from ..ops import Diag, Geometry, Op, Sparse, Sum, mixed_onto


@dataclass
class FrodConfig(Targeted, peft_type="FROD"):
    """W' = U (S + diag(l)) Vᵀ,  W = U diag(l₀) Vᵀ.   doi:10.1609/aaai.v40i31.39813.

    V (n_in, n_in) is shared by the layers of one role in all blocks (its "category", such as `self_attn_q_proj`): with Q R the decomposition of their
    weights W_i, one above the other, V = Rᵀ E, E the eigenvectors of the mean of (Q_iᵀ Q_i + `regularization_alpha` I)⁻¹; where there are fewer outputs
    than inputs, the right singular vectors. U (n_out, n_in) has unit columns, l₀ (n_in,) their lengths before. l starts as l₀ and trains, as do the
    entries of S, zero at first, at a share `sparse_rate` of places beside the diagonal, drawn with the seed `projection_prng_key`.

    It is computed as W + U (S + diag(l - l₀)) Vᵀ: a fresh adapter changes nothing in any dtype, and W is used as it is stored (PEFT rebuilds W from its
    three factors). U and l₀ follow from W and the V of the file; PEFT takes them from a V that it computes anew, which on another machine may be another.
    Two layers of one category and one block number (an encoder's and a decoder's) count as one in V, the later one, as in PEFT.
    """

    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False

    prefix: ClassVar[str] = "frod_"
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = (
        {"sparse_rate": 0.1, "progressbar": False},
        {"sparse_rate": 0.2, "save_projection": False, "frod_dropout": 0.2, "progressbar": False},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparse_rate <= 1:
            raise ConfigError(f"`sparse_rate` should be between 0 and 1, got {self.sparse_rate}.")
        if self.runtime_offload_base_weight:
            warnings.warn(
                "`runtime_offload_base_weight` has no effect: FRoD's change is added to the frozen weight, which every forward needs.",
                PeftWarning,
                stacklevel=4,
            )

    def shared(self, sites: Sequence[Any]) -> Mapping[str, Leaf]:
        roles: dict[str, list[Any]] = {}
        for site in sites:
            roles.setdefault(category(site.name), []).append(site)
        places = Places(self.sparse_rate, self.projection_prng_key, {role: group[0].n_in for role, group in sorted(roles.items())})
        bar = _Bar(len(roles) if self.progressbar else 0)
        out: dict[str, Leaf] = {}
        for role, group in sorted(roles.items()):
            n = group[0].n_in
            if odd := next((s for s in group if s.n_in != n), None):
                raise ConfigError(
                    f"FRoD takes {group[0].name!r} and {odd.name!r} for layers of one role ({role!r}), and they have {n} and {odd.n_in} inputs. "
                    "Target one of them, or each with an adapter of its own."
                )

            def leaf(name: str, shape: tuple[int, ...], init: Any, dtype: Any, role: str = role, group: Any = group) -> None:
                out[f"{name}.{role}"] = Leaf(
                    shape, init, container=name, attr=role, trainable=False, dtype=dtype, saved=self.save_projection, users=group
                )

            leaf("frod_V", (n, n), bar.counting(self._basis(group, sites)), group[0].weight().dtype)
            leaf("frod_s_indices", (2, places.count(n)), places.of(role), torch.int64)
            leaf("frod_s_size", (2,), lambda t, n=n: t.fill_(n), torch.int64)
        return out

    def _basis(self, group: Sequence[Any], sites: Sequence[Any]) -> Callable[[Tensor], Tensor]:
        blocks = {block_of(s.name, sites.index(s)): s for s in group}
        return lambda v: v.copy_(
            common_basis([s.weight().detach().float().cpu() for _, s in sorted(blocks.items())], self.regularization_alpha)
        )

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        n, k = site.n_in, Places.number(self.sparse_rate, site.n_in)
        return {
            "frod_lambda_l": Leaf((n,), nn.init.zeros_),
            "frod_lambda_s_values": Leaf((k,), nn.init.zeros_, saved=k > 0),
            "frod_U": Leaf((site.n_out, n), nn.init.zeros_, trainable=False, saved=False, dtype=site.weight().dtype),
            "frod_lambda_0": Leaf((n,), nn.init.zeros_, trainable=False, saved=False, dtype=torch.float32),
        }

    def settle(self, here: Sequence[tuple[Any, Any]], loaded: bool) -> None:
        roles: dict[int, list[tuple[Any, Any]]] = {}
        for site, p in here:
            roles.setdefault(id(p.frod_V), []).append((site, p))
        for group in roles.values():
            solve = solver(group[0][1].frod_V)
            for site, p in group:
                m = solve(site.weight())
                length = m.norm(dim=0)
                p.frod_U.copy_((m / length).where(length > 1e-12, 0.0))
                p.frod_lambda_0.copy_(length)
                if not loaded:
                    p.frod_lambda_l.copy_(length)
        if not (loaded or self.init_weights):
            for _, p in here:
                p.frod_lambda_l.add_(torch.randn_like(p.frod_lambda_l), alpha=0.1)
                nn.init.normal_(p.frod_lambda_s_values, std=0.1)

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: t for k, t in tensors.items() if t.numel() or not k.endswith("frod_lambda_s_values")}  # PEFT writes empty ones

    def change(self, p: Any, site: Any) -> Change:
        n, (i, j) = site.n_in, p.frod_s_indices
        beside = Sparse(i * n + j, p.frod_lambda_s_values * site.scaling, (n, n))
        along = Diag((p.frod_lambda_l - p.frod_lambda_0.to(p.frod_lambda_l.dtype)) * site.scaling)
        return Change(add=_Inside(p.frod_U, Sum([beside, along]), p.frod_V.mT, site.dropout))


@dataclass(eq=False)
class _Inside(Op):
    """M = U N V: a structured matrix between two frozen ones."""

    up: Tensor
    middle: Op
    down: Tensor
    dropout: float = 0.0

    def dense(self) -> Tensor:
        return self.up @ self.middle.left(self.down).to(self.up.dtype)

    def rows(self, x: Tensor, geo: Geometry) -> Tensor:
        return geo.mix(*self._inside(x, geo))

    def add_to(self, y: Tensor, x: Tensor, geo: Geometry) -> Tensor:
        return mixed_onto(y, *self._inside(x, geo), geo)

    def _inside(self, x: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
        if self.dropout > 0:
            x = geo.drop(x, self.dropout)
        if geo.plain and x.dim() > 1:  # V x and N V x as columns of tokens: a sparse product on rows would turn them over twice
            rows = x.reshape(-1, x.shape[-1])
            h = self.middle.left(self.down.to(x.dtype) @ rows.mT).mT.view(*x.shape[:-1], self.down.shape[0])
            return h, self.up.to(h.dtype)
        h = self.middle.rows(geo.contract(x, self.down.to(x.dtype)), geo)
        return h, self.up.to(h.dtype)


class _Bar:
    """Progress over so many decompositions; none if zero, or where tqdm is not installed."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.bar: Any = None

    def counting(self, fill: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def counted(t: Tensor) -> Tensor:
            if self.bar is None and importlib.util.find_spec("tqdm"):
                from tqdm import tqdm

                self.bar = tqdm(total=self.total, desc="FRoD decomposition", unit="category")
            out, self.done = fill(t), self.done + 1
            if self.bar is not None:
                self.bar.update()
                if self.done == self.total:
                    self.bar.close()
            return out

        return counted if self.total else fill
