"""Which modules and parameters of a model a config hits. Pure: neither the model nor the config is changed.

Names here are those of the user's own model: the wrappers that adapters, compiling or sharding put around modules
leave no trace in them.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, NoMatchingPeftModuleError, PeftError, PeftWarning
from ..sites import supported
from ..types import name_of
from .bare import reads_bare
from .defaults import (
    DUMMY_TARGET_MODULES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MAMBA_BARE_MODULES,
    MAMBA_BARE_STEPS,
    MAMBA_MODEL_TYPES,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
    SEQ_CLS_HEAD_NAMES,
    TASK_HEADS,
    table_targets,
)
from .names import check_pattern, did_you_mean, layer_filter, layer_of, listed, match, minimal_targets, spelled, suffixes
from .tree import Place, join, owner, places, through

__all__ = ["Coverage", "Place", "Selection", "check_pattern", "match", "minimal_targets", "places", "select", "suffixes"]

Supports = Callable[[nn.Module], object]

_EXCLUDED = "excluded by exclude_modules"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass
class Coverage:
    """How much of the model a target reaches: modules (or parameters) hit, and layers hit `of` the layers there are."""

    count: int
    layers: int
    of: int


@dataclass
class Selection:
    """What a config hits in a model.

    Paths say where a module hangs now (`model.get_submodule(path)`); they differ from names only inside modules that
    are wrapped already, such as `attn.base_layer.out_proj` for the name `attn.out_proj`.

    Attributes:
        modules: path -> module, in the order of named_modules; where the module is adapted already, the adapted layer
            around it. A module that hangs in several places is listed once, under the first.
        names: path -> the module's name in the user's own model, for all of `modules`, `to_save` and the owners of
            `parameters`.
        aliases: path -> the other paths of a module that hangs in several places.
        parameters: `<path of the owner>.<parameter>` for target_parameters, in the order of the model.
        to_save: path -> module for modules_to_save.
        skipped: name -> why a module that the targets name is left out.
        unmatched: entries that match nothing (only where that is no error).
        resolved_targets: what belongs into `config.target_modules`.
        coverage: by entry of the targets, or by the last part of the names where the targets are no list.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    to_save: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    resolved_targets: set[str] | str | None = None
    coverage: dict[str, Coverage] = field(default_factory=dict)


