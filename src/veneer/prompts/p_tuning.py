"""P-tuning: a small network makes the virtual tokens."""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import PeftWarning
from .base import Prompt, PromptModule, Reparametrised, as_enum

__all__ = ["PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"]


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network: an MLP, or a bidirectional LSTM and an MLP."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(Prompt, peft_type="P_TUNING"):
    """input = [f(P); E(tokens)].   P (n, width) and f train; the file holds f(P).   Liu et al. 2021, arXiv:2103.10385.

    Args:
        encoder_reparameterization_type: f: "MLP" (two hidden layers, ReLU) or "LSTM" (bidirectional, then one hidden layer).
        encoder_hidden_size: its width; by default that of the embeddings.
        encoder_num_layers: layers of the LSTM. The MLP always has two hidden ones.
        encoder_dropout: between the LSTM's layers.
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int = None  # type: ignore[assignment]  # PEFT's
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encoder_reparameterization_type = as_enum(
            PromptEncoderReparameterizationType, self.encoder_reparameterization_type, "encoder_reparameterization_type"
        )

    @property
    def resumable(self) -> bool:
        return False

    def module(self, table: nn.Module, start: bool) -> PromptModule:
        return PromptEncoder(self)


class PromptEncoder(Reparametrised):
    """The prompt of P-tuning; in inference mode the embedding alone, which is then the prompt."""

    network = ("lstm_head", "mlp_head")

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__()
        width, hidden = config.token_dim, config.encoder_hidden_size or config.token_dim
        self.embedding = nn.Embedding(config.rows, width)
        if config.inference_mode:
            return
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = nn.LSTM(
                width, hidden, num_layers=config.encoder_num_layers, dropout=config.encoder_dropout, bidirectional=True, batch_first=True
            )
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        else:
            if config.encoder_num_layers != 2:
                warnings.warn(
                    f"The MLP of P-tuning has two hidden layers; encoder_num_layers={config.encoder_num_layers} is for the LSTM.",
                    PeftWarning,
                    stacklevel=2,
                )
            self.mlp_head = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )

    def made(self) -> Tensor:
        x: Tensor = self.embedding.weight.unsqueeze(0)
        if "lstm_head" in self._modules:
            x = self.lstm_head(x)[0]
        out: Tensor = self.mlp_head(x)
        return out.squeeze(0)
