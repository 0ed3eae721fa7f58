"""Loading: a file is compared with every slot before the first one changes. Everything fits, or nothing is touched."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.layer import set_slot
from ..engine.offload import keep, runs_on
from ..errors import LoadError, hint, nearest
from ..sharding import fill
from .keys import Slot, walk
from .match import Matches, match, plain, rename_keys, unfilled


@dataclass
class LoadReport:
    """What a load did not fit. Unpacks into (missing_keys, unexpected_keys) as torch's result does.

    Attributes:
        missing_keys: names in memory of slots that the file did not fill.
        unexpected_keys: keys of the file that belong nowhere.
        mismatched: (key of the file, its shape, the slot's shape) of those left out because of their shape.
        rename: the leading part of paths that was changed to fit, (in the file, in the model), or None.
    """

    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    rename: tuple[str, str] | None = None

    def __iter__(self) -> Iterator[list[str]]:
        yield self.missing_keys
        yield self.unexpected_keys


@dataclass
class LoadPlan:
    """Which tensor goes where; nothing has changed until `commit`."""

    values: list[tuple[Slot, Tensor]]
    report: LoadReport
    found: Mapping[str, Slot]

    def commit(self, *, upcast: bool = False, device: torch.device | str | None = None) -> LoadReport:
        """Put the tensors into the model.

        An adapter's tensors get the dtype they have in the file; weights of the base model keep theirs. Parameters stay the same objects
        (an optimizer keeps them) unless they were on the meta device.

        Args:
            upcast: turn float16, bfloat16 and float8 into float32.
            device: where to put tensors that are on the meta device; by default where the base layer is.
        """
        ready = [(slot, _convert(slot, value, upcast, device)) for slot, value in self.values]
        tied: dict[str, list[Slot]] = {}
        for slot in self.found.values():
            if slot.tied_with is not None:
                tied.setdefault(slot.tied_with.key, []).append(slot)
        with torch.no_grad():
            for slot, value in ready:
                _assign(slot, value, tied.get(slot.key, ()))
        return self.report


def plan_load(
    state_dict: Mapping[str, Tensor],
    found: Mapping[str, Slot],
    *,
    key_mapping: Mapping[str, str] | None = None,
    strict: bool | None = True,
    ignore_mismatched_sizes: bool = False,
    adapter_name: str = "default",
) -> LoadPlan:
    """Compare a file with the slots of an adapter; nothing is changed.

    Args:
        key_mapping: regular expression -> text, applied to the file's keys first.
        strict: True: every key and every slot must fit. None: every slot must be filled, keys too many are reported. False: whatever does
            not fit is reported. That nothing at all fits is an error always.
        ignore_mismatched_sizes: leave slots whose shape differs as they are, and report them.

    Raises:
        LoadError: names keys, nearest slots, shapes, and the one rename that would fix it.
    """
    tensors = rename_keys(state_dict, key_mapping)
    if not found:
        raise LoadError(f"The model has no adapter {adapter_name!r} that a file could fill. Attach it first (get_peft_model, add_adapter).")
    if not tensors:
        raise LoadError(
            f"The file for adapter {adapter_name!r} holds no tensors, and {len(found)} are needed. It was saved empty: save it again "
            "from the trained model, or use another checkpoint."
        )
    matches = match(tensors, found)
    report = LoadReport(rename=matches.rename)
    chosen: dict[str, str] = {}
    problems: list[str] = []
    for name, key in matches.slot_of.items():
        value, slot = tensors[name], found[key]
        if tuple(value.shape) != slot.shape:
            report.mismatched.append((name, tuple(value.shape), slot.shape))
        elif not _castable(value, slot.tensor.dtype):
            problems.append(f"{name!r} is {value.dtype} in the file, and the model needs {slot.tensor.dtype}")
        elif slot.kept is not None and not _same(slot.kept, value):
            problems.append(
                f"{name!r} is another weight of the base than the one that adapters are merged into: call unmerge_adapter() first"
            )
        elif key not in chosen:
            chosen[key] = name
        elif not _same(tensors[chosen[key]], value):
            problems.append(f"{chosen[key]!r} and {name!r} are the same tensor of the model, but differ in the file")
    report.unexpected_keys = [name for name in tensors if name not in matches.slot_of]
    values = _settle_ties(chosen, tensors, found, problems)
    set_aside = {matches.slot_of[name] for name, *_ in report.mismatched}
    empty = unfilled(chosen.keys(), found)
    report.missing_keys = [found[k].memory_key for k in empty]
    missing = [k for k in empty if k not in set_aside]
    wrong = bool(problems or not matches.slot_of or (report.mismatched and not ignore_mismatched_sizes))
    if strict is not False:
        wrong = wrong or bool(missing or (strict and report.unexpected_keys))
    if wrong:
        raise LoadError(_explain(adapter_name, tensors, found, matches, report, missing, problems))
    return LoadPlan(values, report, found)


def _settle_ties(
    chosen: Mapping[str, str], tensors: Mapping[str, Tensor], found: Mapping[str, Slot], problems: list[str]
) -> list[tuple[Slot, Tensor]]:
    """One value per tensor of the model; copies of it in the file have to agree."""
    values: dict[str, tuple[Slot, Tensor, str]] = {}
    for key, name in chosen.items():
        slot, value = found[key], tensors[name]
        leader = slot.tied_with or slot
        value = value.T if slot.transposed else value
        if leader.key not in values:
            values[leader.key] = (leader, value, name)
        elif not _same(values[leader.key][1], value):
            problems.append(f"{values[leader.key][2]!r} and {name!r} are tied in the model, but differ in the file")
    return [(slot, value) for slot, value, _ in values.values()]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b.to(a))


def _castable(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether the numbers survive: integers never become floats, floats become integers only if they are whole (PEFT on Windows)."""
    kinds = [2 if d.is_complex else 1 if d.is_floating_point else 0 for d in (value.dtype, dtype)]
    if kinds == [1, 0]:
        return bool((value == value.round()).all())
    return kinds[0] == kinds[1]


def keeps_dtype(slot: Slot, value: Tensor) -> bool:
    """Whether the tensor in the model stays in its dtype, whatever the file's is."""
    own = slot.base or slot.attribute in getattr(slot.owner, "own_dtype", ())
    return own or value.dtype.is_floating_point != slot.tensor.dtype.is_floating_point


def _convert(slot: Slot, value: Tensor, upcast: bool, device: torch.device | str | None) -> Tensor:
    old = slot.tensor
    dtype = value.dtype
    if keeps_dtype(slot, value):
        dtype = old.dtype
    elif upcast and dtype.is_floating_point and dtype.itemsize < 4:
        dtype = torch.float32
    if not old.is_meta:
        return value.to(device=old.device, dtype=dtype)
    # a copy: the value may be a view of the mapped file
    return value.to(device=device or _device(slot.home), dtype=dtype, copy=True).contiguous()


def _device(home: nn.Module) -> torch.device:
    for spot in walk(home):  # the base alone, however many adapters there are
        if (there := runs_on(spot.module)) is not None:
            return there
        for t in (*spot.module._parameters.values(), *spot.module._buffers.values()):
            if t is not None and not t.is_meta:
                return t.device
    return torch.device("cpu")


def _assign(slot: Slot, value: Tensor, tied: Sequence[Slot]) -> None:
    old = slot.tensor
    store: dict[str, Any] = slot.owner._parameters if slot.attribute in slot.owner._parameters else slot.owner._buffers
    if slot.attribute not in store:
        computed = getattr(type(slot.owner), slot.attribute, None)
        if isinstance(computed, property) and computed.fset is not None:
            setattr(slot.owner, slot.attribute, value)
        else:
            set_slot(slot.owner, slot.attribute, value)
    elif slot.elsewhere:  # what is put into the module would be written over at its next call
        keep(slot.owner, {slot.attribute: value})
    elif old.is_meta:
        new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        for s in (slot, *tied):
            for held in (s.owner._parameters, s.owner._buffers):
                if held.get(s.attribute) is old:
                    held[s.attribute] = new  # type: ignore[assignment]
    elif not fill(old, value):
        if (old.dtype, old.device) != (value.dtype, value.device):
            old.grad = None
            old.data = torch.empty_like(value, memory_format=torch.contiguous_format)
        old.copy_(value)  # also tells caches, by the version, that the values are new


def _explain(
    adapter: str,
    tensors: Mapping[str, Tensor],
    found: Mapping[str, Slot],
    matches: Matches,
    report: LoadReport,
    missing: Sequence[str],
    problems: Sequence[str],
) -> str:
    needed = sum(s.required for s in found.values())
    lines = [f"The file does not fit the adapter {adapter!r} (nothing was loaded):"]
    lines += [f"  {p}" for p in problems[:5]]
    if report.unexpected_keys:
        lines.append(f"  {len(report.unexpected_keys)} of {len(tensors)} keys of the file match nothing:")
        for name in report.unexpected_keys[:3]:
            spelled = {plain(k): k for k in found}
            near = nearest(plain(name), spelled, n=1)
            lines.append(f"    {name!r}" + (f" (nearest: {spelled[near[0]]!r})" if near else ""))
    if missing:
        some = ", ".join(map(repr, missing[:3])) + ", ..." * (len(missing) > 3)
        lines.append(f"  {len(missing)} of the {needed} tensors it needs are not in the file: {some}")
    for name, theirs, ours in report.mismatched[:5]:
        lines.append(f"  {name!r} has the shape {theirs} in the file and {ours} in the model")
    if len(report.mismatched) > 5:
        lines.append(f"  and {len(report.mismatched) - 5} more shapes differ")
    if matches.advice is not None:
        a, b = matches.advice
        pattern, text = (f"^{re.escape(a)}\\." if a else "^"), (f"{b}." if b else "")
        lines.append(f"  This one rename would make names fit: key_mapping={ {pattern: text}!r}")
    elif report.mismatched:
        tables = [m for m in report.mismatched if found[matches.slot_of[m[0]]].base]
        what = (
            f"Resize the embeddings to {tables[0][1][0]} rows first (resize_token_embeddings)."
            if tables
            else ("Use the rank and the base model the adapter was trained with.")
        )
        lines.append(f"  {what}")
    elif report.unexpected_keys and not matches.slot_of:
        kinds = Counter(k.rpartition(".")[0] or k for k in map(plain, found))
        lines.append(f"  Is this the adapter's config, and its base model? {hint(plain(report.unexpected_keys[0]), kinds)}".rstrip())
    return "\n".join(lines)
