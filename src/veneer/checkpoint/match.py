"""Finding the slot of every key of a file, however the key is spelled."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import LoadError
from .keys import PREFIX, WRAPPER_WORDS, Slot, join_path

# Leading parts of module paths that releases of transformers have moved (transformers#38627); read both ways.
_MOVED = (
    ("language_model.model", "model.language_model"),
    ("language_model.lm_head", "lm_head"),
    ("model", "model.language_model"),
    ("visual", "model.visual"),
    ("vision_tower", "model.vision_tower"),
    ("vision_model", "model.vision_model"),
    ("multi_modal_projector", "model.multi_modal_projector"),
)


@dataclass(frozen=True)
class Matches:
    """What was found.

    Attributes:
        slot_of: key of the file -> key of the slot.
        rename: (leading part in the file, in the model) that was changed.
        advice: one that would help, where none explains everything.
    """

    slot_of: dict[str, str]
    rename: tuple[str, str] | None = None
    advice: tuple[str, str] | None = None


def match(names: Iterable[str], found: Mapping[str, Slot], *, foreign: bool = True) -> Matches:
    """Find the slot of each name.

    Understood are the names in a file, with or without `base_model.model.`; names in memory; names with wrapper words
    (`_orig_mod.`, `module.`, `_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`) anywhere; a trailing `.weight` too many or too few.

    Args:
        foreign: also names in memory of an adapter called otherwise, and paths with leading parts too many or too few, each only if
            one reading explains all names that are left and every required slot is filled.
    """
    exact: dict[str, str] = {}
    loose: dict[str, set[str]] = {}
    for key, slot in found.items():
        spellings = [key, slot.memory_key]
        if slot.hole is not None:
            spellings.append(join_path(*slot.hole))
        for name in spellings:
            exact.setdefault(name, key)
            loose.setdefault(plain(name), set()).add(key)
    exact.update((key, key) for key in found)
    slot_of: dict[str, str] = {}
    left: list[str] = []
    for name in names:
        candidates = {exact[name]} if name in exact else loose.get(plain(name), set())
        if len(candidates) == 1:
            (slot_of[name],) = candidates
        else:
            left.append(name)
    if not left or not foreign:
        return Matches(slot_of)
    return _match_rest(left, slot_of, found)


def _match_rest(left: Sequence[str], slot_of: dict[str, str], found: Mapping[str, Slot]) -> Matches:
    taken = set(slot_of.values())

    def complete(more: Mapping[str, str]) -> bool:
        """Whether `more` explains every name that is left, each slot once, and fills what the adapter needs."""
        new = list(more.values())
        if len(more) != len(left) or len(set(new)) != len(new) or taken & set(new):
            return False
        return not unfilled(taken | set(new), found)

    for more in _under_other_name(left, found):
        if complete(more):
            return Matches(slot_of | more)
    free = {plain(k): k for k in found if k not in taken}
    fits = _renames(left, free)
    perfect = [(r, more) for r, more in fits if _inserts(*r) and complete(more)]
    if len(perfect) == 1:
        return Matches(slot_of | perfect[0][1], rename=perfect[0][0])
    moved = _moved(left, free)
    if not perfect and complete(moved):
        return Matches(slot_of | moved)
    best = max(fits, key=lambda f: len(f[1]), default=None)
    return Matches(slot_of, advice=best[0] if best is not None else None)


def unfilled(filled: Collection[str], found: Mapping[str, Slot]) -> list[str]:
    """The required slots that stay empty. Of tied slots one filled is enough."""
    leaders = {(found[k].tied_with or found[k]).key for k in filled}
    return [k for k, s in found.items() if s.required and (s.tied_with or s).key not in leaders]


def plain(name: str) -> str:
    """A name without what differs between equal names: wrapper words, the prefix of a PeftModel, a trailing `.weight`."""
    parts = [p for p in name.split(".") if p not in WRAPPER_WORDS]
    if parts[:1] == ["base_model"]:
        parts = parts[2:] if parts[1:2] == ["model"] else parts[1:]
    if len(parts) > 1 and parts[-1] == "weight":
        parts.pop()
    return ".".join(parts)


def _under_other_name(left: Sequence[str], found: Mapping[str, Slot]) -> Iterator[dict[str, str]]:
    """Readings of names as names in memory, one per adapter name that the first of them may contain."""
    holes = {(plain(f"{s.hole[0]}.x").removesuffix(".x"), plain(f"x.{s.hole[1]}")[2:]): k for k, s in found.items() if s.hole is not None}

    def readings(name: str) -> dict[str, str]:
        parts = plain(name).split(".")
        ends = [(i, j) for i in range(1, len(parts)) for j in range(i + 1, len(parts) + 1)]
        hits = {".".join(parts[i:j]): holes.get((".".join(parts[:i]), ".".join(parts[j:]))) for i, j in ends}
        return {adapter: key for adapter, key in hits.items() if key is not None}

    first = readings(left[0])
    if first:
        every = {name: readings(name) for name in left}
        for adapter in first:
            yield {name: keys[adapter] for name, keys in every.items() if adapter in keys}


def _renames(left: Sequence[str], free: Mapping[str, str]) -> list[tuple[tuple[str, str], dict[str, str]]]:
    """Every change of the leading part of paths that gives some of the names a free slot, with what it gives."""
    tails: dict[str, list[list[str]]] = {}
    for name in free:
        parts = name.split(".")
        tails.setdefault(".".join(parts[-2:]), []).append(parts)
    candidates: set[tuple[str, str]] = set()
    for name in left[:8]:
        parts = plain(name).split(".")
        for other in tails.get(".".join(parts[-2:]), ()):
            n = next(
                (i for i, (a, b) in enumerate(zip(reversed(parts), reversed(other), strict=False)) if a != b), min(len(parts), len(other))
            )
            a, b = parts[: len(parts) - n], other[: len(other) - n]
            if not any(p.isdigit() for p in (*a, *b)):  # another layer number is another layer
                candidates.add((".".join(a), ".".join(b)))
    out = []
    for old, new in sorted(candidates):
        hits = {name: free.get(_swap(plain(name), old, new) or "") for name in left}
        fitting = {name: key for name, key in hits.items() if key is not None}
        if fitting:
            out.append(((old, new), fitting))
    return out


def _inserts(a: str, b: str) -> bool:
    """Whether one of two paths is the other with parts put in."""
    short, long = sorted((a.split(".") if a else [], b.split(".") if b else []), key=len)
    rest = iter(long)
    return all(part in rest for part in short)


def _swap(name: str, a: str, b: str) -> str | None:
    """`name` with its leading part `a` made `b`, or None if it does not start so."""
    if not a:
        return join_path(b, name)
    return join_path(b, name[len(a) + 1 :]) if name.startswith(f"{a}.") else None


def _moved(left: Sequence[str], free: Mapping[str, str]) -> dict[str, str]:
    """The names that one entry of the table of moved paths explains."""
    out = {}
    for name in left:
        both_ways = [swap for old, new in _MOVED for swap in ((old, new), (new, old))]
        hits = {free[n] for a, b in both_ways if (n := _swap(plain(name), a, b)) is not None and n in free}
        if len(hits) == 1:
            out[name] = hits.pop()
    return out


def rename_keys(state_dict: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """The same tensors with the first regular expression that hits a name replaced by its text; `base_model.model.` stays in front.

    Raises:
        LoadError: if two names become one.
    """
    out: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        front = PREFIX if key.startswith(PREFIX) else ""
        name = key[len(front) :]
        for pattern, text in (key_mapping or {}).items():
            name, hits = re.subn(pattern, text, name)
            if hits:
                break
        if front + name in out:
            raise LoadError(
                f"key_mapping turns two keys of the file into {front + name!r}; one of them was {key!r}. Make its patterns more exact."
            )
        out[front + name] = value
    return out
