"""The plug-in contract: a method is a config dataclass with its mathematics.

A method file states its hyper-parameters as dataclass fields, the tensors it needs per adapted layer (`leaves`) and how they change the
frozen weight (`change`). Everything else (injection, training, merging, saving, mixed batches) is the engine's and comes for free.

Long, since it has every hook with what it means to those who write methods, and the checks that all methods' fields go through.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from .config import PeftConfig
from .errors import ConfigError, PeftWarning, hint
from .types import PeftType, name_of

if TYPE_CHECKING:
    from .change import Attend, Beside, Change, Swap
    from .engine.calls import Call
    from .engine.parts import Parts
    from .engine.place import Place
    from .sites import Site

T = TypeVar("T")
M = TypeVar("M", bound="Method")
Init = Callable[[Tensor], object]


@dataclass(eq=False)
class Leaf:
    """One small tensor that a method keeps per adapted layer and adapter.

    Args:
        shape: its shape.
        init: fills a freshly allocated tensor in place with start values (may be overridden by `Method.start`).
        container: the layer's attribute that holds it for every adapter; the leaf's own name if not given.
        attr: `"weight"`, `"0.bias"`: in memory it is `<container>.<adapter>.<attr>`; None: `<container>.<adapter>`.
        on_disk: what follows the layer's path in the file; `<container>[.<attr>]` if not given.
        trainable: whether it is a parameter that gets gradients; otherwise a frozen tensor.
        dtype: its dtype where that is not the adapter's, such as for indices; a file does not change it.
        running: whether it changes by itself in training, as a running mean does: then it is a buffer.
        saved: True: in the adapter file; "start": in the sidecar of start values; False: never (it can be rebuilt).
        users: of a tensor that places share: those that do, each of which knows it by its container's name. Not given: all, by its own name.
        everywhere: of a shared tensor: every layer has it under its own path as well, and so has the file. Then it needs no other home.
    """

    shape: tuple[int, ...]
    init: Init
    container: str | None = None
    attr: str | None = None
    on_disk: str | None = None
    trainable: bool = True
    running: bool = False
    saved: bool | Literal["start"] = True
    dtype: torch.dtype | None = None
    users: Sequence[Place] | None = None
    everywhere: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "init": _made, "users": None}  # the tensor has been made; a start may be any local function


def _made(t: Tensor) -> Tensor:
    return t


def of_training(name: str) -> Any:
    """For `Method.tuner_methods`: calls `name(sites, *args)` of the config of every adapter that trains, such as a schedule's step in a loop that drives it."""
    return lambda tuner, *args: tuner.ask_training(name, *args)


def of_acting(path: str) -> Any:
    """For `Method.tuner_methods`: calls `path` of the config of the adapter that acts."""
    return lambda tuner, *args: tuner.ask_acting(path, *args)


METHODS: dict[str, type[PeftConfig]] = {}  # weight methods and prompts
KINDS = ("linear", "embedding", "conv", "attention", "parameter", "module", "self_attention", "block")


def register(cls: type[PeftConfig], peft_type: str) -> None:
    """Let files that say `peft_type` mean this class. The same class may be defined again, as in a notebook.

    Raises:
        ConfigError: if another class has the name: files of that one would be read as of this one.
    """
    same = METHODS.get(peft_type)
    ours = cls.__module__.partition(".")[0] == __package__
    if (peft_type.upper() in PeftType.__members__ and not ours) or (same is not None and _defined(same) != _defined(cls)):
        holder = f"{same.__module__}.{same.__qualname__}" if same is not None else "one of veneer's own"
        raise ConfigError(
            f"{cls.__qualname__}: the peft_type {peft_type!r} is taken by another method ({holder}), whose files would be read as of this one. "
            "Give a name of its own."
        )
    METHODS[peft_type] = cls


def _defined(cls: type) -> tuple[str, str]:
    """Where a class is written: a file may be both `__main__` and a module."""
    return str(getattr(sys.modules.get(cls.__module__), "__file__", None) or cls.__module__), cls.__qualname__


