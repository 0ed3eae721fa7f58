"""Arrow: a router that sends each token to the LoRA adapters whose change would move it most, without any training.

Longer than other variants: GenKnowSub and PEFT's way to the prototypes are in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..change import Change
from ..errors import ConfigError, RouteError
from ..method import Leaf
from ..ops import LowRank, gated
from ..routes.experts import Kept, kept, plain, stacked
from .base import Variant


@dataclass
class ArrowConfig:
    """Args:
    top_k: how many experts a token goes to, at most.
    router_temperature: T; a lower one makes choices sharper.
    use_gks: take the mean of the general experts off every expert first (GenKnowSub).
    task_adapter_names, gks_adapter_names: the experts, and the general ones, as `create_arrow_model` names them.
    rng_seed: start of PEFT's 15 steps of power iteration for the prototypes; None: the singular vectors themselves.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(init=False, default=None)
    gks_adapter_names: list[str] | None = field(init=False, default=None)
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        if self.top_k < 1 or self.router_temperature <= 0:
            raise ConfigError(f"`top_k` and `router_temperature` must be positive, got {self.top_k} and {self.router_temperature}.")


class Arrow(Variant):
    """y += Σ_e c_e s_e B_e A_e x,  c = softmax(|v_e · x| / T) over the `top_k` experts of a token, 0 for the others.

    v_e is the first right singular vector of B_e A_e. Ostapenko et al. 2024, arXiv:2405.11157. With `use_gks` the mean of the general experts'
    A and B is taken off A_e and B_e (GenKnowSub, Bagherifard et al. 2025). Experts are all LoRA adapters that stand on a layer beside the router,
    whatever their ranks; the router's own A and B say nothing, as in PEFT, and do not train. Unlike in PEFT, the experts' tensors stay as they are, and
    a saved router finds its experts again, beside its folder or in it.
    """

    field: ClassVar[str] = "arrow_config"
    options: ClassVar[type[Any] | None] = ArrowConfig
    starts_as_identity: ClassVar[bool] = False
    example: ClassVar[Any] = {"arrow_config": {"top_k": 2, "task_adapter_names": ["a", "b", "c"]}}
    unmergeable: ClassVar[str] = "each token goes to experts of its own"
    routes: ClassVar[bool] = True
    exceptions: ClassVar[Any] = {
        "only_the_adapter_trains": "a router has nothing that trains",
        "autocast_runs": "a router has nothing that trains",
        "several_adapters": "two routers of the same experts are the same",
    }

    def read(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return super().read(value)
        named = {f.name: value[f.name] for f in dataclasses.fields(ArrowConfig) if not f.init and f.name in value}
        options = super().read({k: v for k, v in value.items() if k not in named})
        for name, names in named.items():
            setattr(options, name, names)
        return options

    def check(self, config: Any, site: Any) -> None:
        super().check(config, site)
        if config.lora_bias:
            raise ConfigError(f"`lora_bias` does not go with `{self.field}`: the router has no change of its own.")

    def leaves(self, config: Any, site: Any, leaves: Mapping[str, Leaf]) -> Mapping[str, Leaf]:
        return {n: dataclasses.replace(leaf, trainable=False) for n, leaf in leaves.items()}

    def experts(self, config: Any) -> Mapping[str, str | None]:
        options: ArrowConfig = config.arrow_config
        return dict.fromkeys([*(options.task_adapter_names or ()), *((options.use_gks and options.gks_adapter_names) or ())])

    def facts(self, config: Any, call: Any) -> Mapping[str, Tensor]:
        for place in call.unseen:
            _known(config, place)
        return {}

    def change(self, config: Any, p: Any, site: Any, add: LowRank) -> Change:
        known = _known(config, site)
        v, ranks, up, down = known.value
        if known.trained:
            up, down = stacked(_parts(config, site))
        options: ArrowConfig = config.arrow_config

        def gates(x: Tensor) -> Tensor:
            score = F.linear(x, v.to(x.dtype)).abs()
            best, which = score.to(torch.promote_types(score.dtype, torch.float32)).topk(min(options.top_k, len(v)), -1)
            return torch.zeros_like(score, dtype=best.dtype).scatter(-1, which, (best / options.router_temperature).softmax(-1))

        return Change(add=gated(up, down, ranks, gates, add.dropout, self.unmergeable))


def _known(config: Any, site: Any) -> Kept[tuple[Tensor, list[int], Tensor, Tensor]]:
    """The prototypes (experts, n_in) of a layer, its experts' ranks and factors."""

    def make() -> tuple[Tensor, list[int], Tensor, Tensor]:
        parts = _parts(config, site)
        v = torch.stack([prototype(up, down, config.arrow_config.rng_seed) for up, down in parts])
        return v, [len(down) for _, down in parts], *stacked(parts)

    return kept(site, lambda: [n for names in _names(config, site) for n in names], make)


def _names(config: Any, site: Any) -> tuple[list[str], list[str]]:
    """The experts of a layer, and the general ones that are taken off them."""
    options: ArrowConfig = config.arrow_config
    aside = options.gks_adapter_names or []
    attached = site.layer.attached
    names = [n for n, a in attached.items() if getattr(a.config, "arrow_config", options) is None and n not in aside]
    general = [n for n in aside if n in attached] if options.use_gks else []
    if not names or (options.use_gks and not general):
        missing = options.gks_adapter_names if names else options.task_adapter_names
        raise RouteError(
            f"The router {site.adapter!r} has no {'general ' if names else ''}experts on {site.name!r} ({missing or 'none are named'}). "
            "Load them first: model.load_adapter(folder, name), or make the model with create_arrow_model."
        )
    return names, general


def _parts(config: Any, site: Any) -> list[tuple[Tensor, Tensor]]:
    """(s_e B_e, A_e) of each expert of a layer."""
    names, general = _names(config, site)
    adds = {n: plain(site, n) for n in (*names, *general)}
    if not general:
        return [(adds[n].up * adds[n].scale, adds[n].down) for n in names]
    if len({(a.up.shape, a.down.shape) for a in adds.values()}) > 1:
        raise RouteError(
            f"`use_gks` needs experts of one rank; on {site.name!r} they have { ({n: len(a.down) for n, a in adds.items()}) }."
        )
    up, down = (torch.stack([getattr(adds[n], side) for n in general]).mean(0) for side in ("up", "down"))
    return [((adds[n].up - up) * adds[n].scale, adds[n].down - down) for n in names]


def prototype(up: Tensor, down: Tensor, seed: int | None) -> Tensor:
    """The first right singular vector (n_in,) of B A, up to its sign; zeros if B A is zero.

    Args:
        up, down: B (n_out, r) and A (r, n_in), up to a factor.
        seed: stop where PEFT does: after 15 steps of power iteration from a random vector of this seed, drawn on the device of A.
    """
    b, a = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (up, down))
    if seed is None:
        q, r = torch.linalg.qr(a.mT)
        _, s, vh = torch.linalg.svd(torch.linalg.qr(b).R @ r.mT, full_matrices=False)
        first: Tensor = (q @ vh[0]) * (s[0] > 0)
        return first
    v = torch.randn(a.shape[1], dtype=a.dtype, device=a.device, generator=torch.Generator(a.device).manual_seed(seed))
    c = b.mT @ b
    for _ in range(15):
        v = a.mT @ (c @ (a @ v))
        v = v / (v.norm() + 1e-8)
    return v
