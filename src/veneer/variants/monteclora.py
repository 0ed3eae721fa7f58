"""MonteCLoRA: A drawn anew in every forward of the training, around what is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..method import Leaf
from ..ops import LowRank
from .base import Variant

_IDLE = "its sampler acts in training alone, so in eval mode no gradient reaches what it has learned"


@dataclass
class MontecloraConfig:
    """Args:
    num_samples: N, the number of Gaussians that are mixed.
    use_entropy: add Σ wᵢ² of the mixture's weights to the loss.
    dirichlet_prior: the concentration that the weights are held to.
    sample_scaler: the size of the noise.
    kl_loss_weight: of the divergence from the priors in the loss.
    buffer_size: kept for PEFT's files: how many draws it holds in memory. Here nothing is held: a draw is made when it is needed.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` must be greater than 0, got {getattr(self, name)}.")


class Monteclora(Variant):
    """W' = W + s B A; in training A + ε Σₙ wₙ Zₙ takes the place of A.

    The columns of every Z are normal with covariance Σ, the diagonal of diag(c) Ω diag(c), c = exp(std_prior), Ω Wishart with r degrees of
    freedom; w = softmax of a normal that stands for a Dirichlet distribution of concentration α = exp(expert_weights_prior). The mean over the
    layers of `kl_loss_weight` times the divergences of the three from their priors is added to the loss. Given w, the mixture is one Gaussian of
    size ‖w‖, and is drawn as that. Seth et al. 2024, arXiv:2411.04358.
    """

    field: ClassVar[str] = "monteclora_config"
    options: ClassVar[type[Any] | None] = MontecloraConfig
    acts: ClassVar[bool] = True
    example: ClassVar[Any] = {"monteclora_config": MontecloraConfig(num_samples=3)}
    exceptions: ClassVar[Any] = {"fused_equals_reference": _IDLE, "autocast_runs": _IDLE}

    def leaves(self, config: Any, site: Any, leaves: Mapping[str, Leaf]) -> Mapping[str, Leaf]:
        r, n = config.r, config.monteclora_config.num_samples

        def leaf(attr: str, shape: tuple[int, ...], init: Any, trainable: bool) -> tuple[str, Leaf]:
            return f"monteclora_{attr}", Leaf(shape, init, container="lora_monteclora_sampler", attr=attr, trainable=trainable)

        return dict([
            *leaves.items(),
            leaf("std_prior", (r,), nn.init.uniform_, True),
            leaf("expert_weights_prior", (n,), nn.init.uniform_, True),
            leaf("gaussian_var_prior", (r, r), nn.init.eye_, False),  # PEFT's last draws: in its files, and without effect
            leaf("expert_weights", (n,), lambda t: t.fill_(1 / n), False),
        ])  # fmt: skip

    def change(self, config: Any, p: Any, site: Any, add: LowRank) -> Change:
        if not site.training:
            return Change(add=add)
        a, (r, _) = add.down, add.down.shape
        omega = torch.randn(r, r, dtype=a.dtype, device=a.device).square().sum(1)  # the diagonal of a Wishart matrix
        size = p.monteclora_std_prior.exp() * omega.sqrt() * _weights(p.monteclora_expert_weights_prior).norm()
        noise = size.unsqueeze(1) * torch.randn_like(a) * config.monteclora_config.sample_scaler
        return Change(add=LowRank(add.up, a + noise.to(a.dtype), add.scale, add.dropout))

    def penalty(self, config: Any, p: Any, site: Any) -> Tensor | None:
        options: MontecloraConfig = config.monteclora_config
        r, n = config.r, options.num_samples
        c, alpha = p.monteclora_std_prior.float(), p.monteclora_expert_weights_prior.float().exp()
        v = (2 * c).exp()
        wishart = r / 2 * (v.sum() - r - 2 * c.sum())
        # N Gaussians from N(0, I), in the mean over Ω: E Ω = r, E log Ω = ψ(r / 2) + log 2
        gauss = n / 2 * (r * v.sum() - r - 2 * c.sum() - r * (math.log(2) + float(torch.digamma(torch.tensor(r / 2)))))
        loss = options.kl_loss_weight * (wishart + gauss + _dirichlet_kl(alpha, options.dirichlet_prior))
        if options.use_entropy:
            loss = loss + _weights(p.monteclora_expert_weights_prior).square().sum()
        mean: Tensor = loss / site.count
        return mean


def _weights(prior: Tensor) -> Tensor:
    """A draw of the mixture's weights: softmax of the Laplace approximation of a Dirichlet distribution."""
    k, over = len(prior), (-prior).exp()
    spread = (over * (1 - 2 / k) + over.sum() / k**2).clamp_min(1e-12).sqrt()
    return (prior + spread * torch.randn_like(prior)).softmax(0)


def _dirichlet_kl(alpha: Tensor, prior: float) -> Tensor:
    """KL(Dir(alpha) ‖ Dir(prior, …, prior))."""
    total, k = alpha.sum(), len(alpha)
    lost = total.lgamma() - alpha.lgamma().sum() - math.lgamma(k * prior) + k * math.lgamma(prior)
    return lost + ((alpha - prior) * (alpha.digamma() - total.digamma())).sum()
