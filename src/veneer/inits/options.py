"""What a config says of its start, checked and made whole."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from ..config import says_something
from ..errors import ConfigError, PeftWarning
from . import SITES, CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, check_kind

_OPTIONS = {"eva": EvaConfig, "corda": CordaConfig, "lora_ga": LoraGAConfig}
OPTIONS: Mapping[str, Any] = {**{f"{kind}_config": options for kind, options in _OPTIONS.items()}, "loftq_config": LoftQConfig}  # by field


def known_options(values: Mapping[str, Any], kinds: Mapping[str, Any], stacklevel: int) -> dict[str, Any]:
    """A config's fields without those options inside them that their kinds do not know, as files of later versions may have: a warning names them.

    Args:
        kinds: by field, the dataclass of its options.
    """
    out = dict(values)
    for name, kind in kinds.items():
        value = values.get(name)
        if not isinstance(value, Mapping):
            continue
        known = {f.name for f in dataclasses.fields(kind)}
        out[name] = {k: v for k, v in value.items() if k in known}
        if unknown := [k for k in sorted(set(value) - known) if says_something(value[k])]:
            warnings.warn(
                f"`{name}` has {', '.join(unknown)}, which {kind.__name__} does not know: ignored. If they change what the adapter computes, its results "
                "will differ from those in training.",
                PeftWarning,
                stacklevel=stacklevel,
            )
    return out


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
