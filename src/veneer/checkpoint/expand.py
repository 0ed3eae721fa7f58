"""An adapter whose change is counted from its start, as a plain LoRA of twice the rank."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.layer import adapted_layers
from ..errors import ConfigError
from ..types import name_of
from .keys import PREFIX
from .save import get_peft_model_state_dict, write_adapter


def save_expanded(model: Any, config: Any, adapter: str, folder: Path, is_main_process: bool = True) -> None:
    """Write s (B A - B0 A0) as s' (B | -B0) (A over A0): rank, alpha and their patterns double, so that the scaling stays.

    Layers that have no start to count from keep their ranks.

    Raises:
        ConfigError: if it is no LoRA or has no such start, or rsLoRA with patterns makes the scaling of a layer inexpressible.
    """
    kind = name_of(config.peft_type)
    if kind != "LORA":
        raise ConfigError(f"path_initial_model_for_weight_conversion converts LoRA adapters only; {adapter!r} is a {kind}.")
    if not is_main_process:
        return
    tensors = dict(get_peft_model_state_dict(model, adapter_name=adapter))
    patterns = dict(config.rank_pattern or {}) or dict(config.alpha_pattern or {})
    if config.use_rslora and patterns:
        raise ConfigError(
            "Passing `path_initial_model_for_weight_conversion` together with rsLoRA and rank or alpha patterns is not supported."
        )
    done = 0
    plain: dict[str, Any] = {}
    for path, layer in adapted_layers(model.get_base_model()):
        if adapter not in layer.attached:
            continue
        start, here = layer.start_factors(adapter), layer.attached[adapter]
        if start is None:
            if here.place is not None and not here.leaves.keys().isdisjoint(("lora_A", "lora_embedding_A")):
                plain[here.place.called] = here.config  # an embedding, or a head tied to it: stays as it is
            continue
        done += 1
        for suffix, factor, dim, sign in (("lora_A", start[0], 0, 1.0), ("lora_B", start[1], 1, -1.0)):
            key = f"{path}.{suffix}.weight" if f"{path}.{suffix}.weight" in tensors else f"{PREFIX}{path}.{suffix}.weight"
            now: Tensor = tensors[key]
            tensors[key] = torch.cat([now, sign * factor.to(now)], dim)
    if not done:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} does not count its change from a start, so there is nothing to convert. "
            "Leave out path_initial_model_for_weight_conversion."
        )
    new = copy.copy(config)
    more = math.sqrt(2) if config.use_rslora else 2
    ranks, alphas = {n: c.r for n, c in plain.items()}, {n: c.lora_alpha for n, c in plain.items()}  # first, as the first that hits counts
    new.r, new.rank_pattern = 2 * config.r, {**ranks, **{k: 2 * v for k, v in (config.rank_pattern or {}).items() if k not in ranks}}
    new.lora_alpha = config.lora_alpha * more
    new.alpha_pattern = {**alphas, **{k: more * v for k, v in (config.alpha_pattern or {}).items() if k not in alphas}}
    new.init_lora_weights = True
    prefixed = {k if k.startswith(PREFIX) else f"{PREFIX}{k}": v for k, v in tensors.items()}
    write_adapter(prefixed, new, folder)
