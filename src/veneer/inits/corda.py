"""CorDA: a start from the weight as the data see it, through the covariance of a layer's inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, hint
from .base import Start, counted, singular, split, wide
from .calibration import check_reached, read, targets, write

_METHODS = ("ipm", "kpm")
_PARTS = ("S_WC", "U_WC", "V_WC")
_DAMPING = 0.01  # of the mean variance, so that a covariance of few or flat data can be inverted


@dataclass
class CordaConfig:
    """Options of the CorDA start.

    Args:
        cache_file: where the decompositions are kept between runs;  covariance_file: where the covariances are.
        corda_method: "ipm" adapts the r directions that matter most to the data, "kpm" the r that matter least and so keeps what
            the data need.
        use_float16_for_covariance: collect in float16, at a loss of accuracy.
        prune_temporary_fields: False leaves each target's `covariance_matrix` on it.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        if self.corda_method not in _METHODS:
            raise ConfigError(
                f"corda_config: corda_method is 'ipm' or 'kpm', got {self.corda_method!r}.{hint(str(self.corda_method), _METHODS)}"
            )


@dataclass
class CordaEigens:
    """W C = U S Vᵀ, cut to r: S_WC (r,), U_WC (n_out, r), V_WC (n_in, r), which is C⁻¹ V: so U S V_WCᵀ is a part of W."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


def corda(r: int, scaling: float, module: nn.Module | None) -> Start:
    """A and B from the decomposition that `preprocess_corda` has left on the module. Yang et al. 2024, arXiv:2406.05223.

    Raises:
        ConfigError: if there is none.
    """
    eigens: CordaEigens | None = getattr(module, "eigens", None)
    if eigens is None:
        raise ConfigError(
            "`eigens` attribute not found for layer: init_lora_weights='corda' needs data. "
            "Call preprocess_corda(model, lora_config, run_model) first."
        )
    if len(eigens.S_WC) < r:
        raise ConfigError(f"preprocess_corda has kept {len(eigens.S_WC)} directions, and r={r}. Run it again with this rank.")
    a, b = split(eigens.U_WC[:, :r].float(), eigens.S_WC[:r].float(), eigens.V_WC[:, :r].float().T, scaling)
    return counted(a.contiguous(), b.contiguous())


def preprocess_corda(
    model: nn.Module, lora_config: Any, run_model: Callable[[], None] | None = None, hooked_model: nn.Module | None = None
) -> None:
    """Collect the covariance of each target's inputs and leave the decomposition as `eigens` on each target.

    Each batch counts the same, scaled to a largest input of 1.

    Args:
        run_model: runs the model over sample data; may be left out if a cache or covariance file is there.
        hooked_model: the model that run_model runs, if it is another object than `model`: a wrapper around it, or one with the same layers.

    Raises:
        ConfigError: if the config has no corda_config, run_model is needed and missing, or the data make a covariance that is not finite.
        LoadError: if a file does not hold every target.
    """
    options: CordaConfig | None = lora_config.corda_config
    if options is None:
        raise ConfigError(
            "`corda_config` must be specified in `lora_config`: LoraConfig(init_lora_weights='corda', corda_config=CordaConfig(...))."
        )
    modules = dict(targets(model, lora_config))
    cached = read(options.cache_file, [f"{n}.eigens.{part}" for n in modules for part in _PARTS])
    if cached is not None:
        eigens = {n: CordaEigens(*(cached[f"{n}.eigens.{part}"] for part in _PARTS)) for n in modules}
    else:
        covariances = read(options.covariance_file, list(modules))
        if covariances is None:
            if run_model is None:
                raise ConfigError("run_model must be specified when covariance file and cache file aren't built.")
            covariances = _collected(modules, run_model, hooked_model, options.use_float16_for_covariance)
            if options.covariance_file:
                write(options.covariance_file, covariances)
        eigens = {n: _decompose(n, m, covariances[n], lora_config.at(n).r, options.corda_method) for n, m in modules.items()}
        if not options.prune_temporary_fields:
            for name, module in modules.items():
                module.covariance_matrix = covariances[name]
        if options.cache_file:
            write(options.cache_file, {f"{n}.eigens.{part}": getattr(e, part) for n, e in eigens.items() for part in _PARTS})
    for name, module in modules.items():
        module.eigens = eigens[name]  # type: ignore[assignment]


def _collected(modules: dict[str, nn.Module], run: Callable[[], None], hooked: nn.Module | None, half: bool) -> dict[str, Tensor]:
    """The mean over batches of Xᵀ X by target name."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def collect(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x: Tensor = (args or tuple(kwargs.values()))[0].detach()
            x = x.reshape(-1, x.shape[-1]).to(torch.float16 if half else torch.float32)
            x = x / x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
            sums[name] = sums[name] + x.T @ x if name in sums else x.T @ x
            counts[name] = counts.get(name, 0) + 1
            if not bool(torch.isfinite(sums[name]).all()):
                raise ConfigError(
                    f"The covariance of the inputs of {name!r} is not finite. CorDA needs data on which the model runs without overflow"
                    f"{', and with use_float16_for_covariance=True fewer or smaller batches' if half else ''}."
                )

        return hook

    if hooked is not None:
        inside, by_name = set(hooked.modules()), dict(hooked.named_modules())
        if not inside.issuperset(modules.values()):  # not a wrapper around the model
            check_reached(modules, by_name, "hooked_model has no module")
            modules = {n: by_name[n] for n in modules}
    handles = [m.register_forward_hook(collect(n), with_kwargs=True) for n, m in modules.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    check_reached(modules, sums, "run_model never ran")
    return {n: sums[n] / counts[n] for n in modules}


def _decompose(name: str, module: nn.Module, covariance: Tensor, r: int, method: str) -> CordaEigens:
    from ..sites import site_for

    w = wide(site_for(module).weight(module)).double()
    c = covariance.to(w)
    if c.shape != (w.shape[1], w.shape[1]) or r > min(w.shape):
        raise ConfigError(
            f"{name!r} has a weight of shape {tuple(w.shape)}: r={r} directions of it and a covariance {tuple(c.shape)} do not go together."
        )
    spread = c.diagonal().mean()
    if not spread > 0:
        raise ConfigError(f"The inputs of {name!r} were all zero, so there is nothing to start from. Give run_model other data.")
    damped = c + _DAMPING * spread * torch.eye(len(c)).to(c)
    if method == "ipm":
        u, s, v = singular(w @ damped, r)
    else:
        u, s, v = torch.linalg.svd(w @ damped, full_matrices=False)  # these span too many orders for a Gram matrix
        u, s, v = u[:, -r:], s[-r:], v[-r:]
    v_inverse = torch.linalg.solve(damped, v.T)
    return CordaEigens(s.float().clone(), u.float().clone(), v_inverse.float().clone())
