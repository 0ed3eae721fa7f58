"""FourierFT: a few trained coefficients of the change's two-dimensional spectrum."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..method import Leaf, Targeted
from ..ops import Derived


@dataclass
class FourierFTConfig(Targeted, peft_type="FOURIERFT"):
    """W' = W + scaling · Re(ifft2(S)),  S (n_out, n_in) zero but for `n_frequency` trained entries at seeded places.   Gao et al. 2024, arXiv:2405.03003."""

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool = False  # PEFT's meaning: True starts at zero

    prefix: ClassVar[str] = "fourierft_"
    also_only: ClassVar[Any] = ("fourier_only",)
    stacking: ClassVar[Any] = "sum"
    linear_in: ClassVar[str] = "fourierft_spectrum"
    examples: ClassVar[Any] = ({"n_frequency": 20, "init_weights": True},)

    def at(self, name: str) -> FourierFTConfig:
        return dataclasses.replace(self, n_frequency=at_pattern(self.n_frequency_pattern, name, self.n_frequency))

    def check(self, site: Any) -> None:
        if not 0 < self.n_frequency <= site.n_out * site.n_in:
            raise ConfigError(
                f"FourierFT: `n_frequency` is {self.n_frequency} for {site.name!r}, which has {site.n_out * site.n_in} entries. Lower it."
            )

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        return {
            "fourierft_spectrum": Leaf((self.n_frequency,), nn.init.zeros_ if self.init_weights else nn.init.normal_),
            "fourierft_places": seeded_places(site.n_out * site.n_in, self.n_frequency, self.random_loc_seed),
        }

    def change(self, p: Any, site: Any) -> Change:
        n, m = site.n_out, site.n_in
        u, v = p.fourierft_places // m, p.fourierft_places % m
        # a real part is the transform of a spectrum that is its own mirror image, of which one half tells all: half the work
        far = 2 * v > m
        u, v = torch.where(far, -u % n, u), torch.where(far, m - v, v)
        at, share = u * (m // 2 + 1) + v, torch.where((v == 0) | (2 * v == m), 1.0, 0.5)

        def make(values: Tensor) -> Tensor:
            wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
            spectrum = wide.new_zeros(n * (m // 2 + 1)).index_put((at,), wide * share.to(wide.dtype), accumulate=True)
            d: Tensor = torch.fft.irfft2(spectrum.view(n, -1), s=(n, m))
            return d.to(values.dtype)

        return Change(add=Derived(make, (p.fourierft_spectrum * site.scaling,)))


def seeded_places(entries: int, count: int, seed: int) -> Leaf:
    """Which entries of the flattened matrix are trained: a seeded choice that no file stores."""

    def choose(t: Tensor) -> None:
        t.copy_(torch.randperm(entries, generator=torch.Generator().manual_seed(seed))[:count])

    return Leaf((count,), choose, trainable=False, dtype=torch.int64, saved=False)


def at_pattern(table: Mapping[str, int] | None, name: str, default: int) -> int:
    """The value for a module in a `n_frequency_pattern` or `block_size_pattern`: its name is a key, or ends with one after a dot."""
    return next((n for key, n in (table or {}).items() if name == key or re.match(rf".*\.{key}$", name)), default)
