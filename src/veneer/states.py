"""Training states of several processes: each writes its own pieces, and any number of processes reads them in any layout.

A folder of states holds one subfolder that the file `current.json` names. The next is written beside it and becomes the current one when that small file is
replaced, so a process that dies at any moment leaves the last complete state as it was.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from .checkpoint.keys import Slot, adapter_names, slots
from .checkpoint.load import config_of
from .checkpoint.match import plain
from .checkpoint.save import replacing
from .engine.route import find_switch
from .engine.steps import carried, carry_on, paused
from .errors import LoadError, SaveError, hint
from .sharding import kept_by_zero

CURRENT = "current.json"
_METHODS = "methods."  # what methods remember from step to step: "methods.<adapter>/<name>"; states of before have none


def save_state(
    model: nn.Module, optimizer: Optimizer | None, folder: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write all adapters of a model in training, the optimizer's state and what methods remember from step to step (AdaLoRA's averages), each process its
    pieces. All processes have to call this.

    Args:
        model: the model as it is called: in DDP's or FSDP1's wrapper, sharded in place, cut by a plan, or plain, without any other process.
        optimizer: None for the adapters' tensors alone.
        folder: of the states; the state before stays until this one is complete, and is then removed.
        extra: what else belongs to the run (the step, a scheduler's state dict), as JSON has it; `load_state` returns what rank 0 gave.

    Returns:
        The subfolder that is current now.

    Raises:
        SaveError: if the model has no adapter, DeepSpeed keeps its tensors (ZeRO-3) or the optimizer's (all stages), or a process could not write; the
            state before is then as it was.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    root = Path(folder)
    _check_engine(model, optimizer, SaveError, "save_checkpoint")
    try:
        note = json.dumps({"extra": dict(extra or {})})
    except (TypeError, ValueError) as e:
        raise SaveError(f"`extra` has to be what JSON can hold (numbers, text, lists, dicts with text for keys): {e}.") from e
    state = _state(model, optimizer, SaveError)
    if optimizer is not None:
        state["methods"] = carried(find_switch(model))
    place = root / "a new subfolder"
    try:
        place = root / _first_does(lambda: _begin(root))
        with _quiet():
            save(state, checkpoint_id=place)
        _first_does(lambda: _settle(root, place.name, note))
    except (OSError, RuntimeError, CheckpointException) as e:  # gloo and NCCL tell of a process that is gone by a RuntimeError
        raise SaveError(
            f"The state could not be written to {str(place)!r}: {_cause(e)}. What {str(root / CURRENT)!r} names is as it was."
        ) from e
    return place


def load_state(model: nn.Module, optimizer: Optimizer | None, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_state` wrote, on any number of processes and in any layout. All processes have to call this.

    Args:
        model: with the same adapters, made and wrapped as for training.
        optimizer: over this model's trained parameters, of the kind that was saved; None to take the adapters' tensors alone.

    Returns:
        `extra`, as it was given to `save_state`.

    Raises:
        LoadError: if there is no complete state or it is damaged, the model or optimizer needs what the state lacks or has in another shape, or DeepSpeed
            keeps their tensors; nothing is changed.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    root = Path(folder)
    _check_engine(model, optimizer, LoadError, "load_checkpoint")
    name = name_of_current(root)
    if name is None or not (root / name / ".metadata").is_file():
        raise LoadError(
            f"{str(root)!r} holds no complete state: `save_state` has not been through there. Start anew, or name another folder."
        )
    place = root / name
    state = _state(model, optimizer, LoadError)
    held = FileSystemReader(place).read_metadata().state_dict_metadata
    _check(state, held, place)
    if optimizer is not None:
        of_methods: dict[str, Any] = {k.removeprefix(_METHODS): m for k, m in held.items() if k.startswith(_METHODS)}
        state["methods"] = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in of_methods.items()}
    state = tree_map_only(Tensor, _copied, state)  # what is read goes into these, piece by piece, and a file may be damaged
    try:
        with _quiet():
            load(state, checkpoint_id=place)
    except (OSError, RuntimeError, CheckpointException) as e:
        raise LoadError(f"The state in {str(place)!r} could not be read: {_cause(e)}.") from e
    options = StateDictOptions(strict=False)
    if optimizer is not None:
        carry_on(find_switch(model), state["methods"])
    with _quiet(), paused():
        set_model_state_dict(model, state["adapters"], options=options)
        if optimizer is not None:
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    with torch.no_grad():
        for key, slot in _slots(model).items():
            if _apart(slot):
                slot.tensor.copy_(state["adapters"][key])
    extra: dict[str, Any] = json.loads((root / CURRENT).read_text(encoding="utf-8"))["extra"]
    return extra


def name_of_current(root: Path) -> str | None:
    """The subfolder with the complete state, if there is one."""
    pointer = root / CURRENT
    return str(json.loads(pointer.read_text(encoding="utf-8"))["state"]) if pointer.is_file() else None


def _state(model: nn.Module, optimizer: Optimizer | None, error: type[Exception]) -> dict[str, Any]:
    """The adapters' tensors by their names in memory, whatever wrappers there are, and the optimizer's state under the same names; pieces stay pieces."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    found, names = _slots(model), adapter_names(model)
    with _quiet(), paused():
        tensors = {k: t for k, t in get_model_state_dict(model).items() if plain(k) in found}
        tensors |= {k: s.tensor.clone() for k, s in found.items() if _apart(s)}
        here = {plain(k) for k in tensors}
        lost = [k for k, s in found.items() if s.required and s.tied_with is None and k not in here]
        if not tensors or lost:
            what = f"lacks {lost[0]!r}" if lost else "has no tensors of an adapter"
            raise error(
                f"The model {what}. Its adapters: {', '.join(map(repr, names)) or 'none'}. Pass the model that holds them, in its wrapper."
            )
        state: dict[str, Any] = {"adapters": tensors}
        if optimizer is not None:
            new = not optimizer.state
            state["optimizer"] = get_optimizer_state_dict(model, optimizer)
            for values in (*optimizer.state.values(), *state["optimizer"]["state"].values()) if new else ():
                values.update({"step": 0 * values["step"]} if "step" in values else {})  # torch counts the one with which it finds out
    return state


