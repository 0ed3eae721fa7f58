"""Attaching adapters to a model and taking them off. Everything is made and checked first; then the model changes."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..bases import codec_for
from ..errors import ConfigError, PeftWarning, hint
from ..method import Leaf, Method
from ..sites import Adaptable, ParameterSite, Site, adaptable, site_for
from .holders import Attached, Holder, Tensors, hold, visited
from .layer import AdaptedLayer, Place
from .modules import Part, hold_parts, parts_of
from .replicate import replicate, undo
from .route import Switch, adapter_names, check_known, find_switch, the_switch
from .select import Selection, select
from .steps import watch
from .ties import tied_to
from .wrapper import Wrapper

_LOW = (torch.float16, torch.bfloat16)


@dataclass
class Plan:
    """What attaching did: trained numbers per module, what was passed over and why.

    Attributes:
        modules: parameters of the adapter on each adapted module, by path.
        saved, tokens: paths of modules trained whole, and of tables with trained rows.
        skipped: path -> reason for what the targets could have meant and did not hit.
        coverage: per target entry, what it hit.
    """

    modules: dict[str, int] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    coverage: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Staged:
    """One layer's share, not yet in the model. Its tensors are made once all shares are known."""

    path: str
    layer: AdaptedLayer
    attached: Attached
    new: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)


def attach(
    model: nn.Module,
    config: Method,
    adapter_name: str = "default",
    *,
    low_cpu_mem_usage: bool = False,
    autocast_adapter_dtype: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    empty: bool = False,
    strict: bool = True,
    home: nn.Module | None = None,
) -> Plan:
    """Put a new adapter on the model, in place.

    Args:
        low_cpu_mem_usage: leave its tensors on the meta device, for a file to fill.
        autocast_adapter_dtype: keep its tensors in float32 where the base is float16 or bfloat16.
        state_dict: take the modules to adapt from these keys instead of the config's targets.
        empty: do not compute start values that a file is going to replace.
        strict: whether a target that matches nothing is an error.
        home: the module that keeps the tensors which all layers share, for methods that have such.

    Raises:
        ConfigError, NoMatchingPeftModuleError: if the config does not fit the model; the model is as it was.
    """
    with _no_collection():
        return _attach(model, config, adapter_name, _Options(low_cpu_mem_usage, autocast_adapter_dtype, empty), state_dict, strict, home)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Thousands of objects are made, all to stay: looking for garbage among them takes longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _attach(
    model: nn.Module,
    config: Method,
    adapter_name: str,
    options: _Options,
    state_dict: Mapping[str, Tensor] | None,
    strict: bool,
    home: nn.Module | None,
) -> Plan:
    switch = find_switch(model)
    first = switch is None
    if switch is None:
        switch = Switch([adapter_name])
    elif adapter_name in adapter_names(model):
        raise ConfigError(f"There is already an adapter {adapter_name!r}. Choose another name, or delete_adapter({adapter_name!r}) first.")
    replicated = replicate(model, getattr(config, "layer_replication", None)) if first else None
    staged: list[_Staged] = []
    targeted, asked = hasattr(config, "target_modules"), getattr(config, "target_modules", None)
    try:
        config.meet(model)
        selection = select(model, config, supports=lambda m: adaptable(m, config.kinds), state_dict=state_dict, strict=strict)
        if targeted and selection.resolved_targets is not None:
            cast(Any, config).target_modules = selection.resolved_targets
        count = len(selection.modules)
        if type(config).survey is not Method.survey:
            config.survey({p: m.weight_site if isinstance(m, AdaptedLayer) else site_for(m) for p, m in selection.modules.items()})
        for i, (p, m) in enumerate(selection.modules.items()):
            staged.append(_stage(m, p, config, adapter_name, switch, name=selection.names.get(p), index=i, count=count))
        for s in list(staged):
            if s.layer.site.kind == "attention":
                staged.append(_stage_out_proj(s, config, adapter_name, switch))
        staged += _stage_parameters(model, selection, config, adapter_name, switch)
        staged += _tie_targets(model, config, staged, adapter_name, switch)
        shared = _share(config, staged, home)
        saved = _stage_saved(model, selection, config, adapter_name, switch)
        tokens = _stage_tokens(model, config, adapter_name, switch, staged)
        _check_nesting(model, staged, [path for path, *_ in saved] + [s.path for s, _ in tokens])
        for s in [*staged, *(t for t, _ in tokens)]:
            s.tensors = _tensors(s.attached, s.attached.place, options)
        held = _tensors(shared, staged[0].attached.place, options) if shared is not None else {}
        if not options.empty:
            _settle_staged(config, staged, held)
        parts = _stage_parts(model, config, staged, home, options)
        _tell_dry(staged, adapter_name)
    except BaseException:
        for s in staged:
            if not s.new:
                s.layer.scaling.pop(adapter_name, None)
        if targeted:
            cast(Any, config).target_modules = asked
        undo(model, replicated)
        raise
    # from here on nothing can fail
    plan = Plan(skipped=dict(selection.skipped), coverage=dict(selection.coverage))
    if first:
        _freeze(model, switch)
    _train_biases(model, config, selection)
    if shared is not None:
        hold(home if home is not None else staged[0].layer, adapter_name, shared, held)
        if home is not None:
            cast(Any, home).shared[adapter_name] = shared
    if parts and home is not None:
        hold_parts(home, adapter_name, parts)
        cast(Any, home).parts[adapter_name] = parts
        plan.modules |= {part.container: sum(p.numel() for p in part.module.parameters()) for part in parts}
    places = _places(model)
    for s in staged:
        if s.new:
            _put(model, places, s.layer.base_layer, s.layer, s.path)
        s.layer.attach(adapter_name, s.attached, s.tensors)
        plan.modules[s.path] = sum(t.numel() for t in s.tensors.values())
    _put_saved(model, places, saved, adapter_name, plan)
    for s, wrap in tokens:
        if wrap is not None:
            _put(model, places, s.layer.base_layer, wrap, s.path.removesuffix(".token_adapter"))
        s.layer.attach(adapter_name, s.attached, s.tensors)
        plan.tokens.append(s.path.removesuffix(".token_adapter"))
    watch(switch, adapter_name, config, [s.attached for s in staged] + ([shared] if shared is not None else []))
    acting = switch.chosen().names or ()
    for _, module in adapter_modules(model):
        module.set_requires_grad(adapter_name, adapter_name in acting and not config.inference_mode)
    return plan


