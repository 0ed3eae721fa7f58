"""A model's safetensors files read and written tensor by tensor: headers first, then one tensor's bytes after the other."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import LoadError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PIECE = 1 << 24  # bytes that are copied at a time
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

Write = Callable[[Tensor], object]


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: its dtype as the file names it, its shape, and where its bytes are."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> Tensor:
        """The tensor as a view of the mapped file, whose pages the system may drop again.

        Raises:
            LoadError: for a dtype that cannot be computed with.
        """
        if self.dtype not in _DTYPES:
            raise LoadError(
                f"{self.path.name} holds a tensor of type {self.dtype}, which cannot be merged into. Known: {', '.join(_DTYPES)}."
            )
        dtype, size = _DTYPES[self.dtype], self.end - self.start
        if not size:
            return torch.empty(self.shape, dtype=dtype)
        from mmap import ACCESS_COPY, mmap

        with self.path.open("rb") as f:
            whole = mmap(f.fileno(), 0, access=ACCESS_COPY)
        count = size // dtype.itemsize
        return torch.frombuffer(whole, dtype=dtype, offset=self.start, count=count).view(self.shape)

    def copy_to(self, out: BinaryIO) -> None:
        """Its bytes as they are."""
        with self.path.open("rb") as f:
            f.seek(self.start)
            left = self.end - self.start
            while left:
                piece = f.read(min(_PIECE, left))
                if not piece:
                    raise LoadError(f"{self.path} is shorter than its header says: it is damaged. Get it again.")
                out.write(piece)
                left -= len(piece)


def model_files(folder: Path) -> list[str]:
    """The names of a model folder's safetensors files, in order.

    Raises:
        LoadError: if there are none, or one of them is missing.
    """
    index = folder / INDEX
    table = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {"": SINGLE}
    names = sorted(set(table.values()))
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise LoadError(
            f"{folder} has no {missing[0]}. A merge from file to file takes a folder with safetensors files, as save_pretrained writes it."
        )
    return names


def header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """(the tensors of a file by name, in the order of their bytes; its metadata).

    Raises:
        LoadError: if it is no safetensors file.
    """
    try:
        with path.open("rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            table: dict[str, Any] = json.loads(f.read(size))
    except (struct.error, ValueError, MemoryError, OverflowError) as e:
        raise LoadError(f"{path} is no safetensors file, or a damaged one: {e}") from None
    metadata = table.pop("__metadata__", {})
    at = 8 + size
    found = {n: Stored(path, t["dtype"], tuple(t["shape"]), at + t["data_offsets"][0], at + t["data_offsets"][1]) for n, t in table.items()}
    return dict(sorted(found.items(), key=lambda item: item[1].start)), metadata


def write(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str], fill: Callable[[str, Write], bool]) -> None:
    """Write a file with the same tensors, shapes and dtypes.

    Args:
        fill: gets a name and a function that writes a tensor (pieces one after another, contiguous); False: the bytes are to be copied as they are.
    """
    at, table = 0, {}
    for name, t in tensors.items():
        table[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at := at + t.end - t.start]}
    text = json.dumps({"__metadata__": dict(metadata), **table} if metadata else table).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, t in tensors.items():
            before = out.tell()
            if not fill(name, lambda piece: out.write(_bytes(piece))):
                t.copy_to(out)
            if out.tell() - before != t.end - t.start:
                raise LoadError(f"{name} would be written with another size than it has in {t.path}.")


def _bytes(t: Tensor) -> Any:
    raw: Any = t.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def names_of(files: Iterable[Mapping[str, Stored]]) -> dict[str, Stored]:
    """All tensors of several files, by name."""
    return {n: t for tensors in files for n, t in tensors.items()}
