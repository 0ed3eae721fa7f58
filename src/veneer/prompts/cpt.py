"""Context-aware prompt tuning: examples as a prompt, whose embeddings move a little and whose labels count in the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..types import name_of
from .base import Prompt, PromptModule

__all__ = ["CPTConfig", "CPTEmbedding"]


@dataclass
class CPTConfig(Prompt, peft_type="CPT"):
    """input = [E(context) + δ; E(tokens)], ‖δ_j‖ ≤ ε_j √(width / 2048).   δ (n, width) trains.   Blau et al. 2024, arXiv:2410.17222.

    The type of a token, modulo 4, is 1: template of an input, 2: input, 3: template of an output, 0: label. Each example of the context
    has its own four types. Labels stay as they are, and the loss counts them too.

    Args:
        cpt_token_ids: the context, n tokens.
        cpt_mask: kept for PEFT's files, where every token of the context is attended to whatever this says.
        cpt_tokens_type_mask: the type of each token.
        opt_weighted_loss_type: "decay": the labels of an example with k examples after it count opt_loss_decay_factor^k.
        opt_loss_decay_factor: that factor.
        opt_projection_epsilon: ε of inputs.
        opt_projection_format_epsilon: ε of templates.
        tokenizer_name_or_path: kept for PEFT's files.

    Raises:
        ConfigError: unless it is for CAUSAL_LM and the three lists have one length.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if name_of(self.task_type) != "CAUSAL_LM":
            raise ConfigError("CPTConfig only supports task_type = CAUSAL_LM.")
        if self.opt_weighted_loss_type not in (None, "none", "decay"):
            raise ConfigError(f"opt_weighted_loss_type must be 'none' or 'decay', got {self.opt_weighted_loss_type!r}.")
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else list(self.cpt_token_ids)
        n = len(self.cpt_token_ids)
        self.cpt_mask = [1] * n if self.cpt_mask is None else list(self.cpt_mask)
        self.cpt_tokens_type_mask = [1] * n if self.cpt_tokens_type_mask is None else list(self.cpt_tokens_type_mask)
        if not n == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise ConfigError("cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length.")
        self.num_virtual_tokens = n
        self.num_transformer_submodules = 1

    def module(self, table: nn.Module, start: bool) -> PromptModule:
        return CPTEmbedding(self, table)

    def loss(self, logits: Tensor, labels: Tensor, types: Tensor | None, items: Tensor | int | None = None) -> Tensor:
        """The loss over the labels of the context and of the input.

        Args:
            logits: (batch, n + tokens, vocabulary).
            labels: (batch, tokens), -100 where none.
            types: (batch, tokens), the input's types; None: everything is label.
            items: how many labels the whole optimizer step has, where gradients are accumulated.
        """
        context, mine = (
            torch.tensor(v, device=labels.device).expand(len(labels), -1) for v in (self.cpt_token_ids, self.cpt_tokens_type_mask)
        )
        after = (int(mine.max()) + 3) // 4 * 4  # the input comes after every example
        given = torch.full_like(labels, 4) if types is None else types.to(labels.device)
        kinds = torch.cat([mine, torch.where(given > 0, given + after, given)], 1)
        wanted = torch.cat([context, labels], 1).masked_fill((kinds <= 0) | (kinds % 4 != 0), -100)
        out = CPTEmbedding.weighted_loss(logits, wanted, kinds, self)
        return out if items is None else out * (labels != -100).sum() / items


class CPTEmbedding(PromptModule):
    """The prompt of CPT: `embedding` is the context's, frozen, and `delta_embedding` its change."""

    frozen = frozenset({"embedding.weight"})
    limit: Tensor

    def __init__(self, config: CPTConfig, word_embeddings: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.rows, config.token_dim)
        self.delta_embedding = nn.Embedding(config.rows, config.token_dim)
        nn.init.zeros_(self.delta_embedding.weight)
        weight: Any = word_embeddings.weight
        with torch.no_grad():
            self.embedding.weight.copy_(word_embeddings(torch.tensor(config.cpt_token_ids, device=weight.device)))
        self.embedding.weight.requires_grad_(False)
        self.register_buffer("limit", self.get_epsilon(), persistent=False)

    def get_epsilon(self) -> Tensor:
        """The largest length of each token's change, (n, 1)."""
        template, given = self.config.opt_projection_format_epsilon or 0.0, self.config.opt_projection_epsilon or 0.0
        by_type = [0.0, template, given, template]
        return math.sqrt(self.config.token_dim / 2048) * torch.tensor([[by_type[t % 4]] for t in self.config.cpt_tokens_type_mask or ()])

    def get_projection(self) -> Tensor:
        """The change, cut to its largest length, (n, width)."""
        delta: Tensor = self.delta_embedding.weight
        if self.config.inference_mode:
            return delta
        limit, norm = self.limit.to(delta), delta.detach().norm(dim=1, keepdim=True)
        factor = torch.where(norm > limit * (1 + 1e-6), limit / norm, 1.0)  # what has been cut is not cut again for its rounding
        out: Tensor = delta * factor
        return out

    def prompt(self, task_ids: Tensor | None = None) -> Tensor:
        delta: Tensor = self.delta_embedding.weight
        start: Tensor = self.embedding.weight
        if delta.requires_grad and torch.is_grad_enabled():
            with torch.no_grad():  # projected gradient descent: where the last step led out of the ball, go back to it
                cut = self.get_projection()
                if not torch.equal(cut, delta):
                    delta.copy_(cut)
            return start + delta * (self.limit > 0)
        return start + self.get_projection()

    @property
    def prompt_embeddings(self) -> Tensor:
        """The prompt, (n, width)."""
        with torch.no_grad():
            return self.prompt()

    @prompt_embeddings.setter
    def prompt_embeddings(self, value: Tensor) -> None:
        with torch.no_grad():
            if self.config.inference_mode:
                self.embedding.weight.copy_(value)
                self.delta_embedding.weight.zero_()
            else:
                self.delta_embedding.weight.copy_(value.to(self.embedding.weight) - self.embedding.weight)

    def slots(self) -> Iterator[tuple[str, str, str, nn.Module]]:
        yield "prompt_embeddings", "prompt_embeddings", "prompt_embeddings", self

    @staticmethod
    def weighted_loss(logits: Tensor, labels: Tensor, kinds: Tensor, config: CPTConfig) -> Tensor:
        """The mean over all labels that are not -100 of their loss, weighted by example.

        Args:
            logits: (batch, length, vocabulary);  labels, kinds: (batch, length), `kinds` the tokens' types.
        """
        labels, kinds = labels[:, 1:], kinds[:, 1:]
        each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none", ignore_index=-100)
        counted = (labels != -100).sum()
        if config.opt_weighted_loss_type == "decay":
            weight = torch.ones_like(each)
            for row, types in zip(weight, kinds, strict=True):
                examples = types[(types > 0) & (types % 4 == 0)].unique()  # sorted
                for k, example in enumerate(reversed(examples.tolist())):
                    row[types == example] = float(config.opt_loss_decay_factor or 0.0) ** k
            each = each * weight
        return each.sum() / counted

    @staticmethod
    def calculate_loss(base_model_output: Any, labels: Tensor, cpt_type_mask: Tensor, config: CPTConfig) -> Any:
        """The model's output with this loss; the arguments as in `weighted_loss`."""
        base_model_output.loss = CPTEmbedding.weighted_loss(base_model_output.logits, labels, cpt_type_mask.to(labels.device), config)
        return base_model_output