def attach_saved(model: nn.Module, config: Any, adapter_name: str, switch: Switch) -> Plan:
    """Freeze the model, and make the trained copies of an adapter that adapts no layers (a prompt).

    Raises:
        ConfigError, NoMatchingPeftModuleError: if `modules_to_save` does not fit the model, which is then as it was.
    """
    selection = select(model, config, supports=lambda m: False)
    saved = _stage_saved(model, selection, config, adapter_name, switch)
    plan = Plan()
    if not switch.frozen_before:
        _freeze(model, switch)
    _put_saved(model, _places(model), saved, adapter_name, plan)
    return plan


def _tell_dry(staged: Sequence[_Staged], adapter: str) -> None:
    """Warn of layers whose inputs cannot be dropped for the adapter alone."""

    def heeded(config: Method, site: Any) -> bool:
        return not isinstance(site, Site) or (not site.own_forward and site.kind not in config.dry)

    dry = [s.path for s in staged if (c := s.attached.config).dropout() > 0 and not heeded(c, s.layer.site)]
    if dry:
        warnings.warn(
            f"The dropout of the adapter {adapter!r} does not act on {dry[0]!r}{f' and {len(dry) - 1} more' * (len(dry) > 1)}: an embedding reads no "
            "numbers, and a module with a forward of its own is run with whole weights.",
            PeftWarning,
            stacklevel=5,
        )


def _freeze(model: nn.Module, switch: Switch) -> None:
    for name, p in model.named_parameters():
        switch.frozen_before[name] = p.requires_grad
        p.requires_grad_(False)


def thaw(model: nn.Module, switch: Switch) -> None:
    """Let train what trained before the first adapter."""
    for name, p in model.named_parameters():
        if name in switch.frozen_before:
            p.requires_grad_(switch.frozen_before[name])


