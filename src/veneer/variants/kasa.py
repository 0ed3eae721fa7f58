"""KaSA: the least singular components of the weight give way to a change with singular values of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..inits.base import singular
from ..method import Leaf
from ..ops import LowRank, Sum
from ..schedules import add_gradient
from .base import Variant


@dataclass
class KasaConfig:
    """Args:
    beta: weight of the squares of the singular values d in the loss.
    gamma: weight of ‖A Aᵀ - I‖ + ‖Bᵀ B - I‖ in the loss.
    """

    beta: float = 1e-4
    gamma: float = 1e-3


class Kasa(Variant):
    """W' = W - U S V + s B diag(d) A,  U S V the r least singular components of W.

    d (r,) starts normal and trains with A and B, with β ‖d‖² + γ (‖A Aᵀ - I‖ + ‖Bᵀ B - I‖) of every layer added to the loss. W itself stays
    whole: without the adapter the model is the frozen one. Wang et al. 2024, arXiv:2412.06071.
    """

    field: ClassVar[str] = "kasa_config"
    options: ClassVar[type[Any] | None] = KasaConfig
    starts_as_identity: ClassVar[bool] = False
    acts: ClassVar[bool] = True
    example: ClassVar[Any] = {"kasa_config": KasaConfig()}

    def check(self, config: Any, site: Any) -> None:
        super().check(config, site)
        if config.r >= min(site.n_in, site.n_out):
            raise ConfigError(
                f"KaSA requires `r` ({config.r}) to be smaller than min(in_features, out_features) ({min(site.n_in, site.n_out)}) of {site.name!r}, "
                "so that at least one singular component of the base weight is preserved."
            )

    def leaves(self, config: Any, site: Any, leaves: Mapping[str, Leaf]) -> Mapping[str, Leaf]:
        cut: list[Tensor] = []  # computed once, for both

        def take(i: int) -> Any:
            def init(t: Tensor) -> Tensor:
                if not cut:
                    u, s, v = singular(site.weight().detach(), config.r, last=True)
                    cut.extend((u * -s, v))
                return t.copy_(cut[i])

            return init

        frozen = {"attr": "weight", "trainable": False, "saved": False}
        return {
            **leaves,
            "lora_diag": Leaf((config.r,), nn.init.normal_),
            "lora_cut_up": Leaf((site.n_out, config.r), take(0), **frozen),  # type: ignore[arg-type]
            "lora_cut_down": Leaf((config.r, site.n_in), take(1), **frozen),  # type: ignore[arg-type]
        }

    def change(self, config: Any, p: Any, site: Any, add: LowRank) -> Change:
        up = add.up * (p.lora_diag * add.scale)
        cut_up, cut_down = p.lora_cut_up.to(up.dtype), p.lora_cut_down.to(up.dtype)
        if add.dropout > 0:  # of the change, not of what is taken from W
            return Change(add=Sum([LowRank(cut_up, cut_down), LowRank(up, add.down, 1.0, add.dropout)]))
        return Change(add=LowRank(torch.cat([up, cut_up], 1), torch.cat([add.down, cut_down])))

    def before_step(self, config: Any, sites: Sequence[Any]) -> None:
        trained = [s for s in sites if s.tensor("lora_diag").grad is not None]
        for s in trained:
            d = s.tensor("lora_diag")
            d.grad.add_(d, alpha=2 * config.kasa_config.beta)
        pairs = [(s.tensor("lora_A"), s.tensor("lora_A").grad) for s in trained]
        pairs += [(s.tensor("lora_B").mT, s.tensor("lora_B").grad.mT) for s in trained]
        add_gradient(pairs, config.kasa_config.gamma)
