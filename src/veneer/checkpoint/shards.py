"""Weights of a whole model in safetensors files, one or several: read and written tensor by tensor, without ever holding two files' worth.

The format: https://huggingface.co/docs/safetensors: 8 bytes for the length of a JSON header, the header, the tensors' bytes one after another.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..errors import LoadError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CHUNK = 1 << 24


class Stored(NamedTuple):
    """Where a tensor lies.

    Attributes:
        file: the file.
        dtype: as the format calls it, such as `BF16`.
        shape: its sides.
        start, end: its bytes in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            LoadError: for a dtype that torch does not have.
        """
        if self.dtype not in DTYPES:
            raise LoadError(f"{self.file} holds a tensor in {self.dtype!r}, which is none of {', '.join(DTYPES)}.")
        out = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        with open(self.file, "rb") as f:
            f.seek(self.start)
            if f.readinto(memory(out)) != self.end - self.start:
                raise LoadError(f"{self.file} is shorter than its header says. Copy it again.")
        return out

    def copy_to(self, out: BinaryIO) -> None:
        """Append its bytes to a file, some at a time."""
        with open(self.file, "rb") as f:
            f.seek(self.start)
            left = self.end - self.start
            while left:
                part = f.read(min(left, _CHUNK))
                if not part:
                    raise LoadError(f"{self.file} is shorter than its header says. Copy it again.")
                out.write(part)
                left -= len(part)


class New(NamedTuple):
    """A tensor that is going to be made.

    Attributes:
        dtype, shape: as it will be.
        make: called when its place in the file has come.
    """

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def weights_in(folder: str | os.PathLike[str]) -> dict[str, Stored]:
    """Every tensor of a model's folder by name, file by file, in the order of the bytes.

    Raises:
        LoadError: if there are no safetensors files, one is missing or its header is no header.
    """
    root = Path(folder)
    if (root / INDEX).is_file():
        names = _indexed(root / INDEX)
    elif (root / SINGLE).is_file():
        names = [SINGLE]
    else:
        there = sorted(p.name for p in root.glob("*.bin")) if root.is_dir() else []
        raise LoadError(
            f"{folder} has neither {SINGLE} nor {INDEX}."
            + (
                f" It has {', '.join(there[:3])}: load the model and save it with save_pretrained, which writes safetensors."
                if there
                else ""
            )
        )
    out: dict[str, Stored] = {}
    for name in names:
        for key, stored in _entries(root / name):
            if key in out:
                raise LoadError(f"{key!r} is in {out[key].file.name} and in {name}.")
            out[key] = stored
    return out


def _indexed(index: Path) -> list[str]:
    """The files that an index names, which stand beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if outside := [n for n in names if Path(n).name != n]:
            raise ValueError(f"{outside[0]!r} is no name of a file beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise LoadError(f"{index} is no index of safetensors files ({type(e).__name__}: {e}). Copy it again.") from e
    return names


def _entries(file: Path) -> Iterator[tuple[str, Stored]]:
    try:
        size = file.stat().st_size
        with open(file, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > size - 8:
                raise ValueError("its header ends after the file")
            header = json.loads(f.read(length))
        found = {k: v for k, v in header.items() if k != "__metadata__"}
        for key, v in sorted(found.items(), key=lambda item: item[1]["data_offsets"][0]):
            start, end = (8 + length + n for n in v["data_offsets"])
            if end > size:
                raise ValueError(f"{key!r} ends after the file")
            yield key, Stored(file, v["dtype"], tuple(v["shape"]), start, end)
    except (OSError, ValueError, KeyError, struct.error) as e:
        raise LoadError(f"{file} is no whole safetensors file ({e}). Copy it again.") from e


def write_shard(path: Path, tensors: Mapping[str, Stored | New], metadata: Mapping[str, str] | None = None) -> int:
    """Write a safetensors file, one tensor at a time; returns the bytes of its tensors."""
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at = 0
    for name, t in tensors.items():
        size = t.end - t.start if isinstance(t, Stored) else math.prod(t.shape) * DTYPES[t.dtype].itemsize
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            if isinstance(t, Stored):
                t.copy_to(f)
                continue
            made = t.make().detach().cpu().contiguous()
            if DTYPES[t.dtype] != made.dtype or tuple(made.shape) != t.shape:
                raise ValueError(f"{path.name}: a tensor became {made.dtype} {tuple(made.shape)}, and was to be {t.dtype} {t.shape}")
            f.write(memory(made))
        f.flush()
        os.fsync(f.fileno())
    return at


def write_index(folder: Path, shards: Mapping[str, Sequence[str]], size: int) -> None:
    """Write the index of several files: which tensor is in which."""
    where = {name: shard for shard, names in shards.items() for name in names}
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def memory(t: Tensor) -> Any:
    """The memory of a contiguous tensor, as a buffer; good as long as the tensor is."""
    return (ctypes.c_ubyte * (t.numel() * t.itemsize)).from_address(t.data_ptr()) if t.numel() else bytearray()
