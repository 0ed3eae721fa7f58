"""trainable_token_indices: some rows of an embedding trained beside another method's adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..engine.layer import AdaptedLayer


class TrainableTokensWrapper(nn.Module):
    """An embedding (or the head tied to it) some of whose rows are replaced by trained ones, per adapter.

    Attributes:
        token_adapter: the adapted layer that holds `trainable_tokens_delta` and does the work.
    """

    def __init__(self, token_adapter: AdaptedLayer) -> None:
        super().__init__()
        self.token_adapter = token_adapter
        self.training = token_adapter.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(*args, **kwargs)

    def inside(self) -> nn.Module:
        """The table that was there."""
        return self.token_adapter.base_layer

    @property
    def original_module(self) -> nn.Module:
        return self.inside()

    def adapters(self) -> list[str]:
        return self.token_adapter.adapters()

    def adapter_slots(self, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """None of its own: the adapted layer inside lists its tensors under its own path."""
        return iter(())

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Keys that transformers' loader has yet to rename: none, `build_peft_weight_mapping` knows these too."""
        return {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "token_adapter" not in self._modules or name.startswith("__"):
                raise
            return getattr(self.token_adapter, name)
