"""A block of a stack: hidden states in, hidden states out, and whatever else it takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import ConfigError
from .module import CONTAINERS
from .whole import Rows, WholeSite, first_of, put, taken


class BlockSite(WholeSite):
    """The hidden states are the first argument (or `hidden_states`) and the first output, (batch, tokens, width).

    Raises:
        ConfigError: if the width cannot be told from the block's norms.
    """

    kind: ClassVar[str] = "block"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        norms = [w for child in module.children() if isinstance(w := getattr(child, "weight", None), Tensor) and w.ndim == 1]
        width = len(norms[0]) if norms else getattr(module, "hidden_size", None)
        if not isinstance(width, int):
            raise ConfigError(
                f"The width of the hidden states of a {type(module).__name__} cannot be told: it has no norms and no hidden_size."
            )
        self.n_in = self.n_out = width

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return not isinstance(module, CONTAINERS) and any(True for _ in module.children())

    def run(self, module: nn.Module, effects: Sequence[tuple[Any, Rows]], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        for effect, rows in effects:
            hidden = put(hidden, rows, effect.before(taken(hidden, rows)))
        output = module(hidden, *args[1:], **kwargs) if args else module(**{**kwargs, "hidden_states": hidden})
        left = first_of(output)
        for effect, rows in effects:
            effect.after(taken(left, rows))
        return output
