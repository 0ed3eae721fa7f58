"""Which tensor of a model stands under which key of an adapter file.

Keys come from exact module paths, never from parts of names, so adapters and modules may have any names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

from torch import Tensor, nn

from ..engine import offload
from ..engine.layer import get_slot
from ..errors import PeftError
from ..sharding import is_partitioned, shape_of, whole

PREFIX = "base_model.model."  # what the keys of a file start with: the path of the user's model in a PeftModel

# Names under which wrappers of other libraries hold the module they wrap. `module` is an ordinary name too.
_HIDDEN = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
WRAPPER_WORDS = _HIDDEN | {"module"}
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_BASE_CHILDREN = ("base_layer", "original_module", "token_adapter")


@runtime_checkable
class HasSlots(Protocol):
    """A module that holds tensors of adapters."""

    def adapter_slots(self, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """(name in the file, name in memory, attribute, owner) of each tensor, names relative to this module's path."""


@runtime_checkable
class HasStartSlots(Protocol):
    """A module some of whose adapters count their change from frozen start values, kept in a file of their own."""

    def adapter_start_slots(self, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """As `adapter_slots`, for the start values."""


@runtime_checkable
class HasSpareSlots(Protocol):
    """A module that a file may have tensors for which stand elsewhere already."""

    def adapter_spare_slots(self, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """As `adapter_slots`, for these."""


@dataclass(eq=False)
class Slot:
    """One tensor of an adapter (or trained with it) in a model.

    Attributes:
        key: its name in the file.
        memory_key: its name in the model's state dict.
        owner, attribute: where it is held.
        home: the module it acts on; tells the device where the tensor itself is not there yet.
        hole: what stands before and after the adapter's name in `memory_key`, or None.
        required: whether the adapter is incomplete without it.
        saved: whether it is written; others are only accepted from a file.
        base: whether it is a weight of the base model (a trained bias, a saved embedding), whose dtype a file does not change.
        kept: of a weight of the base model that adapters are merged into, its frozen values.
        tied_with: the slot whose tensor this one shares, transposed if `transposed`.
    """

    key: str
    memory_key: str
    owner: nn.Module
    attribute: str
    home: nn.Module
    hole: tuple[str, str] | None = None
    required: bool = True
    saved: bool = True
    base: bool = False
    kept: Tensor | None = None
    tied_with: Slot | None = None
    transposed: bool = False

    @property
    def tensor(self) -> Tensor:
        return get_slot(self.owner, self.attribute) if self.kept is None else self.kept

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.tensor)

    @property
    def elsewhere(self) -> bool:
        """Whether accelerate keeps it, a weight of the base model, in another place, and brings it in for each call. One that trains there is lost."""
        return self.base and self.tensor.is_meta and not self.tensor.requires_grad and offload.runs_on(self.owner) is not None

    def value(self) -> Tensor:
        """The tensor with all its numbers, wherever they are. All processes have to take part."""
        t = self.tensor
        return whole(offload.kept(self.owner, self.attribute, t) if self.elsewhere else t).detach()


# ---------------------------------------------------------------- walking a model


@dataclass(frozen=True, eq=False)
class Spot:
    """A module of the base model, or one that wraps it.

    Attributes:
        path: where it is, wrappers of other libraries left out: what keys are made of.
        memory: where it is, with everything.
        origin: where it was before anything was adapted.
        wrappers: the adapted layers around it, inmost last, each with the name it holds this module under.
    """

    path: str
    memory: str
    origin: str
    module: nn.Module
    wrappers: tuple[tuple[HasSlots, str], ...] = ()


def walk(model: nn.Module) -> Iterator[Spot]:
    """Every module of a model but those that hold adapters' tensors. A module that stands in two places comes twice."""
    stack = [Spot("", "", "", model)]
    while stack:
        spot = stack.pop()
        yield spot
        module = spot.module
        names = [n for n, child in module._modules.items() if child is not None]
        adapted = has_slots(module)
        base = next((n for n in _BASE_CHILDREN if n in names), None) if adapted else None
        for name in reversed([base] if base is not None else names):
            child = module._modules[name]
            assert child is not None
            wraps = hides(module, name)
            path, memory = spot.path if wraps else join_path(spot.path, name), join_path(spot.memory, name)
            origin = spot.origin if wraps or base is not None else join_path(spot.origin, name)
            around = spot.wrappers if wraps else ()
            if base is not None and has_slots(module):
                around = (*spot.wrappers, (module, name))
            stack.append(Spot(path, memory, origin, child, around))


def kept(spot: Spot, key: str) -> Tensor | None:
    """The frozen values of a tensor of the base that adapters are merged into."""
    path = ""
    for wrapper, child in reversed(spot.wrappers):
        held = getattr(wrapper, "originals", {}).get(join_path(path, key))
        if held is not None and held[1] is not None:
            frozen: Tensor = held[1]
            return frozen
        path = join_path(child, path)
    return None


def has_slots(module: nn.Module) -> TypeGuard[HasSlots]:
    """By type: wrappers that hand on attributes of the module inside must not count."""
    return issubclass(type(module), HasSlots)


def hides(module: nn.Module, child: str) -> bool:
    """Whether `module` is a wrapper of another library, whose child has no name of its own in a file."""
    return child in _HIDDEN or (child == "module" and isinstance(module, _PARALLEL))


def bare(model: nn.Module) -> nn.Module:
    """The model without wrappers of other libraries around the whole of it."""
    while (name := next((n for n in model._modules if hides(model, n)), None)) is not None:
        inner = model._modules[name]
        assert inner is not None
        model = inner
    return model


def is_wrapped(model: nn.Module) -> bool:
    """Whether this is a PeftModel (or the like) around the user's model, so that its own paths are the keys of the file."""
    return "base_model" in model._modules and hasattr(type(model), "get_base_model")


def base_root(model: nn.Module) -> nn.Module:
    """The user's model."""
    model = bare(model)
    if not is_wrapped(model):
        return model
    inner: nn.Module = model.get_base_model()  # type: ignore[operator]
    return bare(inner)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters in a model."""
    return list(dict.fromkeys(a for s in walk(bare(model)) for a in adapters_of(s.module)))


def adapters_of(module: object) -> list[str]:
    """The adapters a module holds tensors of; those of a module that does not tell are found with its layers."""
    tell = getattr(type(module), "adapters", None) if issubclass(type(module), HasSlots) else None
    return list(tell(module)) if callable(tell) else []


def join_path(path: str, name: str) -> str:
    """A dotted path of two, either of which may be empty."""
    return f"{path}.{name}" if path and name else path or name


# ---------------------------------------------------------------- the slots of an adapter


def slots(
    model: nn.Module,
    adapter_name: str,
    config: Any,
    *,
    start: bool = False,
    prefix: str | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Slot]:
    """Every tensor that belongs to an adapter, by its key in the file.

    Args:
        model: a PeftModel, or any model with adapted layers; a compiled, DDP or FSDP wrapper around it does not matter.
        config: the adapter's config. If it has `checkpoint_slots(model, adapter)`, this yields further tensors in the form of
            `adapter_slots`, with whole keys.
        start: the frozen start values instead.
        prefix: what keys start with; by default as in a file: the model's own path in a PeftModel, `base_model.model.` otherwise.
        save_embedding_layers: whether embeddings are written; "auto": where the adapter targets them or the vocabulary was resized.

    Returns:
        Empty if the model has no such adapter.
    """
    model = bare(model)
    if prefix is None:
        prefix = "" if is_wrapped(model) else PREFIX
    out: dict[str, Slot] = {}

    def add(slot: Slot) -> None:
        there = out.get(slot.key)
        if there is None:
            out[slot.key] = slot
        elif there.owner is not slot.owner or there.attribute != slot.attribute:
            raise PeftError(
                f"The tensors {there.memory_key!r} and {slot.memory_key!r} would both be called {slot.key!r} in a file. "
                "Rename one of the two modules."
            )

    spots = list(walk(model))
    for spot in spots:
        yielded: Iterable[tuple[str, str, str, nn.Module]] = ()
        if start and issubclass(type(spot.module), HasStartSlots):
            yielded = spot.module.adapter_start_slots(adapter_name)  # type: ignore[operator]
        elif not start and has_slots(spot.module):
            yielded = spot.module.adapter_slots(adapter_name)
        spare: Iterable[tuple[str, str, str, nn.Module]] = ()
        if not start and issubclass(type(spot.module), HasSpareSlots):
            spare = spot.module.adapter_spare_slots(adapter_name)  # type: ignore[operator]
        for written, places in ((True, yielded), (False, spare)):
            for file_suffix, memory_suffix, attribute, owner in places:
                key, memory = prefix + join_path(spot.path, file_suffix), join_path(spot.memory, memory_suffix)
                hole = _hole(memory, memory_suffix, adapter_name)
                add(Slot(key, memory, owner, attribute, spot.module, hole, required=written, saved=written))
    if start:
        return out
    further = getattr(config, "checkpoint_slots", None)
    for key, memory, attribute, owner in further(model, adapter_name) if further is not None else ():
        add(Slot(key, memory, owner, attribute, base_root(model), _hole(memory, memory, adapter_name)))
    for slot in _biases(spots, adapter_name, config, prefix):
        add(slot)
    for slot in _embeddings(model, spots, adapter_name, config, prefix, save_embedding_layers):
        add(slot)
    _tie(out.values())
    return out


def _hole(memory: str, suffix: str, adapter: str) -> tuple[str, str] | None:
    """What is around the adapter's name: its container comes first in the suffix, so the name is never the first part."""
    at = f".{suffix}.".find(f".{adapter}.", 1)
    if at < 1:
        return None
    at += len(memory) - len(suffix)
    return memory[: at - 1], memory[at + len(adapter) + 1 :]


def _biases(spots: Sequence[Spot], adapter: str, config: Any, prefix: str) -> Iterator[Slot]:
    mode = getattr(config, "bias", "none")
    if mode in (None, "none"):
        return
    for spot in spots:
        fixed = "bias" in spot.module._buffers and "bias" not in spot.module._non_persistent_buffers_set  # a frozen norm's: in PEFT's files
        if not (isinstance(spot.module._parameters.get("bias"), nn.Parameter) or (fixed and spot.module._buffers["bias"] is not None)):
            continue
        targeted = any(child == "base_layer" and adapter in adapters_of(w) for w, child in spot.wrappers)
        if targeted or mode == "all":
            replaced = any(child == "original_module" and adapter in adapters_of(w) for w, child in spot.wrappers)
            key, memory = prefix + join_path(spot.path, "bias"), join_path(spot.memory, "bias")
            yield Slot(
                key,
                memory,
                spot.module,
                "bias",
                spot.module,
                required=not (replaced or fixed),
                saved=not replaced,
                base=True,
                kept=kept(spot, "bias"),
            )


def _embeddings(
    model: nn.Module, spots: Sequence[Spot], adapter: str, config: Any, prefix: str, mode: bool | Literal["auto"]
) -> Iterator[Slot]:
    root = base_root(model)
    tables = embedding_modules(root)
    if not tables:
        return
    every = _resized(root, config) if mode == "auto" else mode
    targeted = mode == "auto" and _embeddings_targeted(spots, adapter, config)
    places = [s.memory for s in spots if any(s.module is t for t in tables)]
    for spot in spots:
        if not any(spot.memory == p or spot.memory.startswith(f"{p}.") for p in places):
            continue
        if any(n in spot.module._modules for n in _BASE_CHILDREN) and has_slots(spot.module):
            continue  # its own tensors are the adapter's
        replaced = any(child == "original_module" and adapter in adapters_of(w) for w, child in spot.wrappers)
        adapted = any(child == "base_layer" and adapter in adapters_of(w) for w, child in spot.wrappers)
        saved = (every or (targeted and adapted)) and not replaced
        for name, tensor in [*spot.module._parameters.items(), *spot.module._buffers.items()]:
            if tensor is not None and name not in spot.module._non_persistent_buffers_set:
                key, memory = prefix + join_path(spot.path, name), join_path(spot.memory, name)
                yield Slot(key, memory, spot.module, name, spot.module, required=False, saved=saved, base=True, kept=kept(spot, name))


def embedding_modules(root: nn.Module) -> list[nn.Module]:
    """The input and output embeddings, as far as the model tells them."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(root, name, None)
        try:
            module = get() if get is not None else None
        except (NotImplementedError, AttributeError):  # transformers' models without a table of their own
            module = None
        if isinstance(module, nn.Module):
            found.append(module)
    return found


def _embeddings_targeted(spots: Sequence[Spot], adapter: str, config: Any) -> bool:
    names = {"embed_tokens", "lm_head"}  # PEFT's rule goes by these two names, and so do its files
    targets = getattr(config, "target_modules", None)
    if not targets or getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None):
        return False
    if isinstance(targets, str):
        return any(s.path.rpartition(".")[2] in names for s in spots if adapter in adapters_of(s.module))
    return bool(names & set(targets))


def _resized(root: nn.Module, config: Any) -> bool:
    """Whether the vocabulary has another size than in the base model's config.json, as far as this machine has it."""
    from .hub import local_config

    name = getattr(config, "base_model_name_or_path", None)
    now = _vocabulary(getattr(root, "config", None))
    before = _vocabulary(local_config(name, getattr(config, "revision", None))) if name else None
    return now is not None and before is not None and now != before


def _vocabulary(config: Any) -> int | None:
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        return None
    size = values.get("vocab_size", (values.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def _tie(found: Iterable[Slot]) -> None:
    """Mark slots whose tensors share memory. The first that really holds the tensor leads."""
    holds = sorted(found, key=lambda s: s.attribute not in s.owner._parameters and s.attribute not in s.owner._buffers)
    first: dict[tuple[int, int, int], Slot] = {}
    for slot in holds:
        t = slot.tensor
        if t.numel() == 0 and not is_partitioned(t):
            continue
        leader = first.setdefault(memory_of(t), slot)
        if leader is slot:
            continue
        other = leader.tensor
        if (t.shape, t.stride()) == (other.shape, other.stride()):
            slot.tied_with = leader
        elif t.ndim == 2 and (t.T.shape, t.T.stride()) == (other.shape, other.stride()):
            slot.tied_with, slot.transposed = leader, True


def memory_of(t: Tensor) -> tuple[int, int, int]:
    """What is equal for tensors that share their memory."""
    if is_partitioned(t):
        return id(t), 0, 0
    try:
        return t.untyped_storage()._cdata, int(t.storage_offset()), t.numel()
    except (NotImplementedError, RuntimeError):  # subclasses without a storage of their own, such as DTensor
        return id(t), 0, t.numel()
