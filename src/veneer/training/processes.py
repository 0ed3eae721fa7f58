"""A run on several processes, as torchrun and accelerate start them: which one this is, and rows that come out even."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

Row = Mapping[str, Any]


def processes() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the one that speaks and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def filler(rows: Sequence[Row]) -> dict[str, Any]:
    """A row like the first that counts for nothing: no label of it does."""
    row = dict(rows[0])
    return {**row, "labels": -100 if isinstance(row["labels"], int) else [-100] * len(row["labels"])}


def filled(rows: Sequence[Row], together: int) -> list[Row]:
    """The rows, and as many that count for nothing as make them a multiple of `together`."""
    return [*rows, *[filler(rows)] * (-len(rows) % together)] if rows else []


class Filled(Dataset[Row]):
    """Rows; those beyond the last count for nothing."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, self.filler = rows, filler(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        return self.rows[i] if i < len(self.rows) else self.filler


class Shuffled(Sampler[int]):
    """Every row once an epoch, in an order that hangs on seed and epoch alone, and then rows beyond the last up to a multiple of `together`.

    Args:
        together: how many rows all processes take at a time.
    """

    def __init__(self, rows: int, together: int, seed: int) -> None:
        self.rows, self.together, self.seed, self.epoch = rows, together, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows + -self.rows % self.together

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()
        yield from range(self.rows, len(self))