@dataclass
class Method(PeftConfig):
    """Base of every weight-space method. Abstract: `leaves` and `change` must be given.

    Class attributes:
        prefix: what the names of its tensors start with, such as `lora_`.
        kinds: the kinds of site it adapts: `linear`, `embedding`, `conv`, `attention`, `parameter`, `module`, `self_attention`, `block`.
        stacking: how several active adapters act together: `"sum"` adds their differences to the frozen weight, `"chain"` applies one
            after another.
        tuner_methods: further methods of `model.base_model`, by name: functions of the tuner, such as those that `of_training` and `of_acting` make.
        dry: the kinds of site on which its dropout has nothing to drop.
        unmergeable: why no weight holds the change, for one that depends on the input; empty if it can be merged.
        linear_in: the tensor in which the change is linear if all others are the same: then adapters add up to one of their own kind.
        patterns: which field has the values of another by module, as `rank_pattern` those of `r`; keys are ends of names (see `by_pattern`).
        positive: fields that must be above zero, also in their patterns; None is as good for one whose default it is.
        shares: fields that must lie in [0, 1), as those must whose names end in `dropout`.
        choices: fields that take one of few values.
        routes: whether the change depends on the call: then `facts` is asked at each.
        takes: arguments of the model's forward and generate that are meant for the method and not for the base model.
        in_pieces: whether it is known to train right where DeepSpeed's ZeRO-3 keeps every tensor in pieces; without it, that is refused.
        examples: fields that suit small layers: what the laws hold the method to, and the table in the docs shows.
        exceptions: the laws (see `veneer.testing`) that the method does not keep, each with the reason.
    """

    prefix: ClassVar[str] = ""
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    stacking: ClassVar[Literal["sum", "chain"]] = "chain"
    tuner_methods: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    dry: ClassVar[frozenset[str]] = frozenset({"embedding"})
    unmergeable: ClassVar[str] = ""
    linear_in: ClassVar[str] = ""
    patterns: ClassVar[Mapping[str, str]] = MappingProxyType({})
    positive: ClassVar[tuple[str, ...]] = ()
    shares: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})
    routes: ClassVar[bool] = False
    takes: ClassVar[tuple[str, ...]] = ()
    in_pieces: ClassVar[bool] = False
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    exceptions: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init_subclass__(cls, peft_type: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for kind in sorted(set(cls.kinds) - set(KINDS)):
            raise ConfigError(
                f"{cls.__qualname__}: `kinds` has {kind!r}, and sites are of the kinds {', '.join(KINDS)}.{hint(kind, KINDS)}"
            )
        if isinstance(cls.stacking, str) and cls.stacking not in ("sum", "chain"):  # one method has it as a property
            raise ConfigError(f"{cls.__qualname__}: `stacking` is 'sum' or 'chain', got {cls.stacking!r}.")
        if peft_type is not None:
            if not cls.prefix:
                raise ConfigError(f"{cls.__qualname__} has no `prefix`: what the names of its tensors start with, such as 'lora_'.")
            register(cls, peft_type)
            cls._peft_type_name = peft_type

    _peft_type_name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self)._peft_type_name
        self._check_class(name)
        self.peft_type = PeftType(name) if name in PeftType.__members__ else name  # type: ignore[assignment]
        for field in ("target_modules", "exclude_modules"):
            value = getattr(self, field, None)
            if isinstance(value, (list, tuple)):
                setattr(self, field, set(value))
        self._check_fields()

    def _check_class(self, name: str) -> None:
        """What would make a file that nothing reads back: no name of the method, or options that are no fields."""
        cls = type(self)
        if not name:
            raise ConfigError(
                f"{cls.__qualname__} has no peft_type, so no file could say of which method it is. Define it as "
                f"`class {cls.__name__}({cls.__bases__[0].__name__}, peft_type={cls.__name__.removesuffix('Config').upper()!r})`."
            )
        if "__dataclass_fields__" not in vars(cls):
            bare = [n for n, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)]
            if bare:
                raise ConfigError(f"{cls.__qualname__}: `{bare[0]}` is no field, so no file would hold it. Put @dataclass above the class.")

    def _check_fields(self) -> None:
        for field in self.positive:
            pattern, usual = getattr(self, self.patterns.get(field, ""), None) or {}, self.__dataclass_fields__[field].default
            kind: Any = (int, float) if isinstance(usual, float) else int
            for value in (getattr(self, field), *pattern.values()):
                if (isinstance(value, bool) or not isinstance(value, kind) or value <= 0) and not (value is None and usual is None):
                    what = "integer value" if kind is int else "number"
                    raise ConfigError(f"`{field}` should be a positive {what} but the value passed is {value!r}.")
        drops = (f.name for f in dataclasses.fields(self) if f.name.endswith("dropout") and type(f.default) in (int, float))
        for field in dict.fromkeys((*self.shares, *drops)):
            share = getattr(self, field)
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
                raise ConfigError(f"`{field}` should lie in [0, 1), got {share!r}.")
        for f in dataclasses.fields(self):  # what is drawn from them stands in no file
            if f.name.endswith(("seed", "prng_key")) and type(f.default) is int and type(seed := getattr(self, f.name)) is not int:
                raise ConfigError(
                    f"`{f.name}` should be an integer, which makes the same numbers when the adapter is loaded, got {seed!r}."
                )
        for field, known in self.choices.items():
            if (value := getattr(self, field)) not in known:
                raise ConfigError(f"`{field}` is one of {', '.join(map(repr, known))}, got {value!r}.{hint(str(value), map(str, known))}")

    def leaves(self, site: Place) -> Mapping[str, Leaf]:
        """The tensors this method keeps at `site`, by name."""
        raise NotImplementedError(f"{type(self).__name__} has to define `leaves(site)`")

    def change(self, p: Any, site: Place) -> Change | Swap | Attend | Beside:
        """How the tensors `p` (by attribute) change the frozen weight at `site`, or what else its kind takes. Pure: no state, no side effects."""
        raise NotImplementedError(f"{type(self).__name__} has to define `change(p, site)`")

    def start(self, site: Place, *, only_frozen: bool = False) -> Mapping[str, Tensor]:
        """Start values that depend on the frozen weight, by leaf name; `only_frozen` when a file brings the trained ones."""
        return {}

    def without_start(self) -> str:
        """What is doubtful about an adapter whose file lacks the frozen start values that its change is counted from; empty: nothing."""
        return ""

    def survey(self, sites: Mapping[str, Site]) -> None:
        """All the layers that the adapter will be on, by path, before it has tensors on any: for what is shared out between them."""

    def shared(self, sites: Sequence[Place]) -> Mapping[str, Leaf]:
        """Tensors that all adapted layers of one adapter share; `change` gets them among `p`. They belong to the model, not to a layer."""
        return {}

    def common(self, sites: Sequence[Place]) -> Mapping[str, Sequence[Hashable]]:
        """Leaves that groups of layers have in common: by leaf, a key for each site. Sites of one key have one tensor, which is in the file under
        each of their names; in memory the first keeps it."""
        return {}

    def tied(self) -> Mapping[str, tuple[str, bool]]:
        """What a head takes of the adapter on the embedding whose weight it shares: by its own leaf, the embedding's, and whether it is transposed.
        Empty: such a head has tensors of its own, where it is a target, or none."""
        return {}

    def modules(self, model: nn.Module, sites: Sequence[Place], *, empty: bool = False) -> Mapping[str, nn.Module]:
        """Whole modules that the adapter trains outside the model's layers, by their names in the file: the tuner keeps them.

        In memory they are `<first part of the name>.<adapter>`. A parameter that requires no gradient never trains.

        Args:
            model: the user's model.
            empty: whether a file is going to fill them.
        """
        return {}

    def settle(self, here: Sequence[tuple[Place, Any]], loaded: bool) -> None:
        """Fill, in place, tensors that follow from others: when an adapter has been made, and again when a file has brought its tensors.

        Args:
            here: each place with its tensors (by attribute, as `change` gets them), in order.
            loaded: whether they come from a file.

        Raises:
            LoadError: if what a file has brought does not go with the frozen weights.
        """

    def facts(self, call: Call) -> Mapping[str, Any]:
        """For methods that route: what `change` has to know of one call of the model; it finds it as `site.fact(name)`.

        Returns:
            tensors with one row per row of the batch; for `block` and `self_attention` sites, anything, about the adapter's own rows.
        """
        return {}

    def finish(self, call: Call, output: Any) -> Any:
        """For methods that route: what a call of the model returns, from what the model gave."""
        return output

    def generating(self, asked: Callable[[str], Any]) -> Mapping[str, Any]:
        """For methods that route: arguments of `generate` that have to be other than they are; `asked(name)` tells one as given or configured."""
        return {}

    def experts(self) -> Mapping[str, str | None]:
        """LoRA adapters of the model that this one mixes: by name, where each is loaded from if it is not there; None: from beside this one's own
        file only."""
        return {}

    def along(self) -> Sequence[str]:
        """Other adapters that train whenever this one does."""
        return ()

    def meet(self, model: nn.Module) -> None:
        """Fill fields that the user's model tells. Called before the adapter is attached.

        Raises:
            ConfigError: if the model does not suit the method.
        """

    def example_call(self, rows: int) -> dict[str, Tensor]:
        """For methods that take arguments of their own: those of a call with so many rows, for the laws."""
        return {}

    def before_step(self, sites: Sequence[Place], step: int) -> None:
        """Act when an optimizer is about to step (gradients are there): project them, measure importance. `step` counts from 0."""

    def after_step(self, sites: Sequence[Place], step: int) -> None:
        """Act when an optimizer has stepped (gradients are still there): follow a schedule. `step` counts from 1."""

    def penalty(self, p: Any, site: Any) -> Tensor | None:
        """A term whose gradient is added to that of the loss, per adapted layer."""
        return None

    def acts(self) -> bool:
        """Whether there is anything to do when an optimizer steps, or to remember: without it, the hooks above are not called, and nothing is carried."""
        return self.hooks_in()

    def hooks_in(self) -> bool:
        """Whether the method has any of the hooks above."""
        return any(getattr(type(self), n) is not getattr(Method, n) for n in ("before_step", "after_step", "penalty"))

    def check_saving(self, sites: Sequence[Place], step: int) -> None:
        """For methods that act at steps: put into the config what the file has to say of them, or raise SaveError if what would be saved
        is not what the method promises, such as a schedule that never advanced. `step`: how many steps were made."""

    def carried(self, sites: Sequence[Place]) -> Mapping[str, Tensor | float]:
        """What a method that acts at steps remembers from one to the next besides its tensors: whole, under names that hold in any layout. It goes
        into states of a training."""
        return {}

    def carry_on(self, sites: Sequence[Place], carried: Mapping[str, Any]) -> None:
        """Remember what `carried` gave when the training stopped, and nothing else; an empty mapping is a beginning.

        Raises:
            LoadError: if it is not of these layers; nothing is changed.
        """

    def as_saved(self: M, saved: Mapping[str, Any]) -> M:
        """The config that a file is read with: for fields that training changes, a copy with those of the file; else itself.

        Args:
            saved: the scaling fields of the config that the file was saved with.
        """
        return self

    def as_made(self: M, tensors: Mapping[str, Tensor]) -> M:
        """The config of an adapter that is to be loaded, as its tensors (by key of the file) are: for fields that PEFT writes down and does not heed."""
        return self

    def scale(self) -> float:
        """The nominal scaling of the change, by default the field `scaling`, if any; `site.scaling` is its present value."""
        return float(getattr(self, "scaling", 1.0))

    def at(self: M, name: str) -> M:
        """This config as it holds for the module called `name`: with the values of the `patterns`."""
        if not any(getattr(self, pattern) for pattern in self.patterns.values()):
            return self
        tables = ((field, getattr(self, pattern), getattr(self, field)) for field, pattern in self.patterns.items())
        other = {field: value for field, table, usual in tables if (value := by_pattern(table, name, usual, self.fits)) != usual}
        if not other:
            return self
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PeftWarning)  # said when the config was made
            return dataclasses.replace(self, **other)

    @staticmethod
    def fits(key: str, name: str) -> bool:
        """Whether a key of the `patterns` means the module called `name`."""
        return fits(key, name)

    def over(self, here: Mapping[str, Mapping[str, Any]]) -> Method:
        """This config with the fields that `here` gives by module; what differs between modules goes into the `patterns`. Undoes `at`.

        Raises:
            ConfigError: if a field that has no pattern differs.
        """
        new: Method = spread_out(self, here, self.patterns)
        return new

    def combine(self, parts: Parts, site: Place) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        """One adapter of this config's kind that does on a layer what several, each times its weight, do together.

        Returns:
            the fields of its config on this layer where they differ from this one's, and its tensors.

        Raises:
            ConfigError: if no adapter of this kind does that.
        """
        return {}, parts.summed_in(self.linear_in)

    def has_delta(self) -> bool:
        """Whether what the adapter does to a layer is a ΔW, which other methods can take over."""
        return not self.unmergeable

    def check(self, site: Place) -> None:
        """Raise ConfigError if an option cannot act at `site`."""

    def check_together(self, others: Sequence[Method]) -> None:
        """Raise RouteError if this adapter cannot act at one place together with `others`, which come after it."""

    def dropout(self) -> float:
        """The probability with which entries of the input are dropped before the additive part, in training: the field `<prefix>dropout`, if any."""
        return float(getattr(self, f"{self.prefix}dropout", 0.0))

    def skip(self) -> float:
        """The probability with which, in training, the additive part does not act on a layer for a call."""
        return 0.0


