"""Trainable tokens: chosen rows of an embedding table (and of a head tied to it) are trained, the rest is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError, RouteError
from ..method import Leaf, Method
from ..ops import ReplaceRows


@dataclass
class TrainableTokensConfig(Method, peft_type="TRAINABLE_TOKENS"):
    """T'[i] = δ_i for the chosen rows i of the table T (vocabulary, width), T' = T elsewhere.

    `trainable_tokens_delta` (k, width) holds the whole new rows, not differences; it starts as the table's own. A head that shares the table's weight
    has the same new rows, a target itself or not.
    """

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    prefix: ClassVar[str] = "trainable_tokens_"
    kinds: ClassVar[frozenset[str]] = frozenset({"embedding", "linear"})
    examples: ClassVar[Any] = ({"token_indices": [1, 3]},)
    exceptions: ClassVar[Any] = {"both_at_once_merge_as_they_run": "two adapters cannot both replace a row, which is refused"}

    def default_targets(self, model: nn.Module) -> list[str] | None:
        """The input embeddings, if the model tells them, or else what is called embed_tokens."""
        table: Any = None
        with suppress(NotImplementedError, AttributeError):
            table = model.get_input_embeddings()  # type: ignore[operator]
        modules = dict(model.named_modules())
        told = [n for n, m in modules.items() if m is table]
        return told or [n for n in modules if n.rpartition(".")[2] == "embed_tokens"] or None

    def check(self, site: Any) -> None:
        if not self.token_indices:
            raise ConfigError("token_indices is empty: name the tokens that train, such as token_indices=[5, 7].")
        rows = site.n_in if site.kind == "embedding" else site.n_out
        wrong = [i for i in self.token_indices if not 0 <= i < rows]
        if wrong:
            raise ConfigError(f"token_indices {wrong[:5]} lie outside the {rows} rows of {site.name!r}; resize the embeddings first.")
        if len(set(self.token_indices)) != len(self.token_indices):
            raise ConfigError("token_indices holds a token more than once.")

    def check_together(self, others: Sequence[Method]) -> None:
        for other in others:
            if twice := set(self.token_indices) & set(getattr(other, "token_indices", ())):
                raise RouteError(f"Two active adapters replace the same tokens {sorted(twice)[:5]}. Activate one of them.")

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        width = site.n_out if site.kind == "embedding" else site.n_in
        return {"trainable_tokens_delta": Leaf((len(self.token_indices), width), nn.init.normal_)}

    def start(self, site: Any, *, only_frozen: bool = False) -> Mapping[str, Tensor]:
        if only_frozen or not self.init_weights:
            return {}
        return {"trainable_tokens_delta": _table(site)[torch.tensor(self.token_indices, device=site.weight().device)].clone()}

    def tied(self) -> Mapping[str, tuple[str, bool]]:
        return {"trainable_tokens_delta": ("trainable_tokens_delta", False)}

    def change(self, p: Any, site: Any) -> Change:
        table, values = _table(site), p.trainable_tokens_delta
        index = torch.tensor(self.token_indices, device=values.device)
        order = torch.argsort(index)
        return Change(add=ReplaceRows(index[order], values[order], table[index[order]], table.shape[0], site.kind == "embedding"))


def _table(site: Any) -> Tensor:
    w: Tensor = site.weight()
    return w.T if site.kind == "embedding" else w