def _put_saved(model: nn.Module, places: dict[int, list[tuple[nn.Module, str]]], saved: Sequence[Any], adapter: str, plan: Plan) -> None:
    for path, wrapper, new, tie in saved:
        if new:
            _put(model, places, wrapper.original_module, wrapper, path)
        wrapper.attach(adapter, tie.modules_to_save[adapter] if tie is not None else None)
        plan.saved.append(path)


@dataclass(frozen=True)
class _Options:
    meta: bool
    autocast: bool
    empty: bool


def _stage(
    module: nn.Module,
    path: str,
    config: Method,
    adapter: str,
    switch: Switch,
    site: Adaptable | None = None,
    name: str | None = None,
    index: int = 0,
    count: int = 1,
) -> _Staged:
    """One layer's share of the adapter. `name`: what patterns match, the path if not given."""
    new = not isinstance(module, AdaptedLayer) or site is not None
    if new and site is None:
        kind = adaptable(module, config.kinds)
        if kind is None:
            raise ConfigError(
                f"{type(config).__name__} cannot adapt {path!r}: it is a {type(module).__name__}, and the method takes {sorted(config.kinds)}."
            )
        site = kind(module)
    layer = AdaptedLayer(module, site, switch, path) if site is not None else cast(AdaptedLayer, module)
    if layer.quantised:
        _check_storage(layer, path)
    here = config.at(name or path)
    place = Place(layer, adapter, path)
    place.called, place.index, place.count = name or path, index, count
    if place.kind not in config.kinds:
        raise ConfigError(
            f"{type(config).__name__} cannot adapt {path!r}: it is a {place.kind} layer, and the method takes {sorted(config.kinds)}."
        )
    layer.scaling[adapter] = here.scale()
    try:
        here.check(place)
        return _Staged(path, layer, Attached(here, here.leaves(place), place), new)
    except BaseException:
        if not new:
            layer.scaling.pop(adapter, None)
        raise


def _check_storage(layer: AdaptedLayer, path: str) -> None:
    """Raise ConfigError if a quantised layer's storage cannot be read."""
    codec = layer.weight_site.codec
    try:
        codec.check(layer.get_base_layer())
    except ConfigError as e:
        raise ConfigError(f"{path!r}: {e}") from None
    if layer.site.kind not in codec.kinds:
        raise ConfigError(
            f"{path!r} is a {layer.site.kind} layer stored as {codec.name!r}, of which veneer reads {sorted(codec.kinds)} layers. Leave it out of the targets, "
            "or load the model with this module left out of the quantisation."
        )


def _tensors(attached: Attached, place: Place | None, options: _Options) -> dict[str, Tensor]:
    """The tensors of one layer's share, or of what all share (then `place` is any of them)."""
    assert place is not None
    config, leaves = attached.config, {n: leaf for n, leaf in attached.leaves.items() if n not in attached.derived}
    home, dtype = place.layer.site.where(place.module)
    if options.autocast and dtype in _LOW:
        dtype = torch.float32
    device = torch.device("meta") if options.meta else home
    out: dict[str, Tensor] = {}
    with torch.no_grad():
        own = attached.place is not None and home.type != "meta"
        given = config.start(place, only_frozen=options.empty or options.meta) if own else {}
        for name, leaf in leaves.items():
            if name in given:
                value = given[name]
                if tuple(value.shape) != tuple(leaf.shape):
                    value = value.reshape(leaf.shape)
                where = device if leaf.saved is True else home
                out[name] = value.detach().to(device=where, dtype=leaf.dtype or dtype).contiguous().clone()
                continue
            made = leaf.saved is False or not (options.empty or options.meta)  # what no file brings is made whatever happens
            where = home if leaf.saved is False else device
            if leaf.saved == "start" and options.empty:
                where = torch.device("meta")  # known to be missing until its file brings it
            t = torch.empty(leaf.shape, device=where, dtype=leaf.dtype or dtype)
            if made and t.device.type != "meta":
                fresh = t if t.dtype not in _LOW else t.float()
                leaf.init(fresh)
                t = fresh.to(t.dtype)
            out[name] = t
    return out


