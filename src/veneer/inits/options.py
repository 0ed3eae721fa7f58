"""What a config says of its start, checked and made whole."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, PeftWarning
from . import SITES, CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, check_kind

_OPTIONS = {"eva": EvaConfig, "corda": CordaConfig, "lora_ga": LoraGAConfig}
OPTIONS: Mapping[str, Any] = {**{f"{kind}_config": options for kind, options in _OPTIONS.items()}, "loftq_config": LoftQConfig}  # by field


def read_start(config: Any) -> None:
    """Make the options of the start, as a file has them, what the start takes; those it needs and does not have are the default.

    Raises:
        ConfigError: if there is no such start, or it lacks its options.
    """
    check_kind(config.init_lora_weights)
    for kind, options in _OPTIONS.items():
        name = f"{kind}_config"
        value = getattr(config, name)
        if isinstance(value, Mapping):
            setattr(config, name, options(**value))
        elif value is None and config.init_lora_weights == kind:
            setattr(config, name, options())
        elif value is not None and config.init_lora_weights != kind:
            warnings.warn(f"`{name}` has no effect unless `init_lora_weights` is {kind!r}.", PeftWarning, stacklevel=5)
    if config.init_lora_weights == "loftq" and not config.loftq_config:
        raise ConfigError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
    if isinstance(config.loftq_config, Mapping) and config.loftq_config:
        config.loftq_config = LoftQConfig(**config.loftq_config)


def check_start(config: Any, site: Any) -> None:
    """Raise ConfigError if the start cannot begin at `site`."""
    kind = str(config.init_lora_weights).split("_niter")[0]
    if kind in SITES and site.kind not in SITES[kind]:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} does not start {site.kind} layers ({site.name!r}); it takes {sorted(SITES[kind])}."
        )
