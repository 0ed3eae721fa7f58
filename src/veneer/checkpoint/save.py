"""Writing adapter files: what was trained is what is written, or nothing is."""

from __future__ import annotations

import base64
import copy
import hashlib
import os
import struct
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..engine.layer import adapted_layers
from ..engine.route import find_switch
from ..engine.steps import check_saving
from ..errors import LoadError, SaveError, hint
from ..sharding import is_flat, whole
from .base import BASE_KEY, SCALING_KEY, START_KEY, fingerprint, scaling_text
from .keys import Slot, adapter_names, base_root, memory_of, slots
from .load import BIN_NAME, SAFETENSORS_NAME, START_NAME, config_of, read_safetensors
from .match import match
from .nested import NESTING, NESTING_KEY
from .shards import memory

DIGEST_KEY, NORMS_KEY = "veneer_digest", "veneer_norms"


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter, by their keys in a file. They share memory with the model, but not with each other: of what layers have in common,
    all but the first are copies, since other libraries that save them cannot do with less. Those spread over processes (DTensor, ZeRO-3) come
    whole, for which all processes have to call this.

    Args:
        model: a PeftModel; or a model with injected adapters, whose keys then have no `base_model.model.`, as with PEFT.
        state_dict: take the tensors from this state dict of the model instead; it may come from a compiled, DDP or FSDP wrapper.
        unwrap_compiled: taken for PEFT's sake; names of compiled models are understood always.
        save_embedding_layers: whether embeddings are included; "auto": where the adapter targets them or the vocabulary was resized.

    Raises:
        SaveError: if a tensor of the adapter is missing or has another shape. Never returns an empty dict.
        RouteError: if there is no such adapter.
    """
    config = config_of(model, adapter_name)
    check_saving(find_switch(model), adapter_name)
    found = slots(model, adapter_name, config, prefix="", save_embedding_layers=save_embedding_layers)
    return _apart(_encoded(config, _collect(model, found, adapter_name, state_dict, save_embedding_layers is True)))


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, copies where one is there already."""
    seen: set[tuple[Any, ...]] = set()
    out = {}
    for key, t in tensors.items():
        where = memory_of(t)
        out[key] = t.clone() if where in seen else t
        seen.add(where)
    return out


def save_adapter(
    model: nn.Module,
    config: Any,
    adapter_name: str,
    directory: str | os.PathLike[str],
    *,
    safe_serialization: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    verify: bool = False,
    is_main_process: bool = True,
) -> Path | None:
    """Write an adapter's tensors and its config into a folder. Nothing is asked of the network.

    Everything is checked before the first byte is written. Each file is written beside its place and moved there when it is complete: a
    process that dies in between leaves the old files as they were.

    Args:
        directory: the adapter's own folder (see `folder_of`).
        safe_serialization: False: `adapter_model.bin`, for old readers.
        state_dict: take the tensors from this state dict of the model, such as one gathered from a sharded model.
        verify: read the file again and compare it before it takes its place.
        is_main_process: False: take part in gathering sharded tensors, and write nothing.

    Returns:
        The file, or None if `is_main_process` is False.

    Raises:
        SaveError: if a tensor is missing, empty, on the meta device, not finite or of another shape, or the disk refuses.
    """
    check_saving(find_switch(model), adapter_name)
    found = slots(model, adapter_name, config, save_embedding_layers=save_embedding_layers)
    tensors = _encoded(config, _collect(model, found, adapter_name, state_dict, save_embedding_layers is True))
    start = {k: s.value() for k, s in slots(model, adapter_name, config, start=True).items()}
    if not is_main_process:
        return None
    base = fingerprint(base_root(model))
    return write_adapter(
        tensors,
        config,
        directory,
        start=start,
        metadata={BASE_KEY: base, NESTING_KEY: NESTING} if base else {},
        empty_ones=_empty_ones(model, found, adapter_name),
        safe_serialization=safe_serialization,
        verify=verify,
    )


