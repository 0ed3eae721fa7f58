"""An adapter's shares of the layers, made and checked before anything is in the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..bases import codec_for
from ..errors import ConfigError, PeftWarning, hint
from ..method import Leaf, Method
from ..sites import Adaptable, ParameterSite, Site, adaptable
from ..sites.module import ModuleSite
from ..sites.parallel import check_cut, check_packed, check_piece, check_runs_as_copy
from .holders import Attached
from .layer import AdaptedLayer
from .modules import Part, parts_of
from .offload import brought_in, runs_on
from .place import Place
from .route import Switch
from .select import Selection
from .ties import tied_to
from .wrapper import Wrapper

_LOW = (torch.float16, torch.bfloat16)


@dataclass
class Staged:
    """One layer's share, not yet in the model. Its tensors are made once all shares are known."""

    path: str
    layer: AdaptedLayer
    attached: Attached
    new: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)


def tell_dry(staged: Sequence[Staged], adapter: str) -> None:
    """Warn of layers whose inputs cannot be dropped for the adapter alone."""

    def heeded(config: Method, site: Any) -> bool:
        return not isinstance(site, Site) or (not site.own_forward and site.kind not in config.dry)

    dry = [s.path for s in staged if (c := s.attached.config).dropout() > 0 and not c.inference_mode and not heeded(c, s.layer.site)]
    if dry:
        warnings.warn(
            f"The dropout of the adapter {adapter!r} does not act on {dry[0]!r}{f' and {len(dry) - 1} more' * (len(dry) > 1)}: an embedding reads no "
            "numbers, and a module with a forward of its own is run with whole weights.",
            PeftWarning,
            stacklevel=5,
        )


@dataclass(frozen=True)
class Options:
    meta: bool
    autocast: bool
    empty: bool


def stage(
    module: nn.Module,
    path: str,
    config: Method,
    adapter: str,
    switch: Switch,
    site: Adaptable | None = None,
    name: str | None = None,
    index: int = 0,
    count: int = 1,
) -> Staged:
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
    _check_storage(layer, path)
    here = config.at(name or path)
    place = Place(layer, adapter, path)
    place.called, place.index, place.count = name or path, index, count
    if place.kind not in config.kinds:
        raise ConfigError(
            f"{type(config).__name__} cannot adapt {path!r}: it is a {place.kind} layer, and the method takes {sorted(config.kinds)}."
        )
    scale = here.scale()
    if scale == 0 and not here.inference_mode:
        by = next((f.name for f in fields(here) if f.name.endswith(("alpha", "scaling")) and getattr(here, f.name) == 0), "scale()")
        raise ConfigError(
            f"{by}=0 makes the scaling of {path!r} zero, so that nothing would act or train there. Give another one, such as r or 2 r for an alpha, "
            "or leave the layer out (`exclude_modules`)."
        )
    layer.scaling[adapter] = scale
    try:
        here.check(place)
        leaves = here.leaves(place)
        check_leaves(layer, here, leaves)
        return Staged(path, layer, Attached(here, leaves, place), new)
    except BaseException:
        if not new:
            layer.scaling.pop(adapter, None)
        raise


def check_leaves(layer: AdaptedLayer, config: Method, leaves: Mapping[str, Leaf]) -> None:
    """Raise ConfigError for what is no leaf, or would be kept where something else is."""
    taken: dict[tuple[str, str | None], str] = {}
    for name, leaf in leaves.items():
        said = f"{type(config).__name__}: the leaf {name!r}"
        if not isinstance(leaf, Leaf):
            raise ConfigError(f"{said} is a {type(leaf).__name__}, not a veneer.Leaf(shape, init).")
        container = leaf.container or name
        if container == "base_layer" or hasattr(AdaptedLayer, container) or "." in container:
            raise ConfigError(
                f"{said} cannot be kept as {container!r}, which is no name or is something of the layer's own. Give another one, such as "
                f"'{config.prefix}{container.replace('.', '_')}'."
            )
        other = taken.setdefault((container, leaf.attr), name)
        if other != name:
            where = container if leaf.attr is None else f"{container}.<adapter>.{leaf.attr}"
            raise ConfigError(f"{said} would be kept where {other!r} is ({where}). Give each its own container or attr.")


