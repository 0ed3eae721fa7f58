"""Prompt tuning: learned embeddings before the input."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import Prompt, PromptModule, as_enum

__all__ = ["PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"]


class PromptTuningInit(str, enum.Enum):
    """What the prompt starts from: a text's embeddings, those of tokens drawn at random, or noise."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(Prompt, peft_type="PROMPT_TUNING"):
    """input = [P; E(tokens)].   P (n, width) trains.   Lester et al. 2021, arXiv:2104.08691.

    In an encoder-decoder P goes before the encoder's input; as in PEFT's files it has 2n rows there, of which the first n act.

    Args:
        prompt_tuning_init: "RANDOM" (standard normal), "SAMPLE_VOCAB", "TEXT"; case does not matter.
        prompt_tuning_init_text: for "TEXT": the text, cut or repeated to the length of the prompt.
        tokenizer_name_or_path: for "TEXT": the tokenizer, for AutoTokenizer.
        tokenizer_kwargs: for "TEXT": what else AutoTokenizer.from_pretrained is given.

    Raises:
        ConfigError: if what "TEXT" needs is missing.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt_tuning_init = as_enum(PromptTuningInit, self.prompt_tuning_init, "prompt_tuning_init")
        check_text(self)

    def module(self, table: nn.Module, start: bool) -> PromptModule:
        return PromptEmbedding(self, table, start)


class PromptEmbedding(PromptModule):
    """The prompt of prompt tuning.

    Args:
        config: its config, sizes filled in.
        word_embeddings: the base model's input embeddings.
        start: whether to compute the start values; by default unless in inference mode.
    """

    def __init__(self, config: PromptTuningConfig, word_embeddings: nn.Module, start: bool | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.rows, config.token_dim)
        if config.inference_mode if start is None else not start:
            return
        if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            weight: Any = word_embeddings.weight
            fill(self.embedding, word_embeddings, torch.randint(0, weight.shape[0], (config.rows,)))
        elif config.prompt_tuning_init == PromptTuningInit.TEXT:
            fill(self.embedding, word_embeddings, text_ids(config, config.rows))


def check_text(config: Any) -> None:
    """Raise ConfigError if an init from text lacks what it needs, or another init has it."""
    if config.prompt_tuning_init == "TEXT":
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if not getattr(config, name):
                raise ConfigError(f"When prompt_tuning_init='TEXT', {name} can't be None.")
    elif config.tokenizer_kwargs:
        raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


def text_ids(config: Any, rows: int) -> Tensor:
    """The ids of the init text, cut or repeated to `rows`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}))
    ids = list(tokenizer(config.prompt_tuning_init_text)["input_ids"])
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text {config.prompt_tuning_init_text!r} has no tokens.")
    return torch.tensor((ids * math.ceil(rows / len(ids)))[:rows])


def fill(embedding: nn.Embedding, table: nn.Module, ids: Tensor) -> None:
    """Give a prompt the base model's embeddings of these tokens."""
    weight: Any = table.weight
    with torch.no_grad():
        embedding.weight.copy_(table(ids.to(weight.device)))
