"""What several adapters do to one layer, weighed and added up: in one tensor that is linear in them, or as a change of low rank."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from ..change import Change
from ..deltas import thin, votes
from ..errors import ConfigError, PeftWarning, hint
from ..method import Method
from ..ops.grouped import spread
from .holders import Tensors
from .layer import AdaptedLayer
from .place import Place

_ON_FACTORS = set(votes.KINDS)  # on A and B, each by itself
ON_DELTA = {"svd", *(f"{k}_svd" for k in votes.KINDS if k != "linear")}
KINDS = (*votes.KINDS, "cat", "exact", *sorted(ON_DELTA))
_SUMS = ("svd", "linear", "cat", "exact")  # what means a plain weighted sum


@dataclass(frozen=True)
class Combined:
    """What one layer's combination or conversion gave.

    Attributes:
        rank: of the new adapter there; 0 where it is of a method without one.
        error: ‖its ΔW - the ΔW that was asked for‖ / ‖the ΔW that was asked for‖.
    """

    rank: int
    error: float


@dataclass(frozen=True)
class Recipe:
    """How changes are added up; the fields are the arguments of `add_weighted_adapter`.

    Attributes:
        rank: a whole number: the rank of every layer; a share of the squared singular values: as few as keep it; None: the largest there is.
        padded: fill up with zeros where a layer has less than `rank`.
    """

    kind: str = "svd"
    rank: float | None = None
    clamp: float | None = None
    driver: str | None = None
    density: float | None = None
    voting: votes.Voting = "total"
    generator: Generator | None = None
    padded: bool = True

    def check(self) -> None:
        """Raise ConfigError for what is missing or means nothing; warn of what has no effect."""
        if self.kind not in KINDS:
            raise ConfigError(f"Invalid combination_type: {self.kind}. There are: {', '.join(KINDS)}.{hint(str(self.kind), KINDS)}")
        if self.voting not in ("total", "frequency"):
            raise ConfigError(f"`majority_sign_method` is 'total' or 'frequency', got {self.voting!r}.")
        if self.prunes and (self.density is None or not 0 <= self.density <= 1):
            raise ConfigError(
                f"combination_type={self.kind!r} prunes, so it needs `density` in [0, 1], the share of entries to keep; got {self.density}."
            )
        if self.rank is not None:
            thin.check_rank(self.rank)
        if self.clamp is not None and not 0.5 < self.clamp <= 1:
            raise ConfigError(f"`svd_clamp` is an upper quantile, in (0.5, 1], got {self.clamp}.")
        cuts = self.kind in ON_DELTA or self.kind == "exact"
        idle = [
            n
            for n, idle in (("density", self.density is not None and not self.prunes), ("svd_rank", self.rank is not None and not cuts))
            if idle
        ]
        if idle:
            warnings.warn(f"`{'` and `'.join(idle)}` has no effect with combination_type={self.kind!r}.", PeftWarning, stacklevel=5)

    @property
    def prunes(self) -> bool:
        """Whether entries are left out before the sum."""
        return self.kind not in _SUMS


@dataclass(eq=False)
class Total:
    """W' = gain ⊙ (W + up @ down), b' = b + shift: what a combination comes to, for a method that holds it with the scaling 1.

    Attributes:
        up: (n_out, r);  down: (r, n_in); with a leading dimension of experts, or of the groups of a convolution (n_in: all its inputs).
        gain, shift: (n_out,) or None.
    """

    up: Tensor
    down: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None


class Traits(NamedTuple):
    """`rank`: the largest of the changes that have one, else 0;  `gain`, `shift`: whether any scales rows (DoRA) or shifts the bias."""

    rank: int
    gain: bool
    shift: bool


@dataclass(eq=False)
class Parts:
    """What the adapters of a combination do on one layer.

    Attributes:
        site: the place of the first that is on it, outside training.
        weights, tensors, changes: of those that are on the layer.
        configs: of all adapters of the combination.
        absent: the sum of the weights of those that are not on the layer.
        gains, shifts: whether any adapter scales rows (DoRA) or shifts a bias, on any layer.
        done: the rank and the error, once it is known.
    """

    site: Place
    weights: list[float]
    tensors: list[Tensors]
    changes: list[Change]
    configs: list[Method]
    recipe: Recipe
    absent: float = 0.0
    gains: bool = False
    shifts: bool = False
    done: Combined = Combined(0, 0.0)

    @staticmethod
    def of(
        layer: AdaptedLayer,
        weights: Mapping[str, float],
        configs: Mapping[str, Method],
        recipe: Recipe,
        gains: bool = False,
        shifts: bool = False,
    ) -> Parts:
        """Those of the adapters named in `weights` that are on the layer."""
        there = [n for n in weights if n in layer.attached]
        place = layer.attached[there[0]].place
        assert place is not None
        return Parts(
            place.at_rest(),
            [float(weights[n]) for n in there],
            [Tensors(layer.attached[n]) for n in there],
            [layer.change(n, at_rest=True) for n in there],
            [configs[n] for n in weights],
            recipe,
            sum(w for n, w in weights.items() if n not in there),
            gains,
            shifts,
        )

    def traits(self) -> Traits:
        """What has to be known of every layer before the first is worked out."""
        bias = self.site.bias()
        ranks = [self._rank(piece[1]) for c in self.changes if is_thin(c) and isinstance(piece := self.piece(c), tuple)]
        return Traits(
            max(ranks, default=0),
            any(c.gain is not None and is_thin(c) for c in self.changes),
            any(c.shift is not None or (bias is not None and c.left is not None and c.left_on_bias) for c in self.changes),
        )

    # ---------------------------------------------------------------- in one tensor

    def summed(self, leaf: str) -> Tensor:
        """Σ w t of one tensor.

        Raises:
            ConfigError: if its shape differs, or the combination is no plain sum.
        """
        self._plain_sum()
        all_ = self._all(leaf)
        if len({t.shape for t in all_}) > 1:
            raise ConfigError(
                f"{self.site.name!r}: the `{leaf}` of the adapters have the shapes {[tuple(t.shape) for t in all_]} and cannot be added up. {AS_LORA}"
            )
        return votes.task_arithmetic(all_, torch.tensor(self.weights, device=all_[0].device)).to(all_[0].dtype)

    def joined(self, leaf: str, dim: int, weighted: bool = False) -> Tensor:
        """The tensors of one name side by side, each times its weight if `weighted`.

        Raises:
            ConfigError: if the combination is no plain sum.
        """
        self._plain_sum()
        return torch.cat([t * (w if weighted else 1) for t, w in zip(self._all(leaf), self.weights, strict=True)], dim)

    def spec(self, name: str) -> Any:
        """A field of the adapters' configs that names modules, for all of them; see `united`."""
        return united([getattr(c, name) for c in self.configs])

    def _all(self, leaf: str) -> list[Tensor]:
        return [getattr(p, leaf).detach() for p in self.tensors]

    def _plain_sum(self) -> None:
        if self.recipe.kind not in _SUMS:
            raise ConfigError(f"{type(self.configs[0]).__name__} adapters have no combination_type={self.recipe.kind!r}. {AS_LORA}")

    def summed_in(self, leaf: str) -> dict[str, Tensor]:
        """The tensors of an adapter whose change is the sum, if that differs from the first adapter in `leaf` alone.

        Raises:
            ConfigError: if it does not.
        """
        name = type(self.configs[0]).__name__
        if not leaf:
            raise ConfigError(f"{name} adapters do not add up to one of their own kind. {AS_LORA}")
        first = self.tensors[0]
        out = {**vars(first), leaf: self.summed(leaf)}
        config = self.site.layer.attached[self.site.adapter].config
        with torch.no_grad():
            got: Any = config.change(SimpleNamespace(**out), self.site)
            wanted, found = self._plain(self.changes, self.weights), self._plain([got], [1.0])
        for a, b in zip(found, wanted, strict=True):
            if float((a - b).norm()) > 1e-4 * float(b.norm()):
                raise ConfigError(
                    f"{self.site.name!r}: the {name} adapters differ in more than `{leaf}`, so their sum is no {name} adapter. {AS_LORA}"
                )
        return out

    def _plain(self, changes: Sequence[Change], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Σ w D and Σ w c."""
        zero = torch.zeros((), device=self.site.weight().device)
        d = sum((w * c.add.dense().float() for c, w in zip(changes, weights, strict=True) if c.add is not None), start=zero)
        c = sum((w * c.shift.float() for c, w in zip(changes, weights, strict=True) if c.shift is not None), start=zero)
        return d, c

    # ---------------------------------------------------------------- in two thin factors

    @torch.no_grad()
    def low_rank(self) -> Total:
        """The combination by the recipe as a low-rank change (with a gain if any adapter has one), for the scaling 1.

        Raises:
            ConfigError: if the recipe does not go with these changes.
        """
        recipe, layer = self.recipe, self.site.layer
        pieces = [self.piece(c) for c in self.changes]
        known = [(w / layer.factor, *p) for w, p in zip(self.weights, pieces, strict=True) if isinstance(p, tuple)]
        gain = self._gain() if self.gains else None
        if gain is not None and recipe.kind not in (*_ON_FACTORS, "cat", "svd", "exact"):
            raise ConfigError(
                f"{self.site.name!r}: DoRA scales whole rows, which {recipe.kind!r} cannot prune. Use 'cat', 'svd' or 'exact'."
            )
        if not any(p is not None for p in pieces):
            known = [(1.0, *self._nothing())]
            pieces = list(known)  # type: ignore[arg-type]
        thin_only = all(p is None or isinstance(p, tuple) for p in pieces)
        if recipe.kind in ("cat", *_ON_FACTORS) and not thin_only:
            raise ConfigError(f"{self.site.name!r}: {recipe.kind!r} needs changes made of two thin factors. Use 'svd' with `svd_rank`.")
        if recipe.kind in _ON_FACTORS:
            up, down = self._on_factors(known)
        elif recipe.kind == "cat":
            up, down = _joined(known)
            self.done = Combined(self._rank(down), 0.0)
        elif recipe.kind in ("svd", "exact") and thin_only:
            up, down = self._cut(thin.of_product(*_joined(known), driver=recipe.driver))
        else:
            up, down = self._cut(self._decomposed(pieces))
        if gain is not None:
            up = up / (gain.view(up.shape[0], -1, 1) if up.ndim == 3 else gain.unsqueeze(-1)).to(up)
        like = next((t for t in vars(self.tensors[0]).values() if t.is_floating_point()), up)
        shift = None if not self.shifts else self._shift().to(like.dtype)
        return Total(up.to(like), down.to(like), gain, shift)

    def _gain(self) -> Tensor:
        """g in W' = g ⊙ W + …: 1 + Σ w (gᵢ - 1)."""
        gains = [(w, c.gain) for w, c in zip(self.weights, self.changes, strict=True) if c.gain is not None and is_thin(c)]
        g = torch.ones(self.site.n_out, device=self.site.weight().device)
        for w, gi in gains:
            g = g + w * (gi.to(g) - 1)
        if bool((g.abs() < 1e-6).any()):
            raise ConfigError(f"{self.site.name!r}: with these weights a row of W vanishes, which no DoRA does. Choose other weights.")
        return g

    def _shift(self) -> Tensor:
        total = torch.zeros(self.site.n_out, device=self.site.weight().device)
        b = self.site.bias()
        for w, c in zip(self.weights, self.changes, strict=True):
            new = c.bias(b)
            if new is not None:
                total = total + w * (new if b is None else new - b).to(total)
        return total / self.site.layer.factor

    def _nothing(self) -> tuple[Tensor, Tensor, float]:
        w = self.site.weight()
        lead = (self.site.experts,) if self.site.experts else (self.site.groups,) if self.site.groups > 1 else ()
        return w.new_zeros(*lead, self.site.n_out // self.site.groups, 1), w.new_zeros(*lead, 1, self.site.n_in * self.site.groups), 1.0

    def piece(self, change: Change) -> tuple[Tensor, Tensor, float] | Tensor | None:
        """The change as (U, V, s), or whole where it is not thin; with a leading dimension of experts or groups. None: no weight changes."""
        if change.additive and change.add is None:
            return None
        factors = change.add.thin() if is_thin(change) and change.add is not None else None
        if factors is None or (change.gain is not None and not self.gains):
            return by_group(self._difference(change), self.site)
        up, down, scale = factors
        if change.gain is not None:
            up = change.gain.to(up).unsqueeze(-1) * up
        if self.site.groups > 1:
            up, down = _factors_by_group(up, down, self.site)
        return up.detach(), down.detach(), float(scale)

    def _difference(self, change: Change) -> Tensor:
        if change.additive and change.add is not None:
            return change.add.dense().detach().float()
        w = self.site.weight().detach().float()
        if change.add is not None and change.add.dense().shape != w.shape:
            w = spread(w, self.site.groups)
        return change.weight(w) - w

    def _on_factors(self, known: Sequence[tuple[float, Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
        """A and B mixed each by itself, with √|w s| and the sign on A, as PEFT does it. Off from Σ w ΔW by cross terms, which is reported."""
        recipe = self.recipe
        if len({(u.shape, v.shape) for _, u, v, _ in known}) > 1:
            raise ConfigError(
                f"{self.site.name!r}: All adapters must have the same r value when using combination_type {recipe.kind!r}, which mixes A and B; "
                f"they have {[self._rank(v) for _, _, v, _ in known]}. Use 'svd' or 'cat'."
            )
        ws = [w * s for w, _, _, s in known]
        root = torch.tensor([math.sqrt(abs(w)) for w in ws])
        sign = torch.tensor([-1.0 if w < 0 else 1.0 for w in ws])
        downs, ups = [v.float() for _, _, v, _ in known], [u.float() for _, u, _, _ in known]
        args = (recipe.density or 0.0, recipe.voting, recipe.generator)
        down = votes.mix(recipe.kind, downs, (root * sign).to(downs[0].device), *args)
        up = votes.mix(recipe.kind, ups, root.to(ups[0].device), *args)
        sum_up, sum_down = _joined(known)
        whole = thin.norm_of_product(sum_up, sum_down)
        off = thin.norm_of_product(torch.cat([up, -sum_up.to(up)], -1), torch.cat([down, sum_down.to(down)], -2))
        self.done = Combined(self._rank(down), off / whole if whole else 0.0)
        return up, down

    def _decomposed(self, pieces: Sequence[tuple[Tensor, Tensor, float] | Tensor | None]) -> thin.Thin:
        """The decomposition of the sum where it has to be formed: of pruned changes, and of such as are not thin."""
        recipe, there = self.recipe, [(w, p) for w, p in zip(self.weights, pieces, strict=True) if p is not None]
        wanted = recipe.rank if recipe.rank is not None else 1.0 if recipe.kind == "exact" else None
        if wanted is None:
            raise ConfigError(f"{self.site.name!r}: the change has no rank of its own to go by. Give `svd_rank`.")
        ways = [_rows(p) for _, p in there]
        lead, shape = ways[0][1][:-2], ways[0][1][-2:]
        weights = torch.tensor([w / self.site.layer.factor for w, _ in there])
        kind = "linear" if recipe.kind in _SUMS else recipe.kind.removesuffix("_svd")
        d = votes.mix_by_blocks(
            kind, [way for way, _ in ways], (math.prod(lead) * shape[0], shape[1]), weights, recipe.density or 0.0, recipe.voting,
            recipe.generator,
        ).view(*lead, *shape)  # fmt: skip
        each = -(-wanted // self.site.groups) if isinstance(wanted, int) else wanted
        return thin.of_matrix(d, each)

    def _cut(self, found: thin.Thin) -> tuple[Tensor, Tensor]:
        """U S and V of the rank that is asked for."""
        recipe, g = self.recipe, self.site.groups
        wanted = recipe.rank if recipe.rank is not None else 1.0
        each = -(-wanted // g) if isinstance(wanted, int) else wanted
        k = found.rank(each)
        up, down = found.factors(k)
        error = found.error(k)
        if recipe.clamp is not None:
            whole = found.total**0.5
            # of all entries with either sign, as the signs of singular vectors mean nothing
            limit = _quantile(torch.cat([up.flatten(), down.flatten()]).abs(), 2 * recipe.clamp - 1)
            plain_up, plain_down = up, down
            up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
            more = thin.norm_of_product(torch.cat([up, -plain_up], -1), torch.cat([down, plain_down], -2))
            error = math.hypot(error, more / whole) if whole else 0.0
        if recipe.padded and isinstance(each, int) and k < each:
            up, down = (nn.functional.pad(up, (0, each - k)), nn.functional.pad(down, (0, 0, 0, each - k)))
        self.done = Combined(self._rank(down), error)
        return up, down

    def _rank(self, down: Tensor) -> int:
        return down.shape[-2] * self.site.groups


def is_thin(change: Change) -> bool:
    """Whether W' = gain ⊙ (W + two thin factors)."""
    return (
        change.left is None and change.right is None and change.base is None and (change.add is not None and change.add.thin() is not None)
    )


def _joined(known: Iterable[tuple[float, Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """Σ w s U V as one product: the columns of U and the rows of V side by side."""
    known = list(known)
    return torch.cat([u for _, u, _, _ in known], -1), torch.cat([v * (w * s) for w, _, v, s in known], -2)


def _rows(piece: tuple[Tensor, Tensor, float] | Tensor) -> tuple[votes.Rows, tuple[int, ...]]:
    """What forms rows of a change in float32, the matrices of a stack one below the other; and the shape of the change."""
    if isinstance(piece, Tensor):
        flat = piece.float().flatten(0, -2)
        return lambda i, j: flat[i:j], tuple(piece.shape)
    up, down, scale = piece
    shape = (*up.shape[:-1], down.shape[-1])
    up, down = up.float() * scale, down.float()
    if up.ndim == 2:
        return lambda i, j: up[i:j] @ down, shape
    n = up.shape[-2]

    def rows(i: int, j: int) -> Tensor:
        return torch.cat([up[e, max(i - e * n, 0) : j - e * n] @ down[e] for e in range(i // n, -(-j // n))])

    return rows, shape


def by_group(d: Tensor, site: Place) -> Tensor:
    """D (n_out, n_in) of a grouped convolution as (groups, n_out / groups, all inputs)."""
    if site.groups == 1:
        return d
    whole = spread(d, site.groups) if d.shape[1] == site.n_in else d
    return whole.reshape(site.groups, -1, whole.shape[1])


def _factors_by_group(up: Tensor, down: Tensor, site: Place) -> tuple[Tensor, Tensor]:
    """The same for factors. Where the rows of a group have columns of U of their own, just these."""
    g, (n, r) = site.groups, up.shape
    if down.shape[1] == site.n_in:  # of the group's own inputs: the columns of the group alone
        eye = torch.eye(g, dtype=down.dtype, device=down.device)
        return up.view(g, n // g, r), torch.einsum("gh,ri->grhi", eye, down).flatten(2)
    if r % g == 0:
        blocks = up.view(g, n // g, g, r // g)
        own = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        if int(own.count_nonzero()) == int(up.count_nonzero()):
            return own, down.view(g, r // g, -1)
    return up.view(g, n // g, r), down.expand(g, -1, -1)


def _quantile(values: Tensor, q: float) -> float:
    """As torch.quantile, of any number of values."""
    at = q * (values.numel() - 1)
    low = math.floor(at)
    a = float(values.kthvalue(low + 1).values)
    b = float(values.kthvalue(min(low + 2, values.numel())).values)
    return a + (b - a) * (at - low)


AS_LORA = (
    "Turn each into a LoRA (veneer.save_as_lora(folder, model, rank, adapter_name)) and combine these in one model, or combine in a mixed model "
    "(get_peft_model(model, config, mixed=True)), whose result is a LoRA."
)


def united(specs: Sequence[Any]) -> Any:
    """One way to name targets for several: lists together, regular expressions side by side. None if they are of both kinds, or all empty."""
    given = [s for s in specs if s]
    if not given:
        return None
    if all(isinstance(s, str) for s in given):
        return "|".join(f"({s})" for s in dict.fromkeys(given)) if len(set(given)) > 1 else given[0]
    if any(isinstance(s, str) for s in given):
        return None
    return {n for s in given for n in s}
