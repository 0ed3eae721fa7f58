"""What a merge loses, layer by layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import MergeError, PeftWarning


@dataclass(frozen=True)
class LayerReport:
    """What one layer's merge lost to rounding.

    Attributes:
        error: ‖rounded ΔW - ΔW‖ / ‖ΔW‖, where the weight is quantised again by that, too.
        lost: share of entries whose weight did not move although their ΔW is not zero.
        size: ‖ΔW‖ / ‖W‖.
        quantisation: of a quantised layer, ‖M - W'‖ / ‖ΔW‖, M being the merged weight and W' what the layer computed with unmerged: above 1, what
            quantising does to the layer is more than what was learned. None where nothing is quantised.
    """

    error: float
    lost: float
    size: float
    quantisation: float | None = None

    @property
    def finite(self) -> bool:
        """Whether all figures are: then so is every number that they were made of."""
        return math.isfinite(self.error) and math.isfinite(self.size)

    @property
    def verdict(self) -> str:
        """In words: `exact`, `good`, `lossy` where more than a tenth of the change is lost, `drowned` where quantising does more than it."""
        if self.quantisation is not None and self.quantisation > 1:
            return "drowned"
        return "exact" if self.error < 1e-6 else "good" if self.error <= 0.1 else "lossy"


@dataclass
class MergeReport:
    """Per layer path, what was lost."""

    layers: dict[str, LayerReport] = field(default_factory=dict)

    @property
    def worst(self) -> str | None:
        """The path with the largest error."""
        return max(self.layers, key=lambda p: self.layers[p].error) if self.layers else None

    def warn(self, advice: str) -> None:
        """Say so where quantising moves the weights further than the adapters do."""
        drowned = {p: r.quantisation for p, r in self.layers.items() if r.quantisation is not None and r.quantisation > 1}
        if drowned:
            worst = max(drowned, key=lambda p: drowned[p] or 0)
            warnings.warn(
                f"In {len(drowned)} of {len(self.layers)} layers quantisation moves the merged weight further than the adapter does "
                f"({drowned[worst]:.1f} times as far in {worst!r}), so the merged model may have lost what was trained. {advice}, or keep the "
                "adapter unmerged; the report has the figure of each layer.",
                PeftWarning,
                stacklevel=4,
            )

    def __str__(self) -> str:
        if not self.layers:
            return "nothing merged"
        rows = [
            f"{p}: error {r.error:.1e}, lost {r.lost:.1%}"
            + (f", quantisation {r.quantisation:.2g} of the change" if r.quantisation is not None else "")
            + f", {r.verdict}"
            for p, r in self.layers.items()
        ]
        return "\n".join(rows)


def check_finite(path: str, names: Sequence[str], *tensors: Tensor | None) -> None:
    """Raise MergeError unless all numbers are finite."""
    for t in tensors:
        if t is not None and t.numel() and not all(math.isfinite(float(end)) for end in torch.aminmax(t)):  # of NaNs both are NaN
            raise MergeError(f"{path}: NaNs detected in the merged weights. The adapter {list(names)} seems to be broken")


def at_a_time(device: torch.device) -> int:
    """How many numbers of a weight are gone through at a time: on a CPU, what a cache holds."""
    return 1 << 18 if device.type == "cpu" else 1 << 23


class Tally:
    """What rounding loses, added up over tensors or parts of them."""

    def __init__(self) -> None:
        self.error, self.size, self.weight = 0.0, 0.0, 0.0  # squares of norms
        self.moved, self.lost = 0.0, 0.0
        self._rooms: tuple[Tensor, Tensor] | None = None  # kept: memory that is asked for anew costs more than what is done with it

    def _two_like(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rooms = self._rooms
        if rooms is None or rooms[0].numel() < t.numel() or rooms[0].dtype != t.dtype or rooms[0].device != t.device:
            self._rooms = rooms = torch.empty_like(t), torch.empty_like(t)
        return rooms[0][: t.numel()], rooms[1][: t.numel()]

    def add(self, exact: Tensor, new: Tensor, frozen: Tensor) -> None:
        """Take in W' in a wide dtype, what became of it (the same object, if nothing was rounded), and W."""
        for e, n, f in zip(*(t.reshape(-1).split(at_a_time(exact.device)) for t in (exact, new, frozen)), strict=True):
            one, two = self._two_like(e)
            w = f if f.dtype == e.dtype else one.copy_(f)
            self.weight += _square(w)
            self.size += _square(torch.sub(e, w, out=two))
            if new is exact:
                continue
            moved = float(torch.ne(two, 0, out=two).sum())  # counted as sums of floating numbers, which is much faster
            got = two.copy_(n)
            self.moved += moved
            self.lost += moved - float(torch.ne(got, w, out=one).sum())  # what has no change is rounded to itself
            self.error += _square(got.sub_(e))

    def report(self) -> LayerReport:
        size = math.sqrt(self.size)
        return LayerReport(
            math.sqrt(self.error) / size if size else 0.0,
            self.lost / self.moved if self.moved else 0.0,
            size / max(math.sqrt(self.weight), 1e-30),
        )


def _square(t: Tensor) -> float:
    return float(t.dot(t))


def loss(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> LayerReport:
    """`parts`: of each tensor what `Tally.add` takes."""
    tally = Tally()
    for part in parts:
        tally.add(*part)
    return tally.report()
