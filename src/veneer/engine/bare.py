"""Modules that the code around them never calls: it reads their weights, so that what stands in their place would not act."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

_TENSORS = ("weight", "bias")
_OF_A_TENSOR = ("dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "data")  # asked of a weight without taking its numbers
_HARMLESS = (*_TENSORS, "in_features", "out_features", "embedding_dim", "num_embeddings", "in_channels", "out_channels", "training")
_ANY = {"children", "named_children", "_modules"}  # of whoever goes through all parts, nothing can be said of one
_STARTS = ("__init__", "_init_weights", "reset_parameters", "_reset_parameters")


def reads_bare(around: nn.Module, name: str) -> bool:
    """Whether the class of a module takes the numbers of its part `name` in its code, and does nothing else with it."""
    if not name.isidentifier() or "forward" in around.__dict__:  # a place in a list; whatever that forward does
        return False
    cls: Any = type(around)  # Any: mypy takes classes of modules for unhashable
    return _reads_bare(cls, name)


@functools.cache
def _reads_bare(cls: Any, name: str) -> bool:
    read = False
    for code in _codes(cls):
        if not _ANY.isdisjoint(code.co_names) or name in code.co_consts:  # it may be called by its name: getattr(self, name)(x)
            return False
        if name not in code.co_names:
            continue
        steps = [(i.opname, i.argval) for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
        for at, (op, what) in enumerate(steps):
            if what != name or not op.startswith("LOAD_"):
                continue
            after = [arg if op.startswith("LOAD_") and op.endswith(("ATTR", "METHOD")) else None for op, arg in steps[at + 1 : at + 3]]
            if not after or after[0] not in _HARMLESS:
                return False  # it is called, or handed on
            read |= after[0] == "weight" and (len(after) < 2 or after[1] not in _OF_A_TENSOR)
    return read


def _codes(cls: type) -> Iterator[CodeType]:
    """The code of all methods of a class but those that only start it, of classes above torch's own, and of what is defined inside them."""
    for c in cls.__mro__:
        if c is nn.Module:
            return
        for key, value in vars(c).items():
            if key in _STARTS:
                continue
            inner: Any = (
                value.fget if isinstance(value, property) else value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
            )
            todo = [code] if (code := getattr(inspect.unwrap(inner), "__code__", None)) is not None else []
            while todo:
                code = todo.pop()
                yield code
                todo += [const for const in code.co_consts if isinstance(const, CodeType)]
