"""Prefix tuning: learned keys and values before those of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..errors import ConfigError
from .base import Prompt, PromptModule, Reparametrised

__all__ = ["PrefixEncoder", "PrefixTuningConfig"]


@dataclass
class PrefixTuningConfig(Prompt, peft_type="PREFIX_TUNING"):
    """keys_l = [P_l^K; K_l], values_l = [P_l^V; V_l] in every layer l.   P (n, layers·2·width of keys), or f(P') with P' (n, width) and
    f an MLP, trains; the file holds P.   Li & Liang 2021, arXiv:2101.00190.

    An encoder-decoder gets them in its decoder's self-attention.

    Args:
        init_weights: "zero": start with keys and values of 0; else standard normal.
        encoder_hidden_size: the MLP's width; by default that of the keys.
        prefix_projection: whether an MLP (one hidden layer, tanh) makes them.
    """

    into = "cache"

    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: int = None  # type: ignore[assignment]  # PEFT's
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise ConfigError(f"PrefixTuningConfig.init_weights must be 'zero' or None, got {self.init_weights!r}.")

    @property
    def resumable(self) -> bool:
        return not self.prefix_projection

    def module(self, table: nn.Module, start: bool) -> PromptModule:
        return PrefixEncoder(self)


class PrefixEncoder(Reparametrised):
    """The keys and values of prefix tuning; in inference mode without the MLP."""

    network = ("transform",)

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        n, width, flat = config.num_virtual_tokens, config.token_dim, config.flat
        projected = config.prefix_projection and not config.inference_mode
        self.embedding = nn.Embedding(n, width if projected else flat)
        last: nn.Module = self.embedding
        if projected:
            hidden = config.encoder_hidden_size or width
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, flat))
            last = self.transform[2]
        if config.init_weights == "zero":
            for p in last.parameters():
                nn.init.zeros_(p)

    def made(self) -> Tensor:
        out: Tensor = self.transform(self.embedding.weight)
        return out

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take these keys and values, (n, layers·2·width)."""
        fill_cache_prompt(self, prompt_embeddings, self.embedding.weight)


def fill_cache_prompt(module: PromptModule, value: Tensor, like: Tensor) -> None:
    """Copy keys and values into a prompt's tensor of the same shape.

    Raises:
        ValueError: if the shapes differ.
    """
    if value.shape != like.shape:
        raise ValueError(f"Invalid `prompt_embeddings` shape. Expected {tuple(like.shape)}, got {tuple(value.shape)}.")
    like.data.copy_(value)