@functools.lru_cache(maxsize=65536)
def ending(key: str) -> re.Pattern[str]:
    """What a key of a pattern table means: a regular expression for the end of a module's name, at a dot."""
    return re.compile(rf"(.*\.)?({key})$")


def fits(key: str, name: str) -> bool:
    """Whether a name ends with what a key of a pattern table means."""
    return ending(key).match(name) is not None


def by_pattern(table: Mapping[str, T] | None, name: str, default: T, fits: Callable[[str, str], bool] = fits) -> T:
    """The value for a module in a `rank_pattern` or `alpha_pattern`: that of the first key that its name ends with.

    Args:
        table: key (a regular expression) -> value.
        name: the module's name, or the parameter's for target_parameters.
        default: where no key fits.
        fits: what fitting means, if it is not that.
    """
    return next((value for key, value in (table or {}).items() if fits(key, name)), default)


def spread_out(config: Method, here: Mapping[str, Mapping[str, Any]], patterns: Mapping[str, str]) -> Any:
    """A config with the fields that `here` gives by module: the most frequent value as the field itself, others in its pattern."""
    fields: dict[str, Any] = {pattern: {} for pattern in patterns.values()}
    for field in dict.fromkeys(f for values in here.values() for f in values):
        values = {name: v[field] for name, v in here.items() if field in v}
        distinct: list[Any] = []  # of any type, hashable or not
        for v in values.values():
            if v not in distinct:
                distinct.append(v)
        common = distinct[0] if len(distinct) == 1 else max(distinct, key=lambda v: sum(v == w for w in values.values()))
        others = {name: v for name, v in values.items() if v != common}
        if others and field not in patterns:
            raise ConfigError(
                f"{type(config).__name__}: `{field}` would be {common!r} on one layer and {others!r} on others, which no config can say."
            )
        fields[field] = common
        if field in patterns:
            fields[patterns[field]] = {_key(name, v, values): v for name, v in others.items()}
    return dataclasses.replace(config, **fields)


