"""What every prompt method is: a config that builds the module which holds the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PromptLearningConfig
from ..errors import ConfigError
from ..method import register
from ..sites.parallel import is_planned
from ..types import PeftType, name_of
from .shape import read_shape


class PromptModule(nn.Module):
    """The tensors of one prompt, under PEFT's names.

    Class attributes:
        frozen: names of parameters that never train.
    """

    frozen: ClassVar[frozenset[str]] = frozenset()
    embedding: Any

    def prompt(self, task_ids: Tensor | None = None) -> Tensor:
        """The prompt as it is fed, (rows, width); with one task per row of the batch, (batch, rows, width)."""
        weight: Tensor = self.embedding.weight
        return weight

    def forward(self, indices: Tensor) -> Tensor:
        """Rows of the prompt, (..., width)."""
        return F.embedding(indices, self.prompt())

    def slots(self) -> Iterator[tuple[str, str, str, nn.Module]]:
        """(key in the file, name in this module, attribute, owner) of what is saved."""
        yield "prompt_embeddings", "embedding.weight", "weight", self.embedding

    def set_requires_grad(self, requires_grad: bool) -> None:
        """Let the prompt get gradients, or not."""
        for name, p in self.named_parameters():
            p.requires_grad_(requires_grad and name not in self.frozen)


class Reparametrised(PromptModule):
    """A prompt that a small network makes of an embedding. Files hold what the network gives; loading one drops the network.

    Class attributes:
        network: the names of the network's parts.
    """

    network: ClassVar[tuple[str, ...]] = ()

    def made(self) -> Tensor:
        """What the network gives, (rows, width)."""
        raise NotImplementedError(f"{type(self).__name__} has to define `made()`")

    @property
    def folded(self) -> bool:
        """Whether the network is gone and the embedding is the prompt itself."""
        return not any(name in self._modules for name in self.network)

    def prompt(self, task_ids: Tensor | None = None) -> Tensor:
        return super().prompt() if self.folded else self.made()

    @property
    def prompt_embeddings(self) -> Tensor:
        """The prompt without dropout, (rows, width)."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return self.prompt()
        finally:
            self.train(training)

    @prompt_embeddings.setter
    def prompt_embeddings(self, value: Tensor) -> None:
        trains = self.embedding.weight.requires_grad
        for name in self.network:
            self._modules.pop(name, None)
        self.embedding = nn.Embedding.from_pretrained(value.detach().clone().to(self.embedding.weight.device), freeze=not trains)

    def slots(self) -> Iterator[tuple[str, str, str, nn.Module]]:
        if self.folded:
            yield from super().slots()
        else:
            yield "prompt_embeddings", "prompt_embeddings", "prompt_embeddings", self


@dataclass
class Prompt(PromptLearningConfig):
    """Base of every prompt method. Abstract: `module` must be given.

    Class attributes:
        into: where the prompt goes: "tokens" before the input embeddings, "cache" before the keys and values of every layer.
        in_decoder: whether an encoder-decoder gets a prompt in its decoder too.
    """

    into: ClassVar[Literal["tokens", "cache"]] = "tokens"
    in_decoder: ClassVar[bool] = False
    _peft_type_name: ClassVar[str] = ""

    def __init_subclass__(cls, peft_type: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if peft_type is not None:
            register(cls, peft_type)
            cls._peft_type_name = peft_type

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self)._peft_type_name
        self.peft_type = PeftType(name) if name in PeftType.__members__ else name  # type: ignore[assignment]

    def module(self, table: nn.Module, start: bool) -> PromptModule:
        """The module that holds the prompt.

        Args:
            table: the base model's input embeddings.
            start: False where a file brings the values.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define `module(table, start)`")

    @property
    def resumable(self) -> bool:
        """Whether a file holds all that training needs."""
        return True

    @property
    def rows(self) -> int:
        """How many rows the prompt has."""
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)

    @property
    def flat(self) -> int:
        """How many numbers the keys and values of one token are, in all layers."""
        return (self.num_layers or 0) * 2 * self.token_dim

    def fill(self, model: nn.Module) -> None:
        """Take what is not given from the base model.

        Raises:
            ConfigError: if something stays unknown.
        """
        if self.into == "cache" and is_planned(model):
            raise ConfigError(
                f"{type(self).__name__} gives every layer keys and values of all heads, and a tensor-parallel plan leaves a process some of them. "
                "Use prompt tuning, or FSDP2 (veneer.distributed.shard) or DDP."
            )
        found = read_shape(model, self.into, name_of(self.task_type))
        for name, value in found.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if getattr(self, "encoder_hidden_size", 0) is None:
            self.encoder_hidden_size = self.token_dim
        missing = [n for n in ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads") if getattr(self, n) is None]
        missing = [n for n in missing if self.into == "cache" or n in ("num_virtual_tokens", "token_dim")]
        if missing:
            known = "" if missing == ["num_virtual_tokens"] else " The base model's config does not tell."
            raise ConfigError(f"{type(self).__name__} needs {', '.join(missing)}.{known} Set it in the config, as a whole number.")
        if not isinstance(self.num_virtual_tokens, int) or self.num_virtual_tokens < 1:
            raise ConfigError(f"{type(self).__name__}.num_virtual_tokens must be a whole number over 0, got {self.num_virtual_tokens!r}.")

    def checkpoint_slots(self, model: Any, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """(key in the file, name in memory, attribute, owner) of each tensor of the prompt."""
        held: Any = model._modules.get("prompt_encoder")
        if held is not None and adapter in held:
            for key, name, attribute, owner in held[adapter].slots():
                yield key, f"prompt_encoder.{adapter}.{name}", attribute, owner


def as_enum(kind: Any, value: Any, field: str) -> Any:
    """The member of an enum that a field names, in any case.

    Raises:
        ConfigError: if there is none.
    """
    try:
        return kind(name_of(value).upper())
    except (ValueError, AttributeError) as e:
        raise ConfigError(f"`{field}` must be one of {', '.join(m.value for m in kind)}, got {value!r}.") from e
