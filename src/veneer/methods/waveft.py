"""WaveFT: a few trained coefficients of the change's two-dimensional wavelet transform."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError, hint
from ..method import Leaf, Targeted, by_pattern
from ..ops import Derived
from .fourierft import seeded_places

LAST = {"db": 38, "sym": 20, "coif": 17}  # the families of wavelets, and the last of each


@dataclass
class WaveFTConfig(Targeted, peft_type="WAVEFT"):
    """W' = W + scaling · G₁ S G₂ᵀ,  S zero but for `n_frequency` trained entries at seeded places, G the synthesis of one level of a wavelet.

    S is (n_out + l - 2, n_in + l - 2), each rounded up to even, for a wavelet of l taps, with the places in the middle n_out x n_in of it; its quarters are
    the approximation, the details across (top right) and down (bottom left), and the diagonal ones. The result is cut to the weight's size. Without
    `use_idwt` it is S itself, (n_out, n_in). `waveft_spectrum` holds the entries and starts as zeros. With `proportional_parameters` the layers share
    out n_frequency times their number in proportion to their sizes, each getting one at least. Bilican et al. 2025, arXiv:2505.12532.
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    proportional_parameters: bool = False

    prefix: ClassVar[str] = "waveft_"
    linear_in: ClassVar[str] = "waveft_spectrum"
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"n_frequency": 20, "scaling": 2.0}, {"n_frequency": 9, "use_idwt": False, "proportional_parameters": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._shares: dict[str, int] = {}
        name = re.fullmatch(r"(db|sym|coif)([1-9]\d?)", self.wavelet_family)
        if name is None or not (name[1] == "sym") + 1 <= int(name[2]) <= LAST[name[1]]:
            known = [f"{k}{i}" for k, last in LAST.items() for i in range(1 + (k == "sym"), last + 1)]
            raise ConfigError(
                f"`wavelet_family` is one of db1 … db38, sym2 … sym20, coif1 … coif17, got {self.wavelet_family!r}.{hint(self.wavelet_family, known)}"
            )

    def survey(self, sites: Mapping[str, Any]) -> None:
        sizes = {path: s.n_out * s.n_in for path, s in sites.items()}
        total, budget = sum(sizes.values()), self.n_frequency * len(sizes)
        self._shares = {path: max(1, round(n / total * budget)) for path, n in sizes.items()} if self.proportional_parameters else {}

    def at(self, name: str) -> WaveFTConfig:
        here = dataclasses.replace(self, n_frequency=by_pattern(self.n_frequency_pattern, name, self.n_frequency))
        here._shares = self._shares
        return here

    def _count(self, site: Any) -> int:
        return self._shares.get(site.name, self.n_frequency)

    def check(self, site: Any) -> None:
        n = self._count(site)
        if not 0 < n <= site.n_out * site.n_in:
            raise ConfigError(f"WaveFT: `n_frequency` is {n} for {site.name!r}, which has {site.n_out * site.n_in} entries. Lower it.")
        if self.use_idwt:
            taps(self.wavelet_family)

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        n = self._count(site)
        return {
            "waveft_spectrum": Leaf((n,), nn.init.zeros_ if self.init_weights else lambda t: nn.init.normal_(t, std=0.01)),
            "waveft_places": seeded_places(site.n_out * site.n_in, n, self.random_loc_seed),
        }

    def change(self, p: Any, site: Any) -> Change:
        sides = (site.n_out, site.n_in)
        at = p.waveft_places // site.n_in, p.waveft_places % site.n_in
        bank = taps(self.wavelet_family) if self.use_idwt else None
        return Change(add=Derived(lambda values: _dense(values, at, sides, bank), (p.waveft_spectrum * site.scaling,)))


def taps(wavelet: str) -> tuple[Sequence[float], Sequence[float]]:
    """The low-pass and high-pass filters that synthesise from a wavelet's coefficients.

    Raises:
        ImportError: if it is not db1 and PyWavelets is not installed.
    """
    if wavelet == "db1":
        return (math.sqrt(0.5), math.sqrt(0.5)), (math.sqrt(0.5), -math.sqrt(0.5))
    try:
        import pywt
    except ImportError as e:
        raise ImportError(f"The filters of the wavelet {wavelet!r} come from PyWavelets. Run `pip install PyWavelets`.") from e
    found = pywt.Wavelet(wavelet)
    return found.rec_lo, found.rec_hi


def _dense(values: Tensor, at: Sequence[Tensor], sides: tuple[int, int], bank: tuple[Sequence[float], Sequence[float]] | None) -> Tensor:
    """The matrix whose coefficients at the places `at` are `values`: each adds the outer product of two filters, length of the filters wide."""
    out = values.new_zeros(sides)
    if bank is None:
        return out.index_put(tuple(at), values)
    filters = torch.tensor(bank, dtype=values.dtype, device=values.device)
    length = filters.shape[1]
    step = torch.arange(length, device=values.device) + 2 - length
    half = [(n + length - 2 + n % 2) // 2 for n in sides]
    i, j = (k + (2 * h - n) // 2 for k, h, n in zip(at, half, sides, strict=True))
    places, weights = [], []
    # a coefficient right of the middle is a detail across, in PEFT's order high-pass along the rows' number; one below the middle the other way round
    for k, h, n, high in ((i, half[0], sides[0], j >= half[1]), (j, half[1], sides[1], i >= half[0])):
        place = 2 * (k % h).unsqueeze(1) + step
        weights.append(filters[high.long()] * ((place >= 0) & (place < n)))
        places.append(place.clamp(0, n - 1))
    patches = values.view(-1, 1, 1) * weights[0].unsqueeze(2) * weights[1].unsqueeze(1)
    return out.index_put((places[0].unsqueeze(2), places[1].unsqueeze(1)), patches, accumulate=True)
