"""CorDA: a start from the weight as the data see it, through the covariance of a layer's inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, LoadError
from .base import Start, counted, split, wide


@dataclass
class CordaConfig:
    """Options of the CorDA start.

    Args:
        cache_file: where the decompositions are kept between runs;  covariance_file: where the covariances are.
        corda_method: "ipm" adapts the r directions that matter most to the data, "kpm" the r that matter least and so keeps what the data need.
        use_float16_for_covariance: collect in float16, at a loss of accuracy.
        prune_temporary_fields: take the covariances off the model when the decompositions are made.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class CordaEigens:
    """W C = U S Vᵀ C⁻¹ cut to r: S_WC (r,), U_WC (n_out, r), V_WC (n_in, r), the inverse covariance already in V."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


def corda(r: int, scaling: float, module: nn.Module) -> Start:
    """A and B from the decomposition that `preprocess_corda` has left on the module. Yang et al. 2024, arXiv:2406.05223.

    Raises:
        ConfigError: if there is none.
    """
    eigens: CordaEigens | None = getattr(module, "eigens", None)
    if eigens is None:
        raise ConfigError(
            "`eigens` attribute not found for layer: init_lora_weights='corda' needs data. Call preprocess_corda(model, lora_config, run_model) first."
        )
    if len(eigens.S_WC) < r:
        raise ConfigError(f"preprocess_corda has kept {len(eigens.S_WC)} directions, and r={r}. Run it again with this rank.")
    a, b = split(eigens.U_WC[:, :r].float(), eigens.S_WC[:r].float(), eigens.V_WC[:, :r].float().T, scaling)
    return counted(a.contiguous(), b.contiguous())


def preprocess_corda(
    model: nn.Module, lora_config: Any, run_model: Callable[[], None] | None = None, hooked_model: nn.Module | None = None
) -> None:
    """Collect the covariance of each target's inputs and leave the decomposition as `eigens` on each target.

    Args:
        run_model: runs the model over sample data; may be left out if a cache or covariance file is there.
        hooked_model: the model that run_model runs, if it is another object than `model` with the same layers.

    Raises:
        ConfigError: if the config has no corda_config, run_model is needed and missing, or the data make a covariance that is not finite.
    """
    options: CordaConfig | None = lora_config.corda_config
    if options is None:
        raise ConfigError(
            "`corda_config` must be specified in `lora_config`: LoraConfig(init_lora_weights='corda', corda_config=CordaConfig(...))."
        )
    targets = dict(_targets(model, lora_config))
    cached = _read(options.cache_file)
    if cached is not None:
        for name, module in targets.items():
            module.eigens = CordaEigens(*(cached[f"{name}.eigens.{k}"] for k in ("S_WC", "U_WC", "V_WC")))  # type: ignore[assignment]
        return
    for name, (module, covariance) in _covariances(targets, lora_config, run_model, hooked_model).items():
        r = lora_config.at(name).r
        module.eigens = _decompose(module, covariance.float(), r, options.corda_method)  # type: ignore[assignment]
    if options.cache_file:
        kept = {f"{n}.eigens.{k}": getattr(m.eigens, k) for n, m in targets.items() for k in ("S_WC", "U_WC", "V_WC")}
        _write(options.cache_file, kept)


def _targets(model: nn.Module, config: Any) -> Iterator[tuple[str, nn.Module]]:
    from ..engine.select import select
    from ..sites import supported

    yield from select(model, config, supports=lambda m: supported(m) == "linear").modules.items()


def _covariances(
    targets: dict[str, nn.Module], config: Any, run: Callable[[], None] | None, hooked: nn.Module | None
) -> dict[str, tuple[nn.Module, Tensor]]:
    options: CordaConfig = config.corda_config
    stored = _read(options.covariance_file)
    if stored is not None:
        return {n: (m, stored[f"{n}.covariance_matrix"]) for n, m in targets.items()}
    if run is None:
        raise ConfigError("run_model must be specified when covariance file and cache file aren't built.")
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def collect(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            x = x.to(torch.float16 if options.use_float16_for_covariance else torch.float32)
            x = x / x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
            if not bool(torch.isfinite(x).all()):
                raise ConfigError(
                    f"The inputs of {name!r} are not finite; CorDA needs sample data on which the model runs without overflow."
                )
            sums[name] = sums.get(name, torch.zeros((), dtype=x.dtype, device=x.device)) + x.T @ x
            counts[name] = counts.get(name, 0) + 1

        return hook

    modules = dict(hooked.named_modules()) if hooked is not None else targets
    handles = [modules[n].register_forward_hook(collect(n)) for n in targets]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    silent = [n for n in targets if n not in sums]
    if silent:
        raise ConfigError(f"run_model never ran {silent[0]!r} (and {len(silent) - 1} more); every target has to see data.")
    out = {n: (m, sums[n] / counts[n]) for n, m in targets.items()}
    if options.covariance_file:
        _write(options.covariance_file, {f"{n}.covariance_matrix": c for n, (_, c) in out.items()})
    return out


def _decompose(module: nn.Module, c: Tensor, r: int, method: str) -> CordaEigens:
    from ..sites import site_for

    w = wide(site_for(module).weight(module)).float()
    damped, damp = c, 0.01
    eye = torch.eye(c.shape[0], device=c.device)
    while True:
        try:
            inverse = torch.linalg.inv(damped)
        except RuntimeError:
            inverse = None
        if (
            inverse is not None
            and bool(torch.isfinite(inverse).all())
            and float((damped @ inverse - eye).norm()) / c.shape[0] ** 0.5 < 0.05
        ):
            break
        damped = c + damp * c.diagonal().mean() * eye
        damp *= 2
    u, s, vt = torch.linalg.svd(w @ damped, full_matrices=False)
    v = (vt @ inverse).T
    keep = slice(0, r) if method == "ipm" else slice(len(s) - r, len(s))
    return CordaEigens(s[keep].clone(), u[:, keep].clone(), v[:, keep].clone())


def _read(path: str | None) -> dict[str, Any] | None:
    if path is None or not Path(path).exists() or Path(path).stat().st_size == 0:
        return None
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise LoadError(f"{path} is no file of tensors: {e}") from e
    return found


def _write(path: str, tensors: dict[str, Tensor]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    beside = f"{path}.{os.getpid()}.part"
    torch.save(tensors, beside)
    os.replace(beside, path)
