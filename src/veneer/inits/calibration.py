"""What the starts from data share: the layers they look at, and the files they keep their findings in."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, LoadError, hint


def targets(model: nn.Module, config: Any) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers that a config hits in a model without adapters."""
    from ..engine.select import select
    from ..sites import supported

    yield from select(model, config, supports=lambda m: supported(m) == "linear").modules.items()


def check_reached(names: Collection[str], seen: Collection[str], what: str) -> None:
    """Raise ConfigError if a target was never reached by what the user ran."""
    silent = [n for n in names if n not in seen]
    if silent:
        raise ConfigError(f"{what} {silent[0]!r}{f' and {len(silent) - 1} more' if silent[1:] else ''}; every target has to be reached.")


def read(path: str | None, needed: list[str]) -> dict[str, Tensor] | None:
    """The tensors of a file by name, or None if there is no such file.

    Raises:
        LoadError: if it is no file of tensors, or lacks one of `needed`.
    """
    if path is None or not Path(path).exists() or Path(path).stat().st_size == 0:
        return None
    try:
        found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise LoadError(f"{path} is no file of tensors: {e}") from e
    missing = [n for n in needed if n not in found]
    if missing:
        raise LoadError(
            f"{path} has no {missing[0]!r} ({len(missing)} of {len(needed)} are missing).{hint(missing[0], found)} "
            "It was made for another model or config; delete it to compute it anew."
        )
    return found


def write(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    beside = f"{path}.{os.getpid()}.part"
    torch.save(dict(tensors), beside)
    os.replace(beside, path)