def _check_engine(model: nn.Module, optimizer: Optimizer | None, error: type[LoadError | SaveError], instead: str) -> None:
    """Raise the error if DeepSpeed keeps what is asked for: the numbers under ZeRO-3, the optimizer's state under ZeRO-1 and ZeRO-2 as well."""
    if any(kept_by_zero(p, state=optimizer is not None) for p in model.parameters()):
        what = (
            f"DeepSpeed's ZeRO keeps these tensors in pieces of its own. Use the engine's {instead}(folder, ...); see docs/distributed.md."
        )
        raise error(what if optimizer is None else f"{what} `save_pretrained` writes the adapter alone, on every layout.")


def _slots(model: nn.Module) -> dict[str, Slot]:
    """All that belongs to adapters, by its name in memory without wrappers."""
    names = adapter_names(model)
    every = [s for n in names for start in (False, True) for s in slots(model, n, config_of(model, n), start=start).values()]
    return {plain(s.memory_key): s for s in every if s.saved}


def _copied(t: Any) -> Any:
    """A copy in memory of its own. FSDP1's pieces (ShardedTensor) know no `clone`."""
    return copy.deepcopy(t) if hasattr(t, "local_shards") else t.detach().clone()


def _apart(slot: Slot) -> bool:
    """Whether torch leaves it out of a model's state dict."""
    return slot.attribute in slot.owner._non_persistent_buffers_set


def _check(state: Mapping[str, Any], held: Mapping[str, Any], place: Path) -> None:
    """Raise LoadError if something needed is not held, or has another shape."""
    there = {k.removeprefix("adapters."): tuple(m.size) for k, m in held.items() if k.startswith("adapters.")}
    for key, t in state["adapters"].items():
        if key not in there:
            raise LoadError(
                f"The state in {str(place)!r} lacks the adapter's tensor {key!r}.{hint(key, there)} Make the same adapters as when it was saved."
            )
        if there[key] != tuple(t.size()):
            raise LoadError(
                f"{key!r} has shape {there[key]} in {str(place)!r}, and {tuple(t.size())} in the model. Make the adapter with the same config."
            )
    if "optimizer" not in state:
        return
    kept = {k for k in held if k.startswith("optimizer.state.")}
    for name, values in state["optimizer"]["state"].items():
        for value in values:
            if f"optimizer.state.{name}.{value}" not in kept:
                raise LoadError(
                    f"The state in {str(place)!r} has no {value!r} of the optimizer for {name!r}: it was saved without an optimizer, with another kind, or "
                    "when this tensor did not train. Make the optimizer as it was, or pass None to take the adapters alone."
                )


def _begin(root: Path) -> str:
    """The name of the next state, in a folder without what a process that died has left."""
    root.mkdir(parents=True, exist_ok=True)
    before = name_of_current(root)
    for left in root.glob("state-*"):
        if left.name != before:
            shutil.rmtree(left)
    return f"state-{int(before.rpartition('-')[2]) + 1 if before else 1}"


def _settle(root: Path, name: str, note: str) -> str:
    """Make a complete state the current one, and remove the others."""
    with replacing(root / CURRENT) as beside:
        beside.write_text(json.dumps({"state": name, **json.loads(note)}), encoding="utf-8")
    for old in root.glob("state-*"):
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)
    return name


def _first_does(action: Callable[[], str]) -> str:
    """What the first process gets from doing something to the folder, told to all.

    Raises:
        OSError: on every process, if it fails there.
    """
    several = dist.is_available() and dist.is_initialized()
    said: list[Any] = [None, None]
    if not several or dist.get_rank() == 0:
        try:
            said[0] = action()
        except OSError as e:
            said[1] = str(e)
    if several:
        dist.broadcast_object_list(said)
    if said[1] is not None:
        raise OSError(said[1])
    return str(said[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's notes on its own deprecated functions, and on there being one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _cause(e: BaseException) -> str:
    """The first line of what is behind an error."""
    failures = getattr(e, "failures", None) or {}
    inner = next((str(f[0]) for f in failures.values()), str(e))
    return next(iter(inner.strip().splitlines()), type(e).__name__)
