"""Multitask prompt tuning: one prompt, and a low-rank factor of it per task."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, LoadError, RouteError
from ..types import name_of
from .base import Prompt, PromptModule, as_enum
from .prompt_tuning import check_text, fill, text_ids

__all__ = ["MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"]


class MultitaskPromptTuningInit(str, enum.Enum):
    """What the prompt starts from: a text, noise, or the prompt of an earlier training (source) on several tasks."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


_FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass
class MultitaskPromptTuningConfig(Prompt, peft_type="MULTITASK_PROMPT_TUNING"):
    """input = [P ⊙ (C_t R_t); E(tokens)] for task t.   P (n, width), C (tasks, n, r), R (tasks, r, width) train.   Wang et al. 2023,
    arXiv:2303.02861.

    Every call takes `task_ids`, one per row of the batch. An encoder-decoder gets the first half of the rows in its encoder, the second in
    its decoder.

    Args:
        prompt_tuning_init: see `MultitaskPromptTuningInit`.
        prompt_tuning_init_text, tokenizer_name_or_path, tokenizer_kwargs: as in prompt tuning.
        prompt_tuning_init_state_dict_path: for a start from source tasks: the adapter's folder, or its file.
        prompt_tuning_init_task: for "EXACT_SOURCE_TASK": which of its tasks.
        num_ranks: r.
        num_tasks: how many tasks.

    Raises:
        ConfigError: if what the init needs is missing.
    """

    in_decoder = True

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt_tuning_init = as_enum(MultitaskPromptTuningInit, self.prompt_tuning_init, "prompt_tuning_init")
        check_text(self)
        for name in ("num_ranks", "num_tasks"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number over 0, got {getattr(self, name)!r}.")

    def module(self, table: nn.Module, start: bool) -> PromptModule:
        return MultitaskPromptEmbedding(self, table, start)


class MultitaskPromptEmbedding(PromptModule):
    """The prompt of multitask prompt tuning. Arguments as of PromptEmbedding."""

    def __init__(self, config: MultitaskPromptTuningConfig, word_embeddings: nn.Module, start: bool | None = None) -> None:
        super().__init__()
        tasks, ranks = config.num_tasks or 1, config.num_ranks or 1
        self.embedding = nn.Embedding(config.rows, config.token_dim)
        self.prefix_task_cols = nn.Parameter(torch.empty(tasks, config.rows, ranks).normal_(0, 0.02))
        self.prefix_task_rows = nn.Parameter(torch.empty(tasks, ranks, config.token_dim).normal_(0, 0.02))
        if config.inference_mode if start is None else not start:
            return
        if config.prompt_tuning_init == MultitaskPromptTuningInit.TEXT:
            fill(self.embedding, word_embeddings, text_ids(config, config.rows))
        elif config.prompt_tuning_init in _FROM_SOURCE:
            self._take(_source(config), config)

    def _take(self, source: dict[str, Tensor], config: MultitaskPromptTuningConfig) -> None:
        """Start from an earlier training: its prompt, and one of its tasks, or their mean, for every task here."""
        wanted: dict[str, Tensor] = {"prompt_embeddings": self.embedding.weight}
        if config.prompt_tuning_init != MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
            wanted |= {"prefix_task_cols": self.prefix_task_cols, "prefix_task_rows": self.prefix_task_rows}
        ready: list[tuple[Tensor, Tensor]] = []
        for key, mine in wanted.items():
            value = source.get(key)
            if value is not None and key != "prompt_embeddings":
                task = config.prompt_tuning_init_task or 0
                if config.prompt_tuning_init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
                    value = value.mean(0)
                elif task < value.shape[0]:
                    value = value[task]
                else:
                    raise ConfigError(f"prompt_tuning_init_task is {task}, and the source has {value.shape[0]} tasks, counted from 0.")
                value = value.expand(mine.shape[0], *value.shape)
            if value is None or value.shape != mine.shape:
                there = f"of shape {tuple(value.shape)}" if value is not None else "missing"
                raise LoadError(f"{config.prompt_tuning_init_state_dict_path}: {key!r} is {there}; needed is {tuple(mine.shape)}.")
            ready.append((mine, value))
        with torch.no_grad():
            for mine, value in ready:
                mine.copy_(value)

    def prompt(self, task_ids: Tensor | None = None) -> Tensor:
        if task_ids is None:
            raise RouteError("task_ids cannot be None: give one task per row of the batch.")
        tasks = task_ids.to(self.prefix_task_cols.device)
        return super().prompt() * (self.prefix_task_cols[tasks] @ self.prefix_task_rows[tasks])

    def forward(self, indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
        return torch.stack([p[i] for p, i in zip(self.prompt(task_ids), indices, strict=True)])

    def slots(self) -> Iterator[tuple[str, str, str, nn.Module]]:
        yield from super().slots()
        for name in ("prefix_task_cols", "prefix_task_rows"):
            yield name, name, name, self


def _source(config: MultitaskPromptTuningConfig) -> dict[str, Tensor]:
    from ..checkpoint.load import read_adapter, read_safetensors

    path = config.prompt_tuning_init_state_dict_path
    if path is None:
        init = name_of(config.prompt_tuning_init)
        raise ConfigError(f"prompt_tuning_init_state_dict_path needs to be specified with {init} init method")
    if Path(path).is_dir():
        return read_adapter(path).tensors
    if path.endswith(".safetensors"):
        return read_safetensors(path)[0]
    loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded
