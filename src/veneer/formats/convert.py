"""From any format to any."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..engine.defaults import CONFIG_NAME
from ..errors import ConversionError, LoadError, SaveError, hint
from . import diffusers, gguf, kohya, mlx, peft
from .adapter import COMPONENTS, Adapter, one_scale, padded


@dataclass(frozen=True)
class Format:
    """How a format is recognised, read (`read(path, model=)`) and written (`write(adapter, path, notes, model=)`)."""

    recognises: Callable[[Path], bool]
    read: Callable[..., Adapter]
    write: Callable[..., None]


FORMATS = {
    module.__name__.rpartition(".")[2]: Format(module.recognises, module.read, module.write)
    for module in (peft, mlx, gguf, kohya, diffusers)
}


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        source: the format that was read.
        to: the format that was written.
        layers: their number, by component ("": a model by itself).
        notes: what is not as it was, and how much; empty: the way back gives the same bits.
    """

    source: str
    to: str
    layers: dict[str, int]
    notes: list[str] = field(default_factory=list)


def detect(path: str | os.PathLike[str]) -> str:
    """The name of the format of a file or folder.

    Raises:
        LoadError: if it is none of them.
    """
    p = Path(path)
    if not p.exists():
        raise LoadError(f"There is no {str(p)!r}.")
    try:
        for name, format in FORMATS.items():
            if format.recognises(p):
                return name
    except SafetensorError as e:
        raise LoadError(f"{str(p)!r} cannot be read: {e}. It is damaged or was not written to its end. Download or save it again.") from e
    raise LoadError(
        f"{str(p)!r} is no adapter in a format that is known: {', '.join(FORMATS)}. Formats are told by adapter_config.json "
        "with adapter_model or adapters.safetensors, by the mark of GGUF, and by the keys of a .safetensors file."
    )


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    model: str | os.PathLike[str] | None = None,
    component: str | None = None,
    rank: int | None = None,
    uniform: bool = False,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Write an adapter in another format. The tensors keep their bits, where the notes do not say otherwise.

    Args:
        source: an adapter of one of `FORMATS`.
        out: the file (kohya, gguf, diffusers) or the folder (peft, mlx, diffusers) to write.
        to: one of `FORMATS`.
        model: the base model's folder: for GGUF its config.json, for kohya's names a diffusers pipeline.
        component: what a model's adapter is in a pipeline, such as "unet"; or which of a file's adapters to take.
        rank: pad every layer to this rank with zeros, for runtimes that serve certain ranks.
        uniform: one rank and one alpha for all layers of a model, for runtimes that know no others; what differs goes into B.
        dtype: cast the factors.

    Raises:
        LoadError: if the source cannot be read.
        ConversionError: if the other format has no place for what the source holds. Nothing is written then.
        SaveError: if it cannot be written.
    """
    if to not in FORMATS:
        raise ConversionError(f"There is no format {to!r}; there are: {', '.join(FORMATS)}.{hint(to, FORMATS)}")
    name = detect(source)
    _check_out(Path(source), Path(out))
    base = None if model is None else Path(model)
    adapter = _chosen(FORMATS[name].read(Path(source), model=base), component, to)
    notes: list[str] = []
    for part in adapter.values():
        if uniform and rank is None and part.layers:
            rank = max(f.rank for f in part.layers.values())
        if rank is not None:
            too_big = [p for p, f in part.layers.items() if f.rank > rank]
            if too_big:
                raise ConversionError(
                    f"{too_big[0]!r} has rank {part.layers[too_big[0]].rank}, more than {rank}. To cut ranks, and know what is lost: "
                    "veneer.save_as_lora(path, model, rank)."
                )
            wider = sum(f.rank < rank for f in part.layers.values())
            part.layers = {p: padded(f, rank) for p, f in part.layers.items()}
            notes += [f"{wider} layers were padded with zeros to rank {rank}; the change is the same."] if wider else []
        if uniform:
            part.layers = one_scale(part.layers, "alpha", notes)
        if dtype is not None:
            cast = [f for f in part.layers.values() if f.down.dtype != dtype]
            part.layers = {p: replace(f, down=f.down.to(dtype), up=f.up.to(dtype)) for p, f in part.layers.items()}
            notes += [f"{len(cast)} layers were cast from {cast[0].down.dtype} to {dtype}."] if cast else []
    try:
        FORMATS[to].write(adapter, Path(out), notes, model=base)
    except (OSError, SafetensorError) as e:  # the latter is how a full disk is told
        raise SaveError(f"{str(out)!r} could not be written: {e}") from e
    return Conversion(name, to, {c: len(p.layers) for c, p in adapter.items()}, notes)


def _check_out(source: Path, out: Path) -> None:
    """Raise ConversionError if what is written would take the place of an adapter that is there: its config would be lost."""
    there = next(
        (f for f in (out, *(out / c for c in COMPONENTS)) if (f / CONFIG_NAME).exists()), out if out.resolve() == source.resolve() else None
    )
    if there is not None:
        raise ConversionError(f"{str(there)!r} holds an adapter already, which is not overwritten. Give another name.")


def _chosen(adapter: Adapter, component: str | None, to: str) -> Adapter:
    """The adapter under the component's name, or the one component of several."""
    if component is not None and component not in COMPONENTS:
        raise ConversionError(f"There is no component {component!r}: {', '.join(COMPONENTS)}.{hint(component, COMPONENTS)}")
    single = to in ("mlx", "gguf")
    if component is None:
        return adapter
    if component in adapter:
        return {"" if single else component: adapter[component]}
    if list(adapter) == [""]:
        return {component: adapter[""]}
    raise ConversionError(f"The source has adapters of {', '.join(adapter)}, none of {component!r}.")
