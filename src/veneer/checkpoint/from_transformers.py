"""Loading an adapter through transformers' own loader (`model.load_adapter`, or a folder with an adapter given to `from_pretrained`).

transformers asks for the rules by which keys become names of the model before the adapter is attached, and applies them after. So the rules that it
gets look the names up in the very model, as veneer's own loading does, and at the end see whether the adapter is complete.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..engine import inject
from ..engine.fused import Fusion, conversions, fusions, layer_of, renamed
from ..errors import ConfigError, LoadError
from .fused import fuse, split_key
from .keys import PREFIX, join_path, slots, walk
from .match import plain

_FROM_DATA = ("corda", "lora_ga")  # other starts that a change is counted from follow from the weights

_waiting: weakref.WeakValueDictionary[int, Expected] = weakref.WeakValueDictionary()


class Expected:
    """An adapter that transformers is about to load: where each key of its file goes.

    Attributes:
        model: the model it has been attached to, once it is.
        seen: the names that keys of the file have been found for.
        keys: of a method that packs its tensors in its file: its keys, in the order in which transformers reads them.
    """

    def __init__(self, config: Any, adapter: str) -> None:
        self.config, self.adapter = config, adapter
        self.model: weakref.ref[nn.Module] | None = None
        self.seen: set[str] = set()
        self.keys: list[str] = []
        self._names: dict[str, str] | None = None
        self._rules: list[Any] = []
        self._fusions: list[Fusion] = []
        self._paths: dict[int, str] = {}

    def __deepcopy__(self, memo: Any) -> Expected:
        return self  # transformers copies its rules for each tensor

    def names(self) -> dict[str, str]:
        """The name in the model for every spelling of a key."""
        if self._names is None:
            model = self.model() if self.model is not None else None
            if model is None:
                raise LoadError(
                    f"The adapter {self.adapter!r} was to take the place of one that is loaded (hotswap=True), which transformers' loader cannot do to "
                    "its scaling. Call veneer.hotswap.hotswap_adapter(model, folder, adapter_name) instead."
                )
            self._rules, self._fusions = conversions(model), fusions(model)
            self._paths = {id(s.module): s.memory for s in walk(model)}
            self._names = {}
            for slot in slots(model, self.adapter, self.config).values():
                for spelled in (slot.key, slot.memory_key, plain(slot.key)):
                    self._names.setdefault(spelled, slot.memory_key)
        return self._names

    def place(self, key: str) -> str | None:
        """The name in the model of a key of the file, or None."""
        names = self.names()
        for spelled in (key, renamed(key.removeprefix(PREFIX), self._rules)):
            found = names.get(spelled) or names.get(plain(spelled))
            if found is not None:
                self.seen.add(found)
                return found
        return None

    def fused(self, key: str) -> tuple[str, str, int] | None:
        """(name in the model, pattern of the source, which source) of a key of one expert's factor, or None."""
        self.names()
        at = split_key(renamed(key.removeprefix(PREFIX), self._rules), self._fusions)
        layer = layer_of(self.there(), at[0], self.adapter) if at is not None else None
        if at is None or layer is None:
            return None
        name = join_path(self._paths[id(layer)], at[4].replace(".weight", f".{self.adapter}.weight")[1:])
        self.seen.add(name)
        return name, at[1], at[2]

    def anchor(self) -> str:
        """One name in the model, where tensors of a packed file can be collected: of a floating-point tensor, to whose type they are turned."""
        self.names()
        return next(
            s.memory_key for s in slots(self.there(), self.adapter, self.config).values() if s.required and s.tensor.is_floating_point()
        )

    def unpacked(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """What a packed file holds, by name in the model."""
        found = {self.place(k): t for k, t in self.config.from_file(dict(zip(self.keys, tensors, strict=True))).items()}
        table = {s.memory_key: s.tensor.dtype for s in slots(self.there(), self.adapter, self.config).values()}
        return {name: t.to(table[name]) for name, t in found.items() if name is not None}

    def there(self) -> nn.Module:
        """The model."""
        model = self.model() if self.model is not None else None
        assert model is not None
        return model

    def finish(self) -> None:
        """When all is loaded: see that nothing is missing, and fill what follows from what came."""
        if self._names is None:
            return  # nothing was read
        model: Any = self.there()
        found = slots(model, self.adapter, self.config)
        needed = [s for s in found.values() if s.required]
        missing = [s.key for s in needed if (s.tied_with or s).memory_key not in self.seen and s.memory_key not in self.seen]
        if missing:
            inject.detach(model, self.adapter)
            model.peft_config.pop(self.adapter, None)
            raise LoadError(
                f"The file lacks {len(missing)} of the {len(needed)} tensors of the adapter {self.adapter!r}, such as {missing[0]!r}: it would be dead or "
                "half there. It has been taken off again. Is it the adapter of another model?"
            )
        inject.settle(model, self.config, self.adapter)


def attached(config: Any, model: nn.Module) -> None:
    """Tell whoever waits for it that an adapter of this config is on this model now."""
    expected = _waiting.get(id(config))
    if expected is not None:
        expected.model = weakref.ref(model)


def build_peft_weight_mapping(weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None) -> list[Any]:
    """The rules by which transformers' loader turns the keys of an adapter's file into names of the model.

    Args:
        weight_conversions: those of the base model; the model itself tells them once more.
        adapter_name: the adapter's name.
        peft_config: its config, which `inject_adapter_in_model` is going to be called with.

    Returns:
        transformers' WeightRenaming and WeightConverter objects.

    Raises:
        ConfigError: if the adapter's file is not all that it needs.
        LoadError: at the end of the loading, if the file lacks tensors of the adapter.
    """
    from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

    if str(getattr(peft_config, "init_lora_weights", "")).startswith(_FROM_DATA):
        raise ConfigError(
            f"The adapter {adapter_name!r} counts its change from start values that data gave ({peft_config.init_lora_weights}), and they are in a file that "
            "transformers' loader does not read. Use PeftModel.from_pretrained(model, folder)."
        )
    expected = Expected(peft_config, adapter_name)
    _waiting[id(peft_config)] = expected

    class ToModel(WeightRenaming):  # type: ignore[misc]
        """Every key of the file to the name of its tensor."""

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            found = expected.place(source_key)
            return (source_key, None) if found is None else (found, "file")

        def was_used(self) -> bool:
            expected.finish()  # transformers asks when all is loaded
            return False  # it is no rule for saving the base model

    class Together(WeightConverter):  # type: ignore[misc]
        """The factors of all experts to those of the parameter that holds them."""

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            found = expected.fused(source_key)
            if found is None or found[1] not in self.source_patterns:
                return source_key, None
            return found[:2]

        def convert(self, layer_name: str, **kwargs: Any) -> dict[str, Any]:
            tensors = self.materialize_tensors()
            parts = {i: tensors[p] for i, p in enumerate(self.source_patterns) if p in tensors}
            layer = expected.there().get_submodule(layer_name.rpartition(".lora_")[0])
            factor = f".lora_{layer_name.rpartition('.lora_')[2][0]}.weight"
            return {layer_name: fuse(factor, parts, len(self.source_patterns), layer.site.n_out)}  # type: ignore[union-attr, arg-type]

        def was_used(self) -> bool:
            return False

    class Unpacked(WeightConverter):  # type: ignore[misc]
        """All tensors of the file of a method that packs them to those of the model."""

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            expected.keys.append(source_key)
            return expected.anchor(), "file"

        def convert(self, layer_name: str, **kwargs: Any) -> dict[str, Any]:
            return expected.unpacked(self.materialize_tensors()["file"])

        def was_used(self) -> bool:
            expected.finish()
            return False

    class AsIs(ConversionOps):  # type: ignore[misc]
        """A converter has to have an operation; ours converts as a whole."""

        def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            return input_dict

        @property
        def reverse_op(self) -> ConversionOps:
            return self

    if hasattr(peft_config, "from_file"):
        return [Unpacked("file", "model", [AsIs()])]
    sources = _sources(weight_conversions or ())
    return [
        ToModel("file", "model"),
        *(Together([f"{s}.{f}.weight" for s in group], target, [AsIs()]) for group, target in sources for f in ("lora_A", "lora_B")),
    ]


def _sources(rules: Sequence[Any]) -> list[tuple[tuple[str, ...], str]]:
    """The sources of the parameters that experts are fused in, as `Fusion` spells them, and the parameter."""
    out = []
    for rule in rules:
        if [type(op).__name__ for op in getattr(rule, "operations", ())][:1] == ["MergeModulelist"]:
            target, *sources = (p.replace("\\.", ".").strip(".") for p in (rule.target_patterns[0], *rule.source_patterns))
            out.append((tuple(s.removesuffix(".weight") for s in sources), target))
    return out
