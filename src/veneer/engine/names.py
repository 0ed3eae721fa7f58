"""Names of modules: which of them a spec hits, which layer they are in, and the shortest specs for just these."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from ..errors import ConfigError, hint
from ..method import fits

_NUMBER = re.compile(r"(?:^|(?P<stack>.*?)\.)(?P<index>\d+)(?:\.|$)")


def suffixes(name: str) -> Iterator[str]:
    """`a.b.c` -> `a.b.c`, `b.c`, `c`."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def match(names: Iterable[str], spec: str | Collection[str]) -> list[str]:
    """The names that a spec hits, in order.

    Args:
        names: module names.
        spec: a list: hits every name that is one of its entries or ends in `.` + entry. A str: a regular expression
            for the whole name.
    """
    if isinstance(spec, str):
        return [n for n in names if re.fullmatch(spec, n)]
    entries = set(spec)
    return [n for n in names if not entries.isdisjoint(suffixes(n))]


def check_pattern(field_name: str, pattern: Mapping[str, Any] | None, names: Collection[str], config: Any = None) -> None:
    """Raise ConfigError for the keys of a config's `rank_pattern` and the like that fit none of the adapted `names`."""
    means = getattr(config, "fits", fits)  # not every config is one of a method with patterns
    dead = [k for k in pattern or {} if not any(means(k, n) for n in names)]
    if dead:
        raise ConfigError(
            f"{field_name}: {listed(dead)} fits none of the {len(names)} adapted modules, so it would do nothing."
            f"{did_you_mean(dead[0], names)} Keys are names, ends of names or regular expressions for them."
        )


def minimal_targets(hit_names: Iterable[str], other_names: Iterable[str]) -> list[str]:
    """The shortest ends of names that hit every name in `hit_names` and none in `other_names`, sorted.

    A name that is itself the end of another one stays whole, although it hits the other one too.
    """
    taken = {s for name in other_names for s in suffixes(name)}
    return sorted({next((s for s in reversed(list(suffixes(name))) if s not in taken), name) for name in hit_names})


def spelled(names: set[str], every: Iterable[str], short: bool) -> set[str] | str:
    """Targets for just these of `every` name: names or their ends, or a regular expression where a name is another's end."""
    others = [n for n in every if n not in names]
    spec = set(minimal_targets(names, others)) if short else names
    return "|".join(map(re.escape, sorted(names))) if match(others, spec) else spec


def layer_of(name: str) -> tuple[str, str] | None:
    """`model.layers.3.mlp` -> (`model.layers`, `3`)."""
    m = _NUMBER.match(name)
    return (m["stack"] or "", m["index"]) if m else None


def layer_filter(config: Any, names: Iterable[str], strict: bool) -> Callable[[str], bool]:
    """Whether a name is in one of the layers that `layers_to_transform` asks for; where it is unset, any is."""
    wanted, patterns = getattr(config, "layers_to_transform", None), getattr(config, "layers_pattern", None)
    if wanted is None or wanted == []:
        return lambda name: True
    numbers = {wanted} if isinstance(wanted, int) else set(wanted)
    stacks = [patterns] if isinstance(patterns, str) else list(patterns or ())
    blocks = "block" in (getattr(config, "kinds", None) or ())  # then the number may be the end of a name
    rules = [re.compile(rf"(?:^|.*?\.){p}\.(\d+){'(?:[.]|$)' if blocks else '[.]'}") for p in stacks if p]

    def layer(name: str) -> int | None:
        if not rules:  # as in PEFT, two names have to stand before the number
            parts = name.split(".")[2 : None if blocks else -1]
            return next((int(part) for part in parts if part.isdecimal()), None)
        found = next((m for m in (r.match(name) for r in rules) if m), None)
        return int(found[1]) if found else None

    there = {n for n in map(layer, names) if n is not None}
    if strict and numbers & there and numbers - there:
        raise ConfigError(
            f"layers_to_transform: the model has no layers {sorted(numbers - there)}, so nothing there would be "
            f"trained. It has the layers {min(there)} to {max(there)}."
        )
    return lambda name: layer(name) in numbers


def listed(items: Iterable[str], quoted: bool = True, most: int = 12) -> str:
    """`'a', 'b' and 3 more`; sets in sorted order."""
    every = sorted(items) if isinstance(items, (set, frozenset)) else list(items)
    shown = ", ".join(repr(i) if quoted else i for i in every[:most])
    return f"{shown} and {len(every) - most} more" if len(every) > most else shown


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint with the nearest end of a name that has as many parts as `name`."""
    parts = name.count(".") + 1
    ends = dict.fromkeys(".".join(n.split(".")[-parts:]) for n in names)
    return "" if name in ends else hint(name, ends)
