"""PVeRA: VeRA with a Gaussian between its two projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import LoadError
from ..inits.seeded import kaiming, seeded
from ..method import Leaf, Targeted
from ..ops import Between, Vectored

_REPLAYED = 64  # draws that a checkpointed layer can ask for again


@dataclass
class PveraConfig(Targeted, peft_type="PVERA"):
    """y += diag(b) B z,  z normal with mean μ and variance exp(v),  (μ, v) = diag(d) A x.   arXiv:2512.07703.

    A (2r, widest n_in) and B (widest n_out, r) are random, frozen, shared by all layers and cut to each; b (n_out,) starts as zeros, d (2r,) as
    `d_initial`. z is drawn in training, and with `sample_at_inference` always; otherwise it is μ, and the change is W' = W + diag(b) B diag(d_μ) A_μ.
    With `generator_seed` every layer draws from a generator of its own, on the CPU, so that a run can be repeated.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    sample_at_inference: bool = False
    generator_seed: int | None = None

    prefix: ClassVar[str] = "pvera_"
    positive: ClassVar[Any] = ("r",)
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"r": 8},)

    @property
    def unmergeable(self) -> str:  # type: ignore[override]
        return "it is drawn anew in every call; to merge its mean, set sample_at_inference=False" if self.sample_at_inference else ""

    def shared(self, sites: Sequence[Any]) -> Mapping[str, Leaf]:
        shapes = {"pvera_A": (2 * self.r, max(s.n_in for s in sites)), "pvera_B": (max(s.n_out for s in sites), self.r)}
        starts = seeded({n: kaiming(shape) for n, shape in shapes.items()}, self.projection_prng_key)
        return {n: Leaf(shape, starts[n], trainable=False, saved=self.save_projection) for n, shape in shapes.items()}

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        return {
            "pvera_lambda_b": Leaf((site.n_out,), nn.init.zeros_ if self.init_weights else nn.init.ones_),
            "pvera_lambda_d": Leaf((2 * self.r,), (lambda t: t.fill_(self.d_initial)) if self.init_weights else nn.init.normal_),
        }

    def change(self, p: Any, site: Any) -> Change:
        b, d, r = p.pvera_lambda_b, p.pvera_lambda_d, self.r
        mean_of = Vectored(b, p.pvera_B, d[:r], p.pvera_A[:r], site.n_in, site.scaling, site.dropout)
        if not (site.training or self.sample_at_inference):
            return Change(add=mean_of)

        def draw(h: Tensor, x: Tensor) -> Tensor:
            mean, log_variance = (h * d.to(h.dtype)).chunk(2, -1)
            drawn: Tensor = mean + (0.5 * log_variance).exp() * self._noise(mean, site)
            return drawn

        up, _ = mean_of.factors()
        return Change(add=Between(b.unsqueeze(1) * up, p.pvera_A[:, : site.n_in], draw, site.scaling, site.dropout, whole=mean_of))

    def acts(self) -> bool:
        return self.generator_seed is not None  # it remembers where its generators are

    def carried(self, sites: Sequence[Any]) -> Mapping[str, Tensor | float]:
        return {f"{s.name}.generator": s.memory["state"] for s in sites if "state" in s.memory}

    def carry_on(self, sites: Sequence[Any], carried: Mapping[str, Any]) -> None:
        known = {f"{s.name}.generator" for s in sites}
        if unknown := sorted({k for k in carried if k.endswith(".generator")} - known):
            raise LoadError(f"The state's {unknown[0]!r} is of another layer than this adapter's. Take another state.")
        for s in sites:
            s.memory.clear()
            if (state := carried.get(f"{s.name}.generator")) is not None:
                s.memory["state"] = state.cpu().clone()

    def _noise(self, like: Tensor, site: Any) -> Tensor:
        if self.generator_seed is None:
            return torch.randn_like(like)
        # a checkpointed layer that runs again finds torch's own generator as it was, draws the same ticket, and gets the same noise
        ticket = int(torch.randint(2**62, ()))
        past, generator = site.memory.setdefault("states", {}), torch.Generator()
        if ticket in past:
            generator.set_state(past[ticket])
        elif "state" in site.memory:
            generator.set_state(site.memory["state"])
        else:
            generator.manual_seed(self.generator_seed)
        state = generator.get_state()
        noise = torch.randn(like.shape, dtype=like.dtype, generator=generator)
        if ticket not in past:
            past[ticket], site.memory["state"] = state, generator.get_state()
            if len(past) > _REPLAYED:
                del past[next(iter(past))]
        return noise.to(like.device)