def _check_nesting(model: nn.Module, staged: Sequence[_Staged], others: Sequence[str]) -> None:
    """A module whose tensors are replaced whole takes no adapters inside: they would be replaced with them."""
    whole = [s.path for s in staged if s.layer.site.kind == "module"]
    whole += [path for path, layer in adapted_layers(model) if layer.site.kind == "module"]
    every = [*(s.path for s in staged), *others, *(path for path, _ in adapter_modules(model))] if whole else []
    for path in whole:
        inside = next((p for p in every if p.startswith(f"{path}.")), None)
        if inside is not None:
            raise ConfigError(
                f"{path!r} is trained as a whole, so {inside!r}, which is inside, cannot have an adapter of its own. Target one of the two."
            )


def _share(config: Method, staged: Sequence[_Staged], home: nn.Module | None) -> Attached | None:
    """Number the places, and let them know the tensors that they share; returns those."""
    places = [s.attached.place for s in staged if s.attached.place is not None]
    for i, place in enumerate(places):
        place.index, place.count = i, len(places)
    _share_in_groups(config, staged)
    leaves = config.shared(places) if places else {}
    if not leaves:
        return None
    if home is None and not all(leaf.everywhere for leaf in leaves.values()):
        raise ConfigError(
            f"{type(config).__name__} keeps tensors that all layers share, so it needs get_peft_model; it cannot be injected into a bare model."
        )
    shared = Attached(config, leaves, None)
    for s in staged:
        here = {n: leaf for n, leaf in leaves.items() if leaf.users is None or s.attached.place in leaf.users}
        s.attached.derived |= {n if leaf.users is None else leaf.container or n: (shared, n, False) for n, leaf in here.items()}
        s.attached.leaves = {**s.attached.leaves, **{n: leaf for n, leaf in here.items() if leaf.everywhere}}
    return shared


def _share_in_groups(config: Method, staged: Sequence[_Staged]) -> None:
    """Let groups of layers have leaves in common: the first of a group keeps the tensor."""
    for leaf, keys in config.common([s.attached.place for s in staged if s.attached.place is not None]).items():
        first: dict[Any, _Staged] = {}
        for s, key in zip(staged, keys, strict=True):
            keeps = first.setdefault(key, s)
            if keeps is not s:
                s.attached.derived[leaf] = (keeps.attached, leaf, False)


def _stage_parts(model: nn.Module, config: Method, staged: list[_Staged], home: nn.Module | None, options: _Options) -> list[Part]:
    """The adapter's modules that act outside the layers."""
    if home is None and type(config).modules is not Method.modules:
        raise ConfigError(
            f"{type(config).__name__} trains modules that act beside the model, so it needs get_peft_model; it cannot be injected into a bare model."
        )
    places = [s.attached.place for s in staged if s.attached.place is not None]
    return parts_of(config.modules(model, places, empty=options.empty or options.meta), meta=options.meta)


def _settle_staged(config: Method, staged: Sequence[_Staged], held: Mapping[str, Tensor]) -> None:
    """Let the method fill what follows from other tensors, before anything is in the model."""
    if type(config).settle is Method.settle or any(t.is_meta for s in staged for t in (*s.tensors.values(), *held.values())):
        return  # what is on the meta device waits for a file
    here = []
    for s in staged:
        shared = {n: held[of] for n, (_, of, _) in s.attached.derived.items() if of in held}
        here.append((cast(Place, s.attached.place), SimpleNamespace(**shared, **s.tensors)))
    with torch.no_grad():
        config.settle(here, loaded=False)


def settle(model: nn.Module, config: Any, adapter: str) -> None:
    """Let the method fill what follows from the tensors that a file has just brought."""
    if isinstance(config, Method) and type(config).settle is not Method.settle:
        attached = [layer.attached[adapter] for _, layer in adapted_layers(model) if adapter in layer.attached]
        here = [(a.place, Tensors(a)) for a in attached if a.place is not None]
        with torch.no_grad():
            config.settle(sorted(here, key=lambda pair: pair[0].index), loaded=True)


def _stage_out_proj(outer: _Staged, config: Method, adapter: str, switch: Switch) -> _Staged:
    mha = outer.layer.base_layer
    staged = _stage(
        cast(nn.Module, mha.out_proj), f"{outer.path}.base_layer.out_proj", config, adapter, switch, name=f"{outer.path}.out_proj"
    )
    # PEFT applies the change of out_proj twice; adapters trained with it mean just that
    staged.layer.factor = 2.0
    return staged