def _key(name: str, value: Any, values: Mapping[str, Any]) -> str:
    """The key of a pattern table for one module: its name, marked as a beginning if it is also the end of another's with another value."""
    alone = all(other == value or not ending(name).match(n) for n, other in values.items())
    return name if alone else f"^{re.escape(name)}"


def config_class(peft_type: str) -> type[PeftConfig]:
    """The config class of a PEFT type such as `"LORA"`, from veneer or registered by the user.

    Raises:
        ConfigError: if no method of that name exists; names the nearest ones.
    """
    name = name_of(peft_type)
    name = name if name in METHODS else name.upper()
    if name not in METHODS:
        load_methods()
    if name not in METHODS:
        raise ConfigError(
            f"Unknown peft_type {peft_type!r}. Known ones: {', '.join(sorted(METHODS))}.{hint(name, METHODS)} "
            "If it is a method of your own, import the file that defines it first."
        )
    return METHODS[name]


def load_methods() -> Mapping[str, type[PeftConfig]]:
    """Import every file of the rooms of methods; returns the registry."""
    for file in _files():
        importlib.import_module(file)
    return METHODS


def _files() -> list[str]:
    rooms = [importlib.import_module(f"{__package__}.{room}") for room in ("methods", "prompts", "blocks")]
    return [f"{room.__name__}.{info.name}" for room in rooms for info in pkgutil.iter_modules(room.__path__)]


