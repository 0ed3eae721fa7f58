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
from torch.nn import functional as F

from ..change import Change
from ..errors import ConfigError, hint
from ..method import Leaf, Targeted
from ..ops import Dense
from .fourierft import at_pattern, seeded_places

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
        here = dataclasses.replace(self, n_frequency=at_pattern(self.n_frequency_pattern, name, self.n_frequency))
        here._shares = self._shares
        return here

    def scale(self) -> float:
        return self.scaling

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
        values: Tensor = p.waveft_spectrum * site.scaling
        sides = (site.n_out, site.n_in)
        i, j = p.waveft_places // site.n_in, p.waveft_places % site.n_in
        if not self.use_idwt:
            return Change(add=Dense(values.new_zeros(sides).index_put((i, j), values)))
        low, high = taps(self.wavelet_family)
        h, w = (n + len(low) - 2 + n % 2 for n in sides)
        s = values.new_zeros(h, w).index_put((i + (h - sides[0]) // 2, j + (w - sides[1]) // 2), values)
        # S has the details across where a separable transform has those down
        s = torch.cat(
            [torch.cat([s[: h // 2, : w // 2], s[h // 2 :, : w // 2]], 1), torch.cat([s[: h // 2, w // 2 :], s[h // 2 :, w // 2 :]], 1)]
        )
        bank = torch.tensor([low, high], dtype=s.dtype, device=s.device).unsqueeze(1)
        whole = _synthesis(_synthesis(s, bank).T, bank).T
        return Change(add=Dense(whole[: sides[0], : sides[1]]))


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


def _synthesis(s: Tensor, bank: Tensor) -> Tensor:
    """Rows of coefficients, low ones first, to rows of numbers. bank (2, 1, taps)."""
    cut = bank.shape[-1] - 2
    rows: Tensor = F.conv_transpose1d(s.unflatten(1, (2, -1)), bank, stride=2, padding=cut).squeeze(1)
    return rows