def _model_type(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    found = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    return found if isinstance(found, str) else None


def _from_transformers(module: nn.Module, file: str, name: str) -> bool:
    """Whether a module is of a class of transformers, without importing it."""
    cls = getattr(sys.modules.get(f"transformers.{file}"), name, None)
    return isinstance(cls, type) and isinstance(module, cls)


def select(
    model: nn.Module,
    config: Any,
    *,
    supports: Supports,
    state_dict: Mapping[str, Tensor] | None = None,
    strict: bool = True,
) -> Selection:
    """What `config` hits in `model`, adapted already or not.

    Args:
        model: the user's model, not a PeftModel.
        config: a PeftConfig; of its fields `target_modules, exclude_modules, modules_to_save, layers_to_transform,
            layers_pattern, rank_pattern, alpha_pattern, target_parameters` count, where it has them. A method
            `default_targets(model) -> list | str | None` goes before the tables where `target_modules` is None, and a method
            `pick(names of all modules, names of those that can be adapted) -> names` before everything.
        supports: whether the method can adapt a module; it gets the module itself, never an adapted layer.
        state_dict: an adapter's tensors: the modules are those that appear in its keys, whatever the targets say.
        strict: an entry that matches nothing is an error. Never so with a state_dict or `config.inference_mode`: there
            the exact check of the file's keys protects the user.

    Raises:
        NoMatchingPeftModuleError: if nothing is hit, or (strict) an entry hits nothing.
        ConfigError: if a target cannot be adapted, or an adapter on it would not act, or there are no targets and no
            table for the model type.
    """
    search = _Search(model, config, supports, strict and state_dict is None and not config.inference_mode)
    search.take_to_save()
    if getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES:
        search.result.resolved_targets = DUMMY_TARGET_MODULES
        return search.result
    if config.is_prompt_learning:  # adapts no layers
        return search.result
    if state_dict is None:
        search.take_targets()
    else:
        search.take_keys(state_dict)
    search.take_parameters()
    search.finish()
    return search.result


class _Search:
    """One run of `select`."""

    def __init__(self, model: nn.Module, config: Any, supports: Supports, strict: bool) -> None:
        self.model, self.config, self.supports, self.strict = through(model, "")[1], config, supports, strict
        self.model_type = _model_type(self.model)
        self.places = places(model)
        self.adapted = [p for p in self.places if p.adapted]
        self.names = [n for p in self.places for n in p.all_names]
        self.result = Selection()
        self.hits: dict[str, list[Place]] = {}  # entry -> what it adapts, which may be nothing if all is left out
        self.parameter_names: list[str] = []
        self.saved: set[str] = set()

    def field(self, name: str) -> Any:
        return getattr(self.config, name, None)

    def put(self, where: dict[str, nn.Module], place: Place) -> None:
        where[place.path] = place.module
        self.note(place)

    def note(self, place: Place) -> None:
        self.result.names[place.path] = place.name
        if place.other:
            self.result.aliases[place.path] = list(place.other)

    # ------------------------------------------------ modules_to_save and exclude_modules

    def take_to_save(self) -> None:
        entries = list(self.field("modules_to_save") or ())
        automatic = TASK_HEADS.get(name_of(self.config.task_type), ())
        found: set[str] = set()
        for place in self.places:
            # as in PEFT, no dot has to stand before the entry: `classifier` also means `pre_classifier` (DistilBERT)
            hit = {e for e in entries if any(n.endswith(e) for n in place.all_names)}
            found |= hit
            if hit and not self.is_saved(place.all_names):
                self.check_to_save(place)
                self.put(self.result.to_save, place)
                self.saved.add(place.name)
        missing = [e for e in entries if e not in found and e not in automatic]
        if missing and self.strict:
            raise NoMatchingPeftModuleError(
                f"modules_to_save: {listed(missing)} matches no module of the model, so nothing is trained there."
                f"{did_you_mean(missing[0], self.names)}"
            )
        self.result.unmatched += missing
        if set(automatic) & set(entries) and not found and self.strict:
            _warn(
                f"The task type asks to train the model's head, but no module is called {' or '.join(automatic)}: "
                "the head stays frozen. If it is new, name it in modules_to_save."
            )

    def check_to_save(self, place: Place) -> None:
        said = f"modules_to_save: {place.name!r} cannot be trained whole: "
        if isinstance(place.base, _CONTAINERS):
            raise ConfigError(f"{said}a {type(place.base).__name__} has no forward of its own. Name the modules in it.")
        within = place.name + "."
        inner = next((p for p in self.adapted if (p.name + ".").startswith(within)), None)
        if inner is not None:
            raise ConfigError(f"{said}{inner.name!r} is adapted already. Delete that adapter first, or leave this module out.")

    def is_saved(self, names: Iterable[str]) -> bool:
        """Whether these names are of, or inside, a module of `to_save`."""
        return any(part in self.saved for n in names for part in itertools.accumulate(n.split("."), join))

    def exclusions(self) -> Callable[[Place], str | None]:
        """A function that tells why a place is left out, or None."""
        spec = self.field("exclude_modules") or ()
        dropped = set(match(self.names, spec)) if spec else set()
        reached = {spec} if isinstance(spec, str) and dropped else {s for n in dropped for s in suffixes(n)}
        dead = sorted({spec} - reached if isinstance(spec, str) else set(spec) - reached)
        if dead and self.strict:
            _warn(
                f"exclude_modules: {listed(dead)} matches no module of the model: it excludes nothing.{did_you_mean(dead[0], self.names)}"
            )

        def why(place: Place) -> str | None:
            if not dropped.isdisjoint(place.all_names):
                return _EXCLUDED
            return "trained whole (modules_to_save)" if self.is_saved(place.all_names) else None

        return why

    # ------------------------------------------------ target_modules

    def take_targets(self) -> None:
        spec, named = self.targets()
        all_linear = isinstance(spec, str) and spec.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        why_not = self.exclusions()
        matched: list[str] = []
        for place, entries in self.all_linear() if all_linear else self.matches(spec):
            reason = why_not(place) or self.unfit(place, explicit=not all_linear)
            if reason is not None:
                self.result.skipped[place.name] = reason
            else:
                self.put(self.result.modules, place)
            # `all-linear` is written as names; with those that exclude_modules takes out again they can be shorter
            if not all_linear or reason in (None, _EXCLUDED):
                matched.append(place.name)
            for e in entries:
                self.hits.setdefault(e, []).extend([place] if reason is None else [])
        self.result.resolved_targets = self.resolved(spec, matched, all_linear) if self.field("pick") is None else None
        if isinstance(spec, str):
            self.result.unmatched += [] if matched or all_linear else [spec]
        elif named:  # a table may name more than a model has
            self.result.unmatched += sorted(set(spec) - set(self.hits))

    def targets(self) -> tuple[str | Collection[str], bool]:
        """The targets, and whether the user has named them."""
        spec, pick = self.field("target_modules"), self.field("pick")
        if pick is not None:
            return pick(self.names, self.adaptable()), True
        if spec is not None:
            return spec, True
        default, model_type = self.field("default_targets"), self.model_type
        found = default(self.model) if default is not None else None
        if found is None and model_type is not None:
            found = table_targets(name_of(self.config.peft_type), model_type)
        if found is not None:
            return found, False
        if self.field("target_parameters"):
            return (), True
        known = "The model has no `config.model_type`" if model_type is None else f"There is no table for {model_type!r}"
        raise ConfigError(
            f"Please specify `target_modules` in `peft_config`. {known}. {self.could_be()} "
            f"target_modules={INCLUDE_LINEAR_LAYERS_SHORTHAND!r} takes every linear layer."
        )

    def matches(self, spec: str | Collection[str]) -> Iterator[tuple[Place, list[str]]]:
        """The places that the targets name, and by which entries (for a regular expression: the name's last part)."""
        if isinstance(spec, str):
            yield from ((p, [p.last]) for p in self.places if match(p.all_names, spec))
            return
        entries, in_layers = set(spec), layer_filter(self.config, self.names, self.strict)
        for place in self.places:
            # an entry that is a whole name counts whatever its layer
            hit = {s for n in place.all_names for s in suffixes(n) if s in entries and (s == n or in_layers(n))}
            if hit:
                yield place, sorted(hit)

    def all_linear(self) -> Iterator[tuple[Place, list[str]]]:
        """Linear layers, quantised ones too, but not the output embedding or the head of a transformers model."""
        heads: list[Place] = []
        if _from_transformers(self.model, "modeling_utils", "PreTrainedModel"):
            output = self.model.get_output_embeddings()  # type: ignore[operator]
            if output is not None:
                output = through(output, "")[1]
                heads = [p for p in self.places if output in (p.module, p.base)]
            elif self.config.task_type == "SEQ_CLS":
                heads = [p for p in self.places if p.last in SEQ_CLS_HEAD_NAMES]
        for place in self.places:
            linear = isinstance(place.base, nn.Linear) or _from_transformers(place.base, "pytorch_utils", "Conv1D")
            sized = all(isinstance(getattr(place.base, n, None), int) for n in ("in_features", "out_features"))
            if linear or ((sized or supported(place.base) == "linear") and self.supports(place.base)):
                if place in heads:
                    self.result.skipped[place.name] = "it is the output layer"
                else:
                    yield place, [place.last]

    def unfit(self, place: Place, explicit: bool) -> str | None:
        """Why a target cannot be adapted, or None. For targets that the user has named, an error."""
        around = place.attention
        if around is not None and around.path in self.result.modules:
            return f"adapted together with {around.name!r}"
        dead = self.bypassed(place)
        cause = dead
        if cause is None and place.saved:
            cause = "another adapter trains it whole (modules_to_save); delete that adapter first"
        if cause is None and not self.supports(place.base):
            kinds = ", ".join(sorted(self.field("kinds") or ()))
            inside = {p.last for p in self.places if p.name.startswith(place.name + ".") and self.supports(p.base)}
            one_by_one = hasattr(self.config, "target_parameters")
            own = [f"{place.name}.{k}" for k in place.parameters if one_by_one and place.base._parameters[k].ndim > 1]  # type: ignore[union-attr]
            cause = (
                f"{type(self.config).__name__} cannot adapt a {type(place.base).__name__}"
                + (f", only modules of the kinds {kinds}" if kinds else "")
                + (f"; in it there are {listed(inside)}" if inside else "")
                + (f"; target_parameters={own} adapts what it holds itself" if own else "")
            )
        if cause is None or not explicit:
            return cause
        if dead and not self.strict:  # in the training that made the adapter it did not act either
            _warn(f"The adapter on {place.name!r} does not act: {cause}.")
            return None
        cause += ", so its adapter would not act" if dead else ""
        raise ConfigError(
            f"Target module {place.name!r} ({type(place.base).__name__}) is not supported: {cause}. {self.could_be()} "
            "exclude_modules leaves modules out."
        )

    def bypassed(self, place: Place) -> str | None:
        """Why an adapter on a module would not act although it could be attached, or None."""
        if place.attention is not None:
            return f"the MultiheadAttention {place.attention.name!r} (target that instead) reads its weight directly"
        model_type, last = self.model_type, place.last
        if last in MAMBA_BARE_MODULES and model_type in MAMBA_MODEL_TYPES:
            return f"the fused kernels of {model_type} models read its weight directly"
        if last == "dt_proj" and model_type in MAMBA_BARE_STEPS and not hasattr(self.model.config, "_is_quantized"):
            return f"{model_type} models read its weight directly"
        if place.around is not None and reads_bare(place.around, last):
            return f"{type(place.around).__name__} reads its weight directly and never calls it"
        return None

    def resolved(self, spec: str | Collection[str], matched: list[str], all_linear: bool) -> set[str] | str | None:
        """What to write as target_modules: the user's spelling; names for `all-linear`; short ends for long lists."""
        if not all_linear and (isinstance(spec, str) or not spec):
            return spec if isinstance(spec, str) else None if self.field("target_modules") is None else set()
        names = set(matched if all_linear else spec)
        # feedforward_modules (IA3) refers to the targets by the same names once more
        short = len(names) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION and not hasattr(self.config, "feedforward_modules")
        if all_linear or (short and self.strict and self.field("layers_to_transform") is None):
            return spelled(set(matched), self.names, short)
        return names

    # ------------------------------------------------ the keys of an adapter, instead of targets

    def take_keys(self, state_dict: Mapping[str, Tensor]) -> None:
        by_name = {n: p for p in self.places for n in p.all_names}
        prefix = self.field("prefix") or ""
        found: set[Place] = set()
        for key in state_dict:
            name, rest = owner(key, by_name)
            if name and rest and rest[0].startswith(prefix) and not _has_tensor(by_name[name].base, rest[0]):
                found.add(by_name[name])
        for place in self.places:
            # a module that is no site holds adapted parameters, which the config names
            of_parameters = self.field("target_parameters") and not self.supports(place.base)
            if place in found and not of_parameters and self.unfit(place, explicit=True) is None:
                self.put(self.result.modules, place)
                self.hits.setdefault(place.last, []).append(place)
        if not self.result.modules and not self.field("target_parameters"):
            raise NoMatchingPeftModuleError(
                f"No key of the state_dict belongs to a module of the model. It has {len(state_dict)} keys, such as "
                f"{listed(list(state_dict)[:3])}; the model's modules have names such as "
                f"{listed(self.adaptable()[:3])}."
            )
        try:
            planned = select(self.model, self.config, supports=self.supports, strict=False)
        except PeftError:
            planned = None  # its targets are not for this model
        if planned is not None and set(planned.modules) == set(self.result.modules):
            self.result.resolved_targets = planned.resolved_targets
            return
        got = {self.result.names[p] for p in self.result.modules}
        self.result.resolved_targets = spelled(got, self.names, len(got) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION)
        if planned is not None or self.field("target_modules") is not None:
            wanted = {planned.names[p] for p in planned.modules} if planned is not None else set()
            _warn(
                "The config and the state_dict differ; the modules are those of the state_dict."
                + (f" Only the config has {listed(wanted - got)}." if wanted - got else "")
                + (f" Only the state_dict has {listed(got - wanted)}." if got - wanted else "")
            )

    # ------------------------------------------------ target_parameters

    def take_parameters(self) -> None:
        entries = set(self.field("target_parameters") or ())
        reached: set[str] = set()
        taken: dict[str, Place] = {}
        for place in self.places if entries else ():
            for key in place.parameters:
                hit = {s for n in place.all_names for s in suffixes(f"{n}.{key}") if s in entries}
                reached |= hit
                if hit and (place.saved or self.is_saved(place.all_names)):
                    self.result.skipped[f"{place.name}.{key}"] = "trained whole (modules_to_save)"
                elif hit:
                    taken[f"{place.name}.{key}"] = place
                    for e in hit:
                        self.hits.setdefault(e, []).append(place)
        for name, place in taken.items():
            self.parameter_names.append(name)
            self.result.parameters.append(f"{place.path}.{name.rpartition('.')[2]}")
            self.note(place)
        missing = sorted(entries - reached)
        if missing and self.strict and (taken or self.result.modules):
            raise NoMatchingPeftModuleError(
                f"target_parameters: {listed(missing)} matches no parameter of the model, so nothing there would be "
                f"trained.{self.parameter_hint(missing[0])}"
            )
        self.result.unmatched += missing

    # ------------------------------------------------ the end

    def finish(self) -> None:
        modules = self.result.modules
        if not modules and not self.result.parameters:
            raise NoMatchingPeftModuleError(self.nothing())
        if self.strict and self.result.unmatched:
            missing, layers = self.result.unmatched, self.field("layers_to_transform")
            elsewhere = [e for e in missing if layers is not None and match(self.names, [e])]
            why = f" {listed(elsewhere)} is in none of the layers {layers} (layers_to_transform): give its whole name."
            raise NoMatchingPeftModuleError(
                f"target_modules: {listed(missing)} matches no module of the model, so nothing there would be trained."
                f"{why if elsewhere else ''}{did_you_mean(missing[0], self.names)} Correct or remove it. "
                f"{self.could_be()}"
            )
        if self.strict:
            names = [self.result.names[p] for p in modules] + self.parameter_names
            for name in ("rank_pattern", "alpha_pattern"):
                # lists as values are the outcome of a training (AdaLoRA), not a wish
                wishes = {k: v for k, v in (self.field(name) or {}).items() if isinstance(v, (int, float))}
                check_pattern(name, wishes, names, self.config)
        stacks: dict[str, set[str]] = {}
        for stack, index in filter(None, map(layer_of, self.names)):
            stacks.setdefault(stack, set()).add(index)
        for entry, hits in self.hits.items():
            layers_hit = {x for x in (layer_of(p.name) for p in hits) if x}
            there = sum(len(stacks[s]) for s in {s for s, _ in layers_hit})
            self.result.coverage[entry] = Coverage(len(hits), len(layers_hit), there)

    def nothing(self) -> str:
        """Why nothing at all is hit."""
        spec, layers = self.field("target_modules"), self.field("layers_to_transform")
        if self.result.skipped and set(self.result.unmatched) != ({spec} if isinstance(spec, str) else set(spec or ())):
            left_out = listed([f"{n}: {why}" for n, why in self.result.skipped.items()], quoted=False)
            also = f" {listed(self.result.unmatched)} matches nothing." if self.result.unmatched else ""
            return (
                f"No modules were targeted for adaptation: all that the targets hit is left out ({left_out}).{also} "
                "Change target_modules, exclude_modules or modules_to_save."
            )
        if not spec:
            guess = self.parameter_hint(self.result.unmatched[0]) if self.result.unmatched else ""
            return f"No `target_modules` passed but also no `target_parameters` found.{guess} {self.could_be()}"
        text = f"Target modules {spec if isinstance(spec, str) else listed(set(spec))} not found in the base model."
        if layers is not None:
            text += f" Only the layers {layers} count (layers_to_transform)"
            rule = "; without `layers_pattern`, two names have to stand before a layer's number."
            text += "." if self.field("layers_pattern") else rule
        if self.result.unmatched and isinstance(spec, str):
            text += " A str is a regular expression for the whole name; for the ends of names, give a list"
            text += f": {[spec]}." if match(self.names, [spec]) else "."
        return f"{text}{did_you_mean(spec if isinstance(spec, str) else min(spec), self.names)} {self.could_be()}"

    def adaptable(self) -> list[str]:
        return [p.name for p in self.places if not p.saved and self.bypassed(p) is None and self.supports(p.base)]

    def could_be(self) -> str:
        ends = {n.rpartition(".")[2] for n in self.adaptable()}
        if not ends and self.supports(self.model):
            return "The model itself could be adapted, but not as the top module: put it into an nn.Sequential."
        if not ends:
            return "No module of the model can be adapted by this method."
        return f"Modules that can be adapted are called {listed(ends)}."

    def parameter_hint(self, entry: str) -> str:
        guess = did_you_mean(entry, [f"{p.name}.{k}" for p in self.places for k in p.parameters])
        return f"{guess} Entries are names of parameters or their ends, such as 'experts.down_proj'."


def _has_tensor(module: nn.Module, name: str) -> bool:
    return name in module._parameters or name in module._buffers


def _warn(text: str) -> None:
    warnings.warn(text, PeftWarning, stacklevel=2)