def _stage_parameters(model: nn.Module, selection: Selection, config: Method, adapter: str, switch: Switch) -> list[_Staged]:
    """target_parameters: one layer per parameter; several of one module nest, the last by name outermost."""
    staged: list[_Staged] = []
    wrapped: dict[str, nn.Module] = {}
    for full in sorted(selection.parameters):
        path, _, name = full.rpartition(".")
        if not path:
            raise ConfigError(f"target_parameters: {full!r} belongs to the top module, which cannot be wrapped. Put it into a submodule.")
        module = wrapped.get(path) or model.get_submodule(path)
        found = _parameter_layer(module, name)
        if found is not None:
            staged.append(_stage(found, found.name, config, adapter, switch, name=full))
            continue
        depth, inner = 0, module
        while isinstance(inner, AdaptedLayer):
            depth, inner = depth + 1, inner.base_layer
        site = ParameterSite(module, "base_layer." * depth + name)
        s = _stage(module, path, config, adapter, switch, site, full)
        wrapped[path] = s.layer
        staged.append(s)
    # an outer wrapper pushes the ones before it inwards: their paths are read off the finished model
    return staged


def _parameter_layer(module: nn.Module, name: str) -> AdaptedLayer | None:
    while isinstance(module, AdaptedLayer):
        if isinstance(module.site, ParameterSite) and module.site.weight_name.rpartition(".")[2] == name:
            return module
        module = module.base_layer
    return None


def _tie_targets(model: nn.Module, config: Method, staged: list[_Staged], adapter: str, switch: Switch) -> list[_Staged]:
    """ensure_weight_tying: a head tied to a targeted embedding takes the embedding's factors, transposed, a target itself or not."""
    more: list[_Staged] = []
    if not getattr(config, "ensure_weight_tying", False):
        return more
    by_module = {id(s.layer.get_base_layer()): s for s in staged}
    for s in staged:
        if s.layer.site.kind != "embedding":
            continue
        for path, other in tied_to(model, s.layer.get_base_layer()):
            head = by_module.get(id(other))
            if head is None:
                at = path.removesuffix(".base_layer")
                head = _stage(model.get_submodule(at), at, config, adapter, switch)
                more.append(head)
            head.attached.derived = {
                "lora_A": (s.attached, "lora_embedding_B", True),
                "lora_B": (s.attached, "lora_embedding_A", True),
            }
    return more


def _stage_saved(model: nn.Module, selection: Selection, config: Any, adapter: str, switch: Switch) -> list[tuple[str, Any, bool, Any]]:
    """Wrappers of modules_to_save: (path, wrapper, whether new, the wrapper it is tied to)."""
    from ..blocks.saved import ModulesToSaveWrapper

    out: list[tuple[str, Any, bool, Any]] = []
    wrappers: dict[int, Any] = {}
    todo = list(selection.to_save.items())
    tie = getattr(config, "ensure_weight_tying", False)
    for path, module in todo:
        new = not isinstance(module, ModulesToSaveWrapper)
        if isinstance(module, AdaptedLayer):
            raise ConfigError(f"{path!r} is already adapted and cannot be trained whole (modules_to_save) as well.")
        codec = next((c for c in map(codec_for, module.modules()) if not c.plain), None)
        if codec is not None:
            raise ConfigError(
                f"{path!r} is quantised ({codec.name}) and cannot be trained whole (modules_to_save). Put it into target_modules, or load the model with "
                "this module left out of the quantisation (llm_int8_skip_modules, modules_to_not_convert)."
            )
        wrapper = ModulesToSaveWrapper(module, switch, path) if new else module
        original = wrapper.original_module
        shares = [w for w in wrappers.values() if tie and getattr(w.original_module, "weight", 0) is getattr(original, "weight", 1)]
        wrappers[id(original)] = wrapper
        out.append((path, wrapper, new, shares[0] if shares else None))
        if tie:
            for other_path, other in tied_to(model, cast(nn.Module, original)):
                if all(other is not m for _, m in todo) and id(other) not in wrappers:
                    todo.append((other_path, other))
    return out


