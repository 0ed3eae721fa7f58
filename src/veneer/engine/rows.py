"""Batches whose rows have adapters of their own, and `generate`, in which a prompt may stand in several rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import RouteError
from .calls import ROWS
from .route import mixed


def named_rows(args: Sequence[Any], kwargs: dict[str, Any]) -> list[str] | None:
    """Take `adapter_names` out of the arguments; one name per row of the batch there must be."""
    rows = kwargs.pop("adapter_names", None)
    if rows is None:
        return None
    if isinstance(rows, str):
        raise RouteError(f"`adapter_names` is one name per row of the batch, as a list. For all rows: model.using({rows!r}).")
    named = next((kwargs[k] for k in ROWS if isinstance(kwargs.get(k), Tensor)), None)
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.ndim), None) if named is None else named
    # a plain model may have its batch second (nn.Transformer); the layers know
    if first is not None and len(rows) not in first.shape[: 1 if named is not None else 2]:
        raise RouteError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(rows)} and {first.shape[0]} respectively."
        )
    return list(rows)


def rows_per_prompt(model: Any, kwargs: Mapping[str, Any]) -> int:
    """How many rows of the batch each prompt becomes in `generate`."""
    return max(int(asked(model, kwargs, n) or 1) for n in ("num_beams", "num_return_sequences"))


def asked(model: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """An argument of `generate`, as given or configured."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)


@contextmanager
def expanded(root: nn.Module, model: Any, rows: list[str], copies: int) -> Iterator[None]:
    """Each prompt stands in `copies` rows one after another; in an encoder, in one."""
    with ExitStack() as stack:
        if copies > 1 and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            thread, inside = threading.get_ident(), ExitStack()

            def enter(*_: Any) -> None:
                if threading.get_ident() == thread:
                    inside.enter_context(mixed(root, rows))

            def leave(*_: Any) -> None:
                if threading.get_ident() == thread:
                    inside.close()

            encoder = model.get_encoder()
            stack.callback(encoder.register_forward_pre_hook(enter).remove)
            stack.callback(encoder.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(mixed(root, [r for r in rows for _ in range(copies)]))
        yield
