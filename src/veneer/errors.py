"""The exceptions of veneer, and the two helpers that make their texts useful."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftError(Exception):
    """Base of every error that veneer raises on purpose."""


class PeftWarning(UserWarning):
    """Something that works, but perhaps not as meant."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """A target of the config (or all of them) matches nothing in the model."""


class ConfigError(PeftError, ValueError):
    """A field of a config is wrong."""


class LoadError(PeftError, ValueError):
    """A file and a model do not fit together."""


class SaveError(PeftError, RuntimeError):
    """What would be written is empty, partial, on the meta device or not finite."""


class MergeError(PeftError, ValueError):
    """An adapter cannot be merged, or the merged weights would not be finite."""


class SwapError(LoadError, RuntimeError):
    """An adapter cannot take the place of the one that is there."""


class ConversionError(PeftError, TypeError):
    """An adapter cannot be turned into a LoRA."""


class RouteError(PeftError, ValueError):
    """A forward pass asks for adapters that do not exist, or for the wrong number of them."""


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """The up to `n` entries of `names` that look most like `name`, best first, without repeats.

    Upper and lower case count as alike. Names that are not alike at all are left out.
    """
    spelled: dict[str, str] = {}
    for candidate in names:
        spelled.setdefault(candidate.lower(), candidate)
    return [spelled[key] for key in difflib.get_close_matches(name.lower(), list(spelled), n=n, cutoff=0.6)]


def hint(name: str, names: Iterable[str]) -> str:
    """The end of an error text: `" Did you mean 'q_proj'?"` with the entry of `names` nearest to `name`, or `""`."""
    best = nearest(name, names, n=1)
    return f" Did you mean {best[0]!r}?" if best else ""