def write_adapter(
    tensors: Mapping[str, Tensor],
    config: Any,
    directory: str | os.PathLike[str],
    *,
    start: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    empty_ones: Collection[str] = (),
    safe_serialization: bool = True,
    verify: bool = False,
) -> Path:
    """Write tensors under these very keys, and the config, as an adapter's folder: `save_adapter` without a model.

    Args:
        empty_ones: keys of tensors that have no numbers by design, as a rotation of one coordinate.

    Raises:
        SaveError: if there are no tensors, or one is empty, on the meta device or not finite, or the disk refuses.
    """
    check_tensors(tensors, empty_ones)
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"{str(folder)!r} should be a folder, and is a file. Give another name.")
    ready, ready_start = _separate(tensors), _separate(start or {})
    notes = {"format": "pt", SCALING_KEY: scaling_text(config), DIGEST_KEY: digest(ready), NORMS_KEY: _norms(ready), **(metadata or {})}
    if ready_start:
        check_tensors(ready_start)
        notes[START_KEY] = START_NAME
    written, other = (SAFETENSORS_NAME, BIN_NAME) if safe_serialization else (BIN_NAME, SAFETENSORS_NAME)
    saved = copy.copy(config)
    saved.inference_mode = True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as beside:
            saved.save_pretrained(beside)
            with ExitStack() as together:  # one is of no use without the other
                _write(together, folder / written, ready, notes, verify)
                if ready_start:
                    _write(together, folder / START_NAME, ready_start, {"format": "pt"}, verify)
            for file in Path(beside).iterdir():
                file.replace(folder / file.name)
        # a reader would take what an earlier save left in the other format, or its start values, for this adapter's
        (folder / other).unlink(missing_ok=True)
        if not ready_start:
            (folder / START_NAME).unlink(missing_ok=True)
    except OSError as e:
        raise SaveError(f"The adapter could not be written to {str(folder)!r}: {e}. No file that was there has been cut off.") from e
    return folder / written


def folder_of(directory: str | os.PathLike[str], adapter_name: str) -> Path:
    """Where an adapter stands in a folder of several: `default` in the folder itself, others in a subfolder of their name.

    Raises:
        SaveError: if the name is no name for a folder.
    """
    if adapter_name == "default":
        return Path(directory)
    if adapter_name in ("", ".", "..") or "/" in adapter_name or os.sep in adapter_name or "\0" in adapter_name:
        raise SaveError(
            f"The adapter {adapter_name!r} has no folder of its own: its name cannot be a folder's. Save it alone, under another name."
        )
    return Path(directory, adapter_name)


# ---------------------------------------------------------------- what is written


def _collect(
    model: nn.Module, found: Mapping[str, Slot], adapter: str, state_dict: Mapping[str, Tensor] | None, all_embeddings: bool
) -> dict[str, Tensor]:
    """The tensor of every slot that is to be written."""
    if not any(s.required for s in found.values()):
        known = adapter_names(model)
        names = ", ".join(map(repr, known)) or "none"
        raise SaveError(f"The adapter {adapter!r} has no tensors in this model. Its adapters: {names}.{hint(adapter, known)}")
    wanted = {k: s for k, s in found.items() if s.saved}
    if state_dict is None:
        if not is_flat(model):
            return {k: s.value() for k, s in wanted.items()}
        state_dict = model.state_dict()  # the only way to whole tensors under FSDP1
    given = {
        wanted_key: state_dict[name] for name, wanted_key in match(state_dict, found, foreign=False).slot_of.items() if wanted_key in wanted
    }
    given |= {k: s.kept for k, s in wanted.items() if s.kept is not None}  # a merged model's state dict has other values
    missing = [k for k, s in wanted.items() if k not in given and (s.required or all_embeddings)]
    if missing:
        some = ", ".join(map(repr, missing[:3])) + ", ..." * (len(missing) > 3)
        example = next(iter(state_dict), None)
        raise SaveError(
            f"The state dict lacks {len(missing)} of the {len(wanted)} tensors of the adapter {adapter!r}: {some}. "
            + (f"Its names look like {example!r}. " if example is not None else "It is empty. ")
            + "Pass the state dict of the whole model, or none."
        )
    wrong = [(k, tuple(t.shape), wanted[k].shape) for k, t in given.items() if tuple(t.shape) != wanted[k].shape]
    if wrong and not any(s.tensor.numel() == 0 for s in wanted.values()):  # with shards in the model, only the state dict knows shapes
        key, theirs, ours = wrong[0]
        raise SaveError(
            f"{len(wrong)} tensors of the state dict have another shape than the adapter's, such as {key!r}: {theirs} instead of {ours}. "
            "Were they gathered from all processes?"
        )
    return {k: whole(given[k]).detach() for k in wanted if k in given}