def _check_storage(layer: AdaptedLayer, path: str) -> None:
    """Raise ConfigError if the storage of what an adapter changes here cannot be read."""
    module, kind = layer.get_base_layer(), layer.site.kind
    if isinstance(layer.site, ModuleSite):
        check_cut(module, layer.site, path)  # its tensors are copied now
        check_runs_as_copy(module, path)
        codec = next((c for c in map(codec_for, module.modules()) if not c.plain), codec_for(module))
    elif isinstance(layer.site, Site):
        codec = layer.site.codec
    else:
        return  # it acts around a module and changes nothing in it
    try:
        check_packed(module, codec)
        codec.check(module)
        if kind == "linear":
            check_piece(module, layer.site)
    except ConfigError as e:
        raise ConfigError(f"{path!r}: {e}") from None
    if not codec.plain and kind not in codec.kinds:
        raise ConfigError(
            f"{path!r} is a {kind} layer stored as {codec.name!r}, of which veneer reads {sorted(codec.kinds)} layers. Leave it out of the targets, "
            "or load the model with this module left out of the quantisation."
        )


def tensors_of(attached: Attached, place: Place | None, options: Options) -> dict[str, Tensor]:
    """The tensors of one layer's share, or of what all share (then `place` is any of them)."""
    assert place is not None
    module = place.module
    if "_hf_hook" not in module.__dict__:
        return _made_tensors(attached, place, options)
    with brought_in(module):
        return _made_tensors(attached, place, options)


def _made_tensors(attached: Attached, place: Place, options: Options) -> dict[str, Tensor]:
    config, leaves = attached.config, {n: leaf for n, leaf in attached.leaves.items() if n not in attached.derived}
    home, dtype = place.layer.site.where(place.module)
    home = runs_on(place.module) or home
    if options.autocast and dtype in _LOW:
        dtype = torch.float32
    device = torch.device("meta") if options.meta else home
    out: dict[str, Tensor] = {}
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
            given_back = leaf.init(fresh)
            if isinstance(given_back, Tensor) and given_back is not fresh and not given_back._is_view():
                raise ConfigError(
                    f"{type(config).__name__}: the init of the leaf {name!r} gives a new tensor, and has to fill the one it gets in place, as "
                    "torch.nn.init.zeros_ or lambda t: t.fill_(0.1) does."
                )
            t = fresh.to(t.dtype)
        out[name] = t
    return out


def check_nesting(there: Sequence[tuple[str, Wrapper]], staged: Sequence[Staged], others: Sequence[str]) -> None:
    """A module whose tensors are replaced whole takes no adapters inside: they would be replaced with them. `there`: what is in the model already."""
    whole = [s.path for s in staged if s.layer.site.kind == "module"]
    whole += [path for path, wrapper in there if isinstance(wrapper, AdaptedLayer) and wrapper.site.kind == "module"]
    every = [*(s.path for s in staged), *others, *(path for path, _ in there)] if whole else []
    for path in whole:
        inside = next((p for p in every if p.startswith(f"{path}.")), None)
        if inside is not None:
            raise ConfigError(
                f"{path!r} is trained as a whole, so {inside!r}, which is inside, cannot have an adapter of its own. Target one of the two."
            )


def share(config: Method, staged: Sequence[Staged], home: nn.Module | None) -> Attached | None:
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


def _share_in_groups(config: Method, staged: Sequence[Staged]) -> None:
    """Let groups of layers have leaves in common: the first of a group keeps the tensor."""
    for leaf, keys in config.common([s.attached.place for s in staged if s.attached.place is not None]).items():
        first: dict[Any, Staged] = {}
        for s, key in zip(staged, keys, strict=True):
            keeps = first.setdefault(key, s)
            if keeps is not s:
                s.attached.derived[leaf] = (keeps.attached, leaf, False)


def stage_parts(model: nn.Module, config: Method, staged: list[Staged], home: nn.Module | None, options: Options) -> list[Part]:
    """The adapter's modules that act outside the layers."""
    if home is None and type(config).modules is not Method.modules:
        raise ConfigError(
            f"{type(config).__name__} trains modules that act beside the model, so it needs get_peft_model; it cannot be injected into a bare model."
        )
    places = [s.attached.place for s in staged if s.attached.place is not None]
    return parts_of(config.modules(model, places, empty=options.empty or options.meta), meta=options.meta)


def settle_staged(config: Method, staged: Sequence[Staged], held: Mapping[str, Tensor]) -> None:
    """Let the method fill what follows from other tensors, before anything is in the model."""
    if type(config).settle is Method.settle or any(t.is_meta for s in staged for t in (*s.tensors.values(), *held.values())):
        return  # what is on the meta device waits for a file
    here = []
    for s in staged:
        shared = {n: held[of] for n, (_, of, _) in s.attached.derived.items() if of in held}
        here.append((cast(Place, s.attached.place), SimpleNamespace(**shared, **s.tensors)))
    with torch.no_grad():
        config.settle(here, loaded=False)


