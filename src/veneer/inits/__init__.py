"""Starts: first values of LoRA's factors, one kind a file. The frozen weight itself is never changed behind the user's back."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..errors import ConfigError, hint
from .base import Start, Weight
from .corda import CordaConfig, CordaEigens, corda, preprocess_corda
from .default import default, orthogonal
from .eva import EvaConfig, get_eva_state_dict, initialize_lora_eva_weights
from .loftq import LoftQConfig, loftq, replace_lora_weights_loftq
from .lora_ga import LoraGAConfig, lora_ga, preprocess_loraga
from .spectral import mica, olora, pissa

KINDS = (
    True,
    False,
    "gaussian",
    "eva",
    "olora",
    "pissa",
    "pissa_niter_4",
    "corda",
    "loftq",
    "orthogonal",
    "mica",
    "lora_ga",
)

# the kinds of site that a start can begin on; kinds not listed begin on all
SITES: dict[str, set[str]] = {
    "pissa": {"linear", "embedding", "parameter"},
    "olora": {"linear", "embedding", "parameter"},
    "orthogonal": {"linear", "embedding", "parameter"},
    "mica": {"linear", "embedding"},
    "eva": {"linear"},
    "corda": {"linear"},
    "lora_ga": {"linear"},
    "loftq": {"linear"},
}


def check_kind(kind: bool | str) -> None:
    """Raise ConfigError for an `init_lora_weights` that is none."""
    number = isinstance(kind, int) and not isinstance(kind, bool)  # 1 == True, but is none
    if kind is None or (kind in KINDS and not number) or (isinstance(kind, str) and re.fullmatch(r"pissa_niter_\d+", kind)):
        return
    names = [str(k) for k in KINDS]
    raise ConfigError(
        f"Unknown initialization init_lora_weights={kind!r}. Known ones: {', '.join(names)} (or other iterations).{hint(str(kind), names)}"
    )


def start(
    kind: bool | str,
    weight: Weight,
    r: int,
    scaling: float,
    *,
    n_out: int,
    n_in: int,
    config: Any,
    context: nn.Module | None = None,
    embedding: bool = False,
) -> Start:
    """First values of A (r, n_in) and B (n_out, r).

    Args:
        kind: an `init_lora_weights`.
        weight: gives the frozen W (n_out, n_in).
        scaling: s of D = s B A.
        config: with `loftq_config`, `lora_ga_config`.
        context: the module itself, which carries what a preprocessing has found.
        embedding: whether W is an embedding's table (n_out: its width, n_in: its rows), which begins with A zero.

    Raises:
        ConfigError: if the kind cannot begin here.
    """
    if kind in (True, False, None, "gaussian", "eva"):  # EVA's own values come with the data
        return default(r, n_out, n_in, True if kind in (None, "eva") else kind, embedding)
    if embedding and kind != "mica":
        return default(r, n_out, n_in, True, embedding)  # as PEFT, whose files say so: tables begin plainly
    if kind == "orthogonal":
        if r % 2:
            raise ConfigError(f"init_lora_weights='orthogonal' needs an even rank, got {r}.")
        return orthogonal(r, n_out, n_in)
    if kind == "corda":
        return corda(r, scaling, context)
    w = weight()
    if w.ndim != 2:
        raise ConfigError(f"init_lora_weights={kind!r} begins on matrices, not on a weight of shape {tuple(w.shape)}.")
    if r > min(w.shape):
        raise ConfigError(f"init_lora_weights={kind!r} has no {r} directions to take from a weight of shape {tuple(w.shape)}. Lower r.")
    if kind == "olora":
        return olora(w, r)
    if kind == "mica":
        return mica(w, r)
    if kind == "loftq":
        return loftq(w, r, scaling, config.loftq_config)
    if kind == "lora_ga":
        return lora_ga(w, r, scaling, config.lora_ga_config, context)
    iterations = re.fullmatch(r"pissa_niter_(\d+)", str(kind))
    return pissa(w, r, scaling, int(iterations[1]) if iterations else None)


__all__ = [
    "KINDS",
    "SITES",
    "CordaConfig",
    "CordaEigens",
    "EvaConfig",
    "LoftQConfig",
    "LoraGAConfig",
    "Start",
    "check_kind",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
    "start",
]
