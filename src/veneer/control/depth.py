"""Where in a model a trained tensor stands: its module, its name there, and the layer, counted from the input."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..engine.tree import places
from ..errors import ConfigError, hint
from ..method import fits as by_name


@dataclass(frozen=True)
class Depths:
    """The layers of a model: the stacks of numbered modules, such as `model.layers.0` …, one after another.

    Attributes:
        first: by stack, how many layers come before it.
        count: how many layers there are.
        after: names of modules that stand behind the first stack and in none.
    """

    first: Mapping[str, int]
    indices: Mapping[str, list[int]]
    count: int
    after: frozenset[str]

    @staticmethod
    def of(names: Iterable[str]) -> Depths:
        """From the names of a model's modules, in its order. A stack is what has two numbered modules or more; of nested ones the outermost counts."""
        names = list(names)
        numbers: dict[str, set[int]] = {}
        for name in names:
            for stack, index in _numbered(name):
                numbers.setdefault(stack, set()).add(index)
        stacks: dict[str, list[int]] = {}
        after = set()
        for name in names:
            found = next((s for s, _ in _numbered(name) if len(numbers[s]) > 1), None)
            if found is not None:
                stacks.setdefault(found, sorted(numbers[found]))
            elif stacks and not any(s == name or s.startswith(f"{name}.") for s in numbers):
                after.add(name)
        first, count = {}, 0
        for stack, there in stacks.items():
            first[stack] = count
            count += len(there)
        return Depths(first, stacks, count, frozenset(after))

    def level(self, name: str) -> int:
        """0: before the layers; 1 … count: in one of them; count + 1: behind them."""
        for stack, index in _numbered(name):
            if stack in self.first:
                return 1 + self.first[stack] + self.indices[stack].index(index)
        return self.count + 1 if name in self.after or not self.count else 0


def _numbered(name: str) -> list[tuple[str, int]]:
    parts = name.split(".")
    return [(".".join(parts[:i]), int(p)) for i, p in enumerate(parts) if p.isdecimal()]


@dataclass(frozen=True, eq=False)
class Trained:
    """A tensor that trains.

    Attributes:
        module: the name of its module in the user's own model; empty for what stands outside (prompts, tensors that all layers share).
        leaf: what it is called there, such as `lora_A`;  level: see `Depths.level`.
    """

    parameter: nn.Parameter
    module: str
    leaf: str
    level: int

    @property
    def name(self) -> str:
        return f"{self.module}.{self.leaf}" if self.module else self.leaf


def trained(model: nn.Module) -> tuple[list[Trained], Depths]:
    """Every parameter of a model that requires a gradient, once, and the model's layers. What stands outside the layers' modules counts as behind them.

    Args:
        model: a PeftModel, a model with injected adapters, or any other.

    Raises:
        ConfigError: if nothing trains.
    """
    root: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    owner: dict[int, tuple[str, str]] = {}
    there = places(root)
    for place in there:  # parents come first, so the innermost module is the one that stays
        for name, p in place.module.named_parameters():
            owner[id(p)] = place.name, _leaf(name)
    depths = Depths.of(p.name for p in there)
    out = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            module, leaf = owner.get(id(p), ("", name))
            out.append(Trained(p, module, leaf, depths.level(module) if module else depths.count + 1))
    if not out:
        raise ConfigError("No parameter of the model trains. Attach an adapter that is not in inference mode, or call set_adapter(name).")
    return out, depths


def _leaf(name: str) -> str:
    """`lora_A.default.weight` -> `lora_A`; of a module trained whole, its own names."""
    parts = [p for p in name.split(".") if p not in ("base_layer", "original_module")]
    return ".".join(parts[2:]) if parts[0] == "modules_to_save" else parts[0]


def fits(key: str, t: Trained) -> bool:
    """Whether a key of a table means this tensor: its module, or the module with the tensor's name, or an end of either; a regular expression."""
    return any(by_name(key, n) for n in (t.module, t.name))


def check_table(what: str, table: Any) -> None:
    """Raise ConfigError for what is no table of keys."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{what} is a table, such as {{lora_B: 0.5}}, got {table!r}.")


def check_keys(what: str, keys: Collection[str], all_: Iterable[Trained]) -> None:
    """Raise ConfigError for keys that mean none of the tensors that train."""
    all_ = list(all_)
    for key in keys:
        if not any(fits(key, t) for t in all_):
            known = {e for t in all_ for e in (t.leaf, t.module.rpartition(".")[2], t.module, t.name)}
            raise ConfigError(
                f"{what}: {key!r} fits none of the {len(all_)} tensors that train, so it would do nothing.{hint(key, known)} "
                "Keys are names of modules or tensors, ends of them, or regular expressions for them."
            )
