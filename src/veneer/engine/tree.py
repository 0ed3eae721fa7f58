"""A model as the user made it: where its modules hang, without the wrappers that adapters, compiling or sharding put around them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

_TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(eq=False)
class Place:
    """A module and where it hangs."""

    path: str
    name: str
    module: nn.Module  # what hangs there: the module itself, or the adapted layer or saving wrapper around it
    base: nn.Module  # the module itself
    attention: Place | None = None  # the MultiheadAttention whose out_proj this is
    around: nn.Module | None = None  # the module whose part it is
    other: dict[str, str] = field(default_factory=dict)  # path -> name of the other places it hangs in

    @property
    def all_names(self) -> list[str]:
        return [self.name, *self.other.values()]

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def parameters(self) -> list[str]:
        """Names of its own parameters."""
        return [k for k, p in self.base._parameters.items() if p is not None]

    @property
    def saved(self) -> bool:
        """Whether another adapter has a trained copy of it (modules_to_save)."""
        return "original_module" in self.module._modules and "modules_to_save" in self.module._modules

    @property
    def adapted(self) -> bool:
        return self.module is not self.base and not self.saved


def places(model: nn.Module) -> list[Place]:
    """Every module below the root once, in the order of named_modules, without what adapters and wrappers added."""
    found: list[Place] = []
    seen: dict[int, Place] = {}

    def visit(module: nn.Module, path: str, name: str, parent: Place | None) -> None:
        path, module = through(module, path)
        if id(module) in seen:
            seen[id(module)].other[path] = name
            return
        place = Place(path, name, module, module)
        seen[id(module)] = place
        if parent is not None:
            found.append(place)
            place.around = parent.base
            place.attention = parent if isinstance(parent.base, nn.MultiheadAttention) else None
        if place.saved:
            place.base = module.get_submodule("original_module")
            return
        while "base_layer" in module._modules and hasattr(module, "adapter_slots"):
            path, module = through(module.get_submodule("base_layer"), join(path, "base_layer"))
        place.base = module
        for key, child in module._modules.items():
            if child is not None:
                visit(child, join(path, key), join(name, key), place)

    visit(model, "", "", None)
    return found


def through(module: nn.Module, path: str) -> tuple[str, nn.Module]:
    """Past the wrappers that stand for the one module inside them."""
    while True:
        keys = (*_TRANSPARENT, "token_adapter") if hasattr(module, "adapter_slots") else _TRANSPARENT
        key = next((k for k in keys if k in module._modules), None)
        if key is None:
            return path, module
        path, module = join(path, key), module.get_submodule(key)


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def owner(key: str, names: Collection[str]) -> tuple[str, list[str]]:
    """The module that a key of an adapter's file belongs to, and the rest of the key."""
    parts = key.split(".")
    if parts[:2] == ["base_model", "model"] and "base_model" not in names:
        parts = parts[2:]
    name = ""
    for i, part in enumerate(parts):
        longer = join(name, part)
        if longer in names:
            name = longer
        elif part not in (*_TRANSPARENT, "module", "base_layer"):
            return name, parts[i:]
    return name, []