def _stage_tokens(model: nn.Module, config: Method, adapter: str, switch: Switch, staged: list[_Staged]) -> list[tuple[_Staged, Any]]:
    """trainable_token_indices: (share, wrapper to put in or None) per table, tied heads included."""
    wanted = getattr(config, "trainable_token_indices", None)
    if not wanted:
        return []
    from ..blocks.tokens import TrainableTokensWrapper
    from ..methods.trainable_tokens import TrainableTokensConfig

    targets = _token_tables(model, wanted)
    taken = {id(s.layer.get_base_layer()): s.path for s in staged}
    out: list[tuple[_Staged, Any]] = []

    def stage(path: str, module: nn.Module, indices: list[int]) -> tuple[_Staged, Any]:
        old = module if isinstance(module, TrainableTokensWrapper) else None
        table = old.token_adapter if old else module
        if not old and (isinstance(module, AdaptedLayer) or id(module) in taken):
            raise ConfigError(f"{path!r} is in target_modules and in trainable_token_indices; it can be trained in one way only.")
        share = _stage(table, f"{path}.token_adapter", TrainableTokensConfig(token_indices=indices), adapter, switch)
        return share, None if old else TrainableTokensWrapper(share.layer)

    for path, (module, indices) in targets.items():
        share, wrap = stage(path, module, indices)
        out.append((share, wrap))
        for other_path, _other in tied_to(model, share.layer.get_base_layer()):
            at = other_path.removesuffix(".token_adapter.base_layer")
            if at in targets:
                continue
            tied, tied_wrap = stage(at, model.get_submodule(at), indices)
            tied.attached.derived = {"trainable_tokens_delta": (share.attached, "trainable_tokens_delta", False)}
            tied.attached.leaves = {
                "trainable_tokens_delta": Leaf(share.attached.leaves["trainable_tokens_delta"].shape, torch.nn.init.zeros_, saved=False)
            }
            out.append((tied, tied_wrap))
    return out


def _token_tables(model: nn.Module, wanted: Any) -> dict[str, tuple[nn.Module, list[int]]]:
    modules = {n: m for n, m in model.named_modules() if ".token_adapter" not in n}
    if not isinstance(wanted, Mapping):
        get = getattr(model, "get_input_embeddings", None)
        table = get() if get is not None else None
        name = (
            next((n for n, m in modules.items() if m is table or getattr(m, "token_adapter", None) is table), None)
            if table is not None
            else None
        )
        if name is None:
            name = next((n for n in modules if n.rpartition(".")[2] == "embed_tokens"), None)
        if name is None:
            raise ConfigError(
                "trainable_token_indices: the model tells no input embeddings. Give a dict {module name: [indices]} instead of a list."
            )
        return {name: (modules[name], list(wanted))}
    out = {}
    for suffix, indices in wanted.items():
        hits = [n for n in modules if n == suffix or n.endswith(f".{suffix}")]
        if not hits:
            raise ConfigError(
                f"trainable_token_indices: no module is called {suffix!r}.{hint(suffix, {n.rpartition('.')[2] for n in modules})}"
            )
        for n in hits:
            out[n] = (modules[n], list(indices))
    return out


def _train_biases(model: nn.Module, config: Method, selection: Selection) -> None:
    mode = getattr(config, "bias", "none")
    if mode == "none":
        return
    hit = {id(m.get_base_layer() if isinstance(m, AdaptedLayer) else m) for m in selection.modules.values()}
    hit |= {id(m.out_proj) for m in selection.modules.values() if isinstance(m, nn.MultiheadAttention)}
    for module in model.modules():
        b = module._parameters.get("bias")
        if b is not None and not isinstance(module, Holder) and (mode == "all" or id(module) in hit):
            b.requires_grad_(True)


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (parent, name) under which a module stands in the model."""
    out: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, module in visited(model):
        for name, child in module._modules.items():
            if child is not None:
                out.setdefault(id(child), []).append((module, name))
    return out


def _put(model: nn.Module, places: dict[int, list[tuple[nn.Module, str]]], old: nn.Module, new: nn.Module, path: str) -> None:
    """Put `new`, which wraps `old`, wherever `old` stands."""
    where = [(parent, name) for parent, name in places.get(id(old), []) if parent is not new]
    for parent, name in where:
        parent._modules[name] = new
    places[id(new)] = where
    places[id(old)] = []


# -------------------------------------------------------------------- what is in a model


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Every adapted layer with its path."""
    for path, module in visited(model):
        if isinstance(module, AdaptedLayer):
            yield path, module


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """Every module that holds tensors of adapters, with its path: adapted layers and modules trained whole."""
    for path, module in visited(model):
        if isinstance(module, Wrapper):
            yield path, module