def _offered(file: str) -> list[str]:
    """The public names of one method's file: its `__all__`, or else its config."""
    module = importlib.import_module(file)
    configs = [m for m in METHODS.values() if m.__module__ == file]
    return [
        *getattr(module, "__all__", [m.__name__ for m in configs]),
        *(m.__name__.removesuffix("Config") + "Model" for m in configs if issubclass(m, Method)),
    ]


def public_names() -> list[str]:
    """The public names of all methods: their configs, tuners and what else their files offer."""
    return [name for file in _files() for name in _offered(file)]


def public_name(name: str) -> Any:
    """What a public name of a method's stands for; None if there is none. The file that is called like it is looked into first."""
    stem = re.sub(r"(Config|Model)$", "", name).lower()
    for file in sorted(_files(), key=lambda f: f.rpartition(".")[2].replace("_", "") != stem):
        if name in _offered(file):
            home = importlib.import_module(file)
            return getattr(home, name) if hasattr(home, name) else getattr(importlib.import_module(f"{__package__}.tuner"), name)
    return None


@dataclass
class Targeted(Method):
    """Base of methods that take PEFT's usual fields for choosing layers.

    Args:
        target_modules, exclude_modules, layers_to_transform, layers_pattern: which modules; see `veneer.engine.select`.
        modules_to_save: modules trained whole beside the adapters.
        bias: which biases train: "none", "all", "<method>_only".
        fan_in_fan_out: kept for PEFT's files; the layer itself tells how it stores its weight.
        init_weights: whether the adapter starts as PEFT starts it.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    fan_in_fan_out: bool = False
    init_weights: Any = True

    also_only: ClassVar[tuple[str, ...]] = ()  # what PEFT's documentation calls "<method>_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = list(dict.fromkeys(("none", "all", f"{self.prefix}only", f"{self._peft_type_name.lower()}_only", *self.also_only)))
        if self.bias not in known:
            raise ConfigError(f"`bias` is one of {', '.join(known)}, got {self.bias!r}.{hint(str(self.bias), known)}")

    def to_dict(self) -> dict[str, Any]:
        # not every config of PEFT has all of these: at their defaults they are left out, so that PEFT reads our files without a word
        # (PEFT's own fields of each class are there even so where the method defines them itself)
        common = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "bias": "none", "fan_in_fan_out": False}
        if any(re.fullmatch("init_.+_weights", f.name) for f in dataclasses.fields(self)):  # of this method it has another name
            common["init_weights"] = True
        return {k: v for k, v in super().to_dict().items() if k not in common or v != common[k]}
