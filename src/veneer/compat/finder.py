"""Python's import system told that `peft` is veneer."""

from __future__ import annotations

import dis
import importlib
import importlib.abc
import importlib.metadata
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from ..config import PEFT_FORMAT_VERSION
from ..errors import PeftError, hint
from .names import TABLE, resolve

_NAME = "peft"

# libraries that settle when they are imported whether PEFT is there, and the name by which one sees what they found
_SETTLED = {
    "transformers.trainer_utils": "PeftModel",
    "transformers.trainer": "PeftModel",
    "trl.trainer.utils": "PeftModel",
    "diffusers.training_utils": "set_peft_model_state_dict",
    "sentence_transformers.base.modules.transformer": "PeftConfig",
}


class Served(ModuleType):
    """One of PEFT's modules: names of veneer's, each looked up when it is first asked for."""

    def __getattr__(self, name: str) -> Any:
        table = TABLE[self.__name__]
        if name == "__all__":
            return [n for n in table if not n.startswith("_")]
        if name not in table and f"{self.__name__}.{name}" in TABLE:  # PEFT imports all its modules by itself
            return importlib.import_module(f"{self.__name__}.{name}")
        if name not in table:
            near = hint(name, [*table, *_children(self.__name__)])
            if _by_import(sys._getframe(1)):  # which would replace an AttributeError by an error without the nearest name
                raise ImportError(f"veneer serves no {name!r} in {self.__name__!r}.{near}", name=self.__name__)
            raise AttributeError(f"module {self.__name__!r}, which veneer serves, has no attribute {name!r}.{near}")
        value = resolve(table[name])
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *TABLE[self.__name__], *_children(self.__name__)})


def _by_import(caller: FrameType) -> bool:
    """Whether a name is asked for by `from module import name`."""
    return dis.opname[caller.f_code.co_code[caller.f_lasti]] == "IMPORT_FROM"


class Finder:
    """Finds the modules under `peft`, and the distribution of that name, before anything installed is looked at."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of a module that is served; None for one of another library."""
        if name.partition(".")[0] != _NAME:
            return None
        if name not in TABLE:
            parent = name.rpartition(".")[0]
            near = hint(name, TABLE)
            raise ModuleNotFoundError(f"veneer serves no module {name!r}; in {parent!r} there are: {_children(parent)}.{near}", name=name)
        spec = ModuleSpec(name, Loader(), origin=f"veneer.compat ({name})", is_package=bool(_children(name)))
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations = []
        return spec

    @staticmethod
    def find_distributions(context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        """PEFT's distribution, where it or every distribution is asked for."""
        wanted = getattr(context, "name", None)
        if wanted is None or wanted.lower().replace("_", "-") == _NAME:
            yield Peft()

    @staticmethod
    def invalidate_caches() -> None:
        """There are none."""


class Loader(importlib.abc.Loader):
    """Makes a module that is served."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module, without its names."""
        return Served(spec.name, f"veneer under PEFT's name {spec.name}.")

    def exec_module(self, module: ModuleType) -> None:
        """Names come when they are asked for; the version stands there from the first."""
        if module.__name__ == _NAME:
            module.__version__ = PEFT_FORMAT_VERSION  # type: ignore[attr-defined]


class Peft(importlib.metadata.Distribution):
    """What importlib.metadata tells of `peft`."""

    def read_text(self, filename: str) -> str | None:
        """The metadata, and the names that can be imported."""
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {PEFT_FORMAT_VERSION}\nSummary: veneer under PEFT's name\n",
            "top_level.txt": f"{_NAME}\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Any:
        """Where a file would be; there are none of its own."""
        return Path(__file__).parent / path


def install() -> None:
    """Let `peft` mean veneer from here on. Calling it again changes nothing.

    Raises:
        PeftError: if the real PEFT, or a library that found none, has been imported already.
    """
    there = sys.modules.get(_NAME)
    if there is not None and not isinstance(there, Served):
        raise PeftError(
            f"The real PEFT ({getattr(there, '__file__', None)}) has been imported already, so part of this process goes on with it. "
            "Import veneer.compat before anything that imports peft, or run the program with `python -m veneer.compat`."
        )
    if any(isinstance(f, type) and f is Finder for f in sys.meta_path):
        return
    late = [name for name, sign in _SETTLED.items() if name in sys.modules and sign not in vars(sys.modules[name])]
    if getattr(sys.modules.get("diffusers.utils.constants"), "USE_PEFT_BACKEND", True) is False:
        late.append("diffusers")
    if late:
        raise PeftError(
            f"{late[0]} has been imported already and found no PEFT, so it would not know a PeftModel. Import veneer.compat first, or run the program "
            "with `python -m veneer.compat`."
        )
    sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]  # a finder is anything with these methods
    importlib.invalidate_caches()
    known = sys.modules.get("transformers.utils.import_utils")
    if known is not None:  # it remembers what it found before
        for name in ("is_peft_available", "is_peft_greater_or_equal", "_package_distribution_mapping"):
            clear = getattr(getattr(known, name, None), "cache_clear", None)
            if clear is not None:
                clear()


def _children(module: str) -> list[str]:
    """The modules directly in one that is served."""
    return sorted({n[len(module) + 1 :].partition(".")[0] for n in TABLE if n.startswith(f"{module}.")})