def active_adapters(model: nn.Module) -> list[str]:
    """The adapters that act here and now."""
    switch = find_switch(model)
    return list(switch.chosen().names or ()) if switch is not None else []


def set_adapter(model: nn.Module, names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Let these adapters act in this thread, and train (none in inference mode). A merged model is unmerged first, with a warning.

    Raises:
        RouteError: for a name that is not there.
    """
    names = [names] if isinstance(names, str) else list(names)
    found = [module for _, module in adapter_modules(model)]
    check_known(names, adapter_names(model))
    merged = [m for m in found if isinstance(m, AdaptedLayer) and m.merged]
    if merged and any(set(layer.merged_adapters) != {n for n in names if n in layer.attached} for layer in merged):
        from .merge import unmerge

        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", PeftWarning, stacklevel=2)
        unmerge(model)
    _choose(found, found[0].switch if found else the_switch(model), names, inference_mode)


def choose(model: nn.Module, switch: Switch, names: Sequence[str], inference_mode: bool = False) -> None:
    """Let these adapters act on every layer and module of the model, and train (none in inference mode)."""
    _choose([module for _, module in adapter_modules(model)], switch, names, inference_mode)


def _choose(found: Sequence[Wrapper], switch: Switch, names: Sequence[str], inference_mode: bool) -> None:
    switch.set(names)
    for module in found:
        module.own = None
        module.require_grad_only(() if inference_mode else names)


def enable(model: nn.Module, enabled: bool = True) -> None:
    """Switch all adapters on or off. What trains stays what trained."""
    switch = find_switch(model)
    if switch is not None:
        switch.enable(enabled)
        for _, module in adapter_modules(model):
            if module.own is not None:
                module.enable_adapters(enabled)


def mark_trainable(model: nn.Module, names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let the tensors of these adapters get gradients, or not."""
    for _, module in adapter_modules(model) if names else ():
        module.set_requires_grad(names, requires_grad)


def detach(model: nn.Module, adapter_name: str) -> list[str]:
    """Take one adapter off and free its tensors; returns the adapters that act now.

    Raises:
        RouteError: if there is no such adapter.
    """
    check_known([adapter_name], adapter_names(model))
    switch = the_switch(model)
    switch.watched.pop(adapter_name, None)
    for _, module in list(adapter_modules(model)):
        module.delete_adapter(adapter_name)
    left = adapter_names(model)
    names = [n for n in switch.chosen().names or () if n != adapter_name] or left[:1]
    switch.set(names)
    for _, module in adapter_modules(model):
        if module.own is not None:
            module.own = None
    return names


def unload(model: nn.Module) -> nn.Module:
    """Take all adapters and wrappers off; merged layers get their frozen weights back, and what trained before trains again."""
    from .merge import unmerge

    unmerge(model)
    return unwrap(model, lambda wrapper: wrapper.inside())


def unwrap(model: nn.Module, inner: Any) -> nn.Module:
    """Put `inner(wrapper)` in the place of every wrapper and restore requires_grad."""
    from ..blocks.tokens import TrainableTokensWrapper

    wrappers = (Wrapper, TrainableTokensWrapper)
    switch = find_switch(model)

    def bare(module: nn.Module) -> nn.Module:
        while isinstance(module, wrappers):
            module = inner(module)
        return module

    top = bare(model)
    for module in list(top.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, wrappers):
                module._modules[name] = new = bare(child)
                for m in list(new.modules()):
                    for n, c in list(m._modules.items()):
                        if isinstance(c, wrappers):
                            m._modules[n] = bare(c)
    if switch is not None:
        thaw(top, switch)
    return top