def _encoded(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the method writes them, if it has a form of its own."""
    encode = getattr(config, "to_file", None)
    return encode(tensors) if encode is not None else tensors


def _empty_ones(model: nn.Module, found: Mapping[str, Slot], adapter: str) -> list[str]:
    """The keys of tensors that have no numbers by design."""
    here = [layer.attached[adapter] for _, layer in adapted_layers(model) if adapter in layer.attached]
    places = {(id(a.source[n][0]), a.source[n][1]) for a in here for n, leaf in a.leaves.items() if 0 in leaf.shape and n in a.source}
    return [k for k, s in found.items() if (id(s.owner._parameters), s.attribute) in places]


def check_tensors(tensors: Mapping[str, Tensor], empty_ones: Collection[str] = ()) -> None:
    """Raise SaveError unless there are tensors, and all of them are there, not empty (but for `empty_ones`, which have no numbers by design) and finite."""
    if not tensors:
        raise SaveError("There are no tensors to save: the adapter would be empty. Nothing was written.")
    meta = [k for k, t in tensors.items() if t.is_meta]
    if meta:
        raise SaveError(
            f"{_some(meta)} on the meta device: there are no values to save. Load the adapter first (low_cpu_mem_usage leaves it empty)."
        )
    empty = [k for k, t in tensors.items() if t.ndim == 1 and t.numel() == 0 and k not in empty_ones]
    if empty:
        raise SaveError(
            f"{_some(empty)} of size 0: the values are on other processes (ZeRO-3, FSDP). Gather them first "
            "(deepspeed.zero.GatheredParameters), or pass the gathered state_dict."
        )
    bad = [k for k, t in tensors.items() if (t.is_floating_point() or t.is_complex()) and not finite(t)]
    if bad:
        raise SaveError(
            f"{_some(bad)} not finite (NaN or inf): the training has diverged. Nothing was written; go back to an earlier checkpoint."
        )


def finite(t: Tensor) -> bool:
    """Whether all numbers are, of a tensor of any floating dtype."""
    return bool(torch.isfinite(t if t.dtype.itemsize >= 2 else t.float()).all())


def _some(keys: list[str]) -> str:
    shown = ", ".join(map(repr, keys[:3])) + ", ..." * (len(keys) > 3)
    return f"{shown} {'is' if len(keys) == 1 else 'are'}"


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and none sharing memory with another."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, t in tensors.items():
        t = t.detach().to("cpu").contiguous()
        storage = t.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != t.numel() * t.itemsize:
            t = t.clone()
        seen.add(t.untyped_storage().data_ptr())
        out[key] = t
    return out


# ---------------------------------------------------------------- files


def _write(together: ExitStack, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], verify: bool) -> None:
    """Write a file beside its place, which it takes when `together` ends."""
    beside = together.enter_context(replacing(path))
    try:
        if path.suffix == ".safetensors":
            save_file(tensors, beside, metadata=metadata)
        else:
            torch.save(tensors, beside)
    except (SafetensorError, RuntimeError) as e:  # how the two report a full disk
        raise OSError(str(e)) from e
    if verify:
        _compare(beside, tensors, path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; when the block ends, the file is flushed to the disk and takes the place of `path`.

    If the block raises, the file beside is removed and `path` is as it was.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{path.suffix}")
    try:
        beside.touch(exist_ok=False)
        mode = (path if path.exists() else beside).stat().st_mode & 0o777
        yield beside
        with beside.open("rb+") as f:
            os.fsync(f.fileno())
        beside.chmod(mode)  # safetensors makes files that only their owner can read
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    if os.name == "posix":  # the new name itself
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _compare(beside: Path, tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        again = read_safetensors(beside)[0] if path.suffix == ".safetensors" else torch.load(beside, weights_only=True)
    except LoadError as e:
        raise SaveError(f"{path} could not be read again after writing: {e}") from e
    if set(again) != set(tensors) or digest(again) != digest(tensors):
        raise SaveError(f"{path} read again holds other values than those written. The disk may be failing; the old file is as it was.")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and bits of CPU tensors."""
    h = hashlib.blake2b(digest_size=16)
    for key in sorted(tensors):
        t = tensors[key].detach().contiguous()
        h.update(f"{key}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        if t.numel():
            h.update(memory(t))
    return h.hexdigest()


def _norms(tensors: Mapping[str, Tensor]) -> str:
    """The 2-norm of each tensor, in the order of their sorted names: little-endian float32, base64."""
    norms = [float(torch.linalg.vector_norm(_real(tensors[k]))) for k in sorted(tensors)]
    return base64.b64encode(struct.pack(f"<{len(norms)}f", *(min(n, 3.4e38) for n in norms))).decode()


def _real(t: Tensor) -> Tensor:
    return (torch.view_as_real(t) if t.is_complex() else t).to(torch.float64)
