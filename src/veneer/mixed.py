"""`PeftMixedModel`: adapters of several methods on one model, alone or together."""

from __future__ import annotations

from collections.abc import Sequence

from .config import PeftConfig
from .errors import ConfigError
from .model import PeftModel
from .prompts.base import Prompt
from .tuner import MixedModel, Tuner


class PeftMixedModel(PeftModel):
    """A model whose adapters may be of different methods; `set_adapter` takes one or several, which act one after another in their order.

    Differs from PEFT's: any two methods that change weights go together, it can be saved (each adapter in a folder of its own, as ever), its layers
    report their status, and a batch can mix its adapters.
    """

    @staticmethod
    def _tuner_class(config: PeftConfig) -> type[Tuner]:
        return MixedModel

    @classmethod
    def _class_for(cls, config: PeftConfig) -> type[PeftModel]:
        return cls

    def _prepare(self, model: object, config: PeftConfig) -> None:
        _mixable(config)
        super()._prepare(model, config)  # type: ignore[arg-type]

    def _check_new_adapter_config(self, peft_config: PeftConfig, is_trainable: bool = True) -> None:
        self._one_with_bias(peft_config)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Take one or several adapters off; see `PeftModel.delete_adapter`."""
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            super().delete_adapter(name)


def _mixable(config: PeftConfig) -> None:
    if isinstance(config, Prompt):
        raise ConfigError(
            f"{type(config).__name__} changes no weights, so it cannot be part of a mixed model. Make a PeftModel of it (mixed=False)."
        )
