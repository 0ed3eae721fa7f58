"""The variants of LoRA, one a file. `LoraConfig` looks up the one whose field is set; they do not go together."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .alora import ALora
from .arrow import Arrow, ArrowConfig
from .base import Plain, Variant
from .bdlora import BdLora, BdLoraConfig
from .dora import Dora
from .kasa import Kasa, KasaConfig
from .monteclora import Monteclora, MontecloraConfig
from .qalora import QALora
from .velora import Velora, VeloraConfig

VARIANTS: dict[str, Variant] = {v.field: v for v in (Dora(), BdLora(), Velora(), Monteclora(), Kasa(), QALora(), ALora(), Arrow())}
PLAIN = Plain()


def variant_of(config: Any) -> Variant:
    """The variant that a LoraConfig asks for; LoRA itself if none."""
    return next((v for name, v in VARIANTS.items() if getattr(config, name)), PLAIN)


def read_options(config: Any) -> None:
    """Make the options of variants, as a file has them, what their variant takes.

    Raises:
        ConfigError: if two variants are asked for, or one with a start it cannot have.
    """
    asked = [v for name, v in VARIANTS.items() if (value := getattr(config, name)) or value == []]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(f'`{v.field}`' for v in asked)} do not go together: each has a form of its own. Set one of them.")
    for v in asked:
        setattr(config, v.field, v.read(getattr(config, v.field)))
        if v.starts is not None and config.init_lora_weights not in v.starts:
            raise ConfigError(f"`{v.field}` starts with init_lora_weights in {v.starts}, not {config.init_lora_weights!r}.")


__all__ = [
    "VARIANTS",
    "ArrowConfig",
    "BdLoraConfig",
    "KasaConfig",
    "MontecloraConfig",
    "Variant",
    "VeloraConfig",
    "read_options",
    "variant_of",
]