def stage_out_proj(outer: Staged, config: Method, adapter: str, switch: Switch) -> Staged:
    mha, name = outer.layer.base_layer, cast(Place, outer.attached.place).called
    here = config.at(name)  # as in PEFT, patterns for the attention hold for its out_proj, too
    staged = stage(cast(nn.Module, mha.out_proj), f"{outer.path}.base_layer.out_proj", here, adapter, switch, name=f"{name}.out_proj")
    # PEFT applies the change of out_proj twice; adapters trained with it mean just that
    staged.layer.factor = 2.0
    return staged


def stage_parameters(model: nn.Module, selection: Selection, config: Method, adapter: str, switch: Switch) -> list[Staged]:
    """target_parameters: one layer per parameter; several of one module nest, the last that it registered outermost, as in PEFT's files."""
    staged: list[Staged] = []
    wrapped: dict[str, nn.Module] = {}
    for full in selection.parameters:
        path, _, name = full.rpartition(".")
        if not path:
            raise ConfigError(f"target_parameters: {full!r} belongs to the top module, which cannot be wrapped. Put it into a submodule.")
        module = wrapped.get(path) or model.get_submodule(path)
        found = _parameter_layer(module, name)
        if found is not None:
            staged.append(stage(found, found.name, config, adapter, switch, name=full))
            continue
        depth, inner = 0, module
        while isinstance(inner, AdaptedLayer):
            depth, inner = depth + 1, inner.base_layer
        site = ParameterSite(module, "base_layer." * depth + name)
        s = stage(module, path, config, adapter, switch, site, full)
        wrapped[path] = s.layer
        staged.append(s)
    # an outer wrapper pushes the ones before it inwards: their paths are read off the finished model
    return staged


def _parameter_layer(module: nn.Module, name: str) -> AdaptedLayer | None:
    while isinstance(module, AdaptedLayer):
        if isinstance(module.site, ParameterSite) and module.site.weight_key == name:
            return module
        module = module.base_layer
    return None


def tie_targets(model: nn.Module, config: Method, staged: list[Staged], adapter: str, switch: Switch) -> list[Staged]:
    """A head tied to a targeted embedding takes the embedding's tensors where the method says so, a target itself or not."""
    more: list[Staged] = []
    leaves = config.tied()
    if not leaves:
        return more
    by_module = {id(s.layer.get_base_layer()): s for s in staged}
    for s in staged:
        if s.layer.site.kind != "embedding":
            continue
        for path, other in tied_to(model, s.layer.get_base_layer()):
            head = by_module.get(id(other))
            if head is None:
                at = path.removesuffix(".base_layer")
                head = stage(model.get_submodule(at), at, config, adapter, switch)
                more.append(head)
            assert head.attached.place is not None
            head.attached.place.follows = True
            head.attached.leaves = head.attached.config.leaves(head.attached.place)
            head.attached.derived = {mine: (s.attached, leaf, transposed) for mine, (leaf, transposed) in leaves.items()}
    return more


def stage_saved(model: nn.Module, selection: Selection, config: Any, adapter: str, switch: Switch) -> list[tuple[str, Any, bool, Any]]:
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
            for inner, _ in tied_to(model, cast(nn.Module, original)):
                at = inner.removesuffix(".original_module").removesuffix(".base_layer")  # another adapter may have wrapped it
                other = model.get_submodule(at)
                if all(other is not m for _, m in todo) and other is not wrapper:
                    todo.append((at, other))
    return out


def stage_tokens(model: nn.Module, config: Method, adapter: str, switch: Switch, staged: list[Staged]) -> list[tuple[Staged, Any]]:
    """trainable_token_indices: (share, wrapper to put in or None) per table, tied heads included."""
    wanted = getattr(config, "trainable_token_indices", None)
    if not wanted:
        return []
    from ..blocks.tokens import TrainableTokensWrapper
    from ..methods.trainable_tokens import TrainableTokensConfig

    targets = _token_tables(model, wanted)
    taken = {id(s.layer.get_base_layer()): s.path for s in staged}
    out: list[tuple[Staged, Any]] = []

    def table(path: str, module: nn.Module, indices: list[int]) -> tuple[Staged, Any]:
        old = module if isinstance(module, TrainableTokensWrapper) else None
        inner = old.token_adapter if old else module
        if not old and (isinstance(module, AdaptedLayer) or id(module) in taken):
            raise ConfigError(f"{path!r} is in target_modules and in trainable_token_indices; it can be trained in one way only.")
        share = stage(inner, f"{path}.token_adapter", TrainableTokensConfig(token_indices=indices), adapter, switch)
        return share, None if old else TrainableTokensWrapper(share.layer)

    for path, (module, indices) in targets.items():
        share, wrap = table(path, module, indices)
        out.append((share, wrap))
        for other_path, _other in tied_to(model, share.layer.get_base_layer()):
            at = other_path.removesuffix(".token_adapter.base_layer")
            if at in targets:
                continue
            tied, tied_wrap = table(at, model.get_submodule(at), indices)
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
