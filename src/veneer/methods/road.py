"""RoAd: pairs of outputs rotated and scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..method import Leaf, Targeted
from ..ops import Pairs
from ..types import name_of

_SHARE = {"road_1": 0.5, "road_2": 1.0, "road_4": 2.0}  # parameters per output


@dataclass
class RoadConfig(Targeted, peft_type="ROAD"):
    """y ← rotated y, bias included: the outputs of a group pair up, first half with second half, and each pair is turned by θ and scaled by α.

    RoAd 1 has one (θ, α) per pair, RoAd 2 one per output, RoAd 4 two per output.   Liao et al. 2024, arXiv:2409.00119.
    """

    variant: str = "road_1"
    group_size: int = 64

    prefix: ClassVar[str] = "road_"
    examples: ClassVar[Any] = ({"group_size": 4},)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.variant = name_of(self.variant)
        if self.variant not in _SHARE:
            raise ConfigError(f"`variant` is one of {sorted(_SHARE)}, got {self.variant!r}.")
        if self.group_size <= 0 or self.group_size % 2:
            raise ConfigError(f"`group_size` must be a positive even number, got {self.group_size}.")

    def check(self, site: Any) -> None:
        if site.n_out % self.group_size:
            raise ConfigError(f"RoAd: the {site.n_out} outputs of {site.name!r} cannot be split into groups of {self.group_size}.")

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        n = int(site.n_out * _SHARE[self.variant])
        start = (nn.init.zeros_, nn.init.ones_) if self.init_weights else (_near(0.0), _near(1.0))
        return {"road_theta": Leaf((n,), start[0]), "road_alpha": Leaf((n,), start[1])}

    def change(self, p: Any, site: Any) -> Change:
        half, n = self.group_size // 2, site.n_out
        cos, sin = p.road_alpha * p.road_theta.cos(), p.road_alpha * p.road_theta.sin()
        if self.variant == "road_1":  # both of a pair share
            cos, sin = (t.view(-1, 1, half).expand(-1, 2, half).reshape(n) for t in (cos, sin))
        elif self.variant == "road_4":
            cos, sin = cos.view(-1, 2, self.group_size)[:, 0].reshape(n), sin.view(-1, 2, self.group_size)[:, 1].reshape(n)
        at: Tensor = torch.arange(n, device=cos.device)
        first = (at % self.group_size) < half
        return Change(left=Pairs(cos, torch.where(first, -sin, sin), half), left_on_bias=True)


def _near(mean: float) -> Any:
    return lambda t: nn.init.normal_(t, mean, 0.5)
