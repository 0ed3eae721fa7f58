"""Attaching adapters to a model and taking them off. Everything is made and checked first; then the model changes."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError, MergeError, PeftWarning
from ..method import Method
from ..sharding import is_dtensor, reshard, sharded_modules
from ..sites import adaptable, site_for
from .fused import FIELDS, take_fused
from .holders import Holder, Tensors, hold, visited
from .layer import AdaptedLayer, adapted_layers
from .modules import hold_parts
from .offload import runs_on
from .replicate import check_again, replicate, undo
from .route import Switch, adapter_names, check_known, check_there, find_switch, the_switch
from .select import Selection, select
from .shortcuts import close_shortcuts, open_shortcuts
from .stage import (
    Options,
    Staged,
    check_nesting,
    settle_staged,
    share,
    stage,
    stage_out_proj,
    stage_parameters,
    stage_parts,
    stage_saved,
    stage_tokens,
    tell_dry,
    tensors_of,
    tie_targets,
)  # fmt: skip
from .steps import watch
from .wrapper import Wrapper, adapter_modules

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
        strict: whether a target that matches nothing is an error. Never so where a file fills the adapter (`empty`): its keys are checked.
        home: the module that keeps the tensors which all layers share, for methods that have such.

    Raises:
        ConfigError, NoMatchingPeftModuleError: if the config does not fit the model; the model is as it was.
    """
    with _no_collection():
        return _attach(
            model, config, adapter_name, Options(low_cpu_mem_usage, autocast_adapter_dtype, empty), state_dict, strict and not empty, home
        )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Thousands of objects are made, all to stay: looking for garbage among them takes longer than making them.

    At the end they are counted among the old ones, by way of `freeze`, which moves lists and looks at nothing; else the next object that anybody
    makes has them all looked through.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():  # else `unfreeze` would undo what somebody has frozen
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _attach(
    model: nn.Module,
    config: Method,
    adapter_name: str,
    options: Options,
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
    ranges = getattr(config, "layer_replication", None)
    if not first:
        check_again(ranges, switch.replaced)
    replicated = replicate(model, ranges) if first else None
    staged: list[Staged] = []
    targeted, asked = hasattr(config, "target_modules"), {name: getattr(config, name) for name in FIELDS if hasattr(config, name)}
    try:
        config.meet(model)
        if state_dict is None:
            take_fused(model, config)
        selection = select(model, config, supports=lambda m: adaptable(m, config.kinds), state_dict=state_dict, strict=strict)
        if targeted and selection.resolved_targets is not None:
            cast(Any, config).target_modules = selection.resolved_targets
        count = len(selection.modules)
        if type(config).survey is not Method.survey:
            config.survey({p: m.weight_site if isinstance(m, AdaptedLayer) else site_for(m) for p, m in selection.modules.items()})
        for i, (p, m) in enumerate(selection.modules.items()):
            staged.append(stage(m, p, config, adapter_name, switch, name=selection.names.get(p), index=i, count=count))
        for s in list(staged):
            if s.layer.site.kind == "attention":
                staged.append(stage_out_proj(s, config, adapter_name, switch))
        staged += stage_parameters(model, selection, config, adapter_name, switch)
        staged += tie_targets(model, config, staged, adapter_name, switch)
        shared = share(config, staged, home)
        saved = stage_saved(model, selection, config, adapter_name, switch)
        tokens = stage_tokens(model, config, adapter_name, switch, staged)
        there = [] if first else list(adapter_modules(model))
        check_nesting(there, staged, [path for path, *_ in saved] + [s.path for s, _ in tokens])
        with torch.no_grad():
            for s in [*staged, *(t for t, _ in tokens)]:
                s.tensors = tensors_of(s.attached, s.attached.place, options)
            held = tensors_of(shared, staged[0].attached.place, options) if shared is not None else {}
        if not options.empty:
            settle_staged(config, staged, held)
        parts = stage_parts(model, config, staged, home, options)
        trains = adapter_name in (switch.chosen().names or ()) and not config.inference_mode
        if trains and (inside := sharded_modules(model)) and (late := [s for s in staged if id(s.layer.get_base_layer()) in inside]):
            raise _after_sharding(adapter_name, late[0].path)
        biased = list(_biases(model, config, selection, saved))
        if trains and (lost := next((path for path, m in biased if m._parameters["bias"].is_meta and runs_on(m) is not None), None)):  # type: ignore[union-attr]
            raise ConfigError(
                f"accelerate keeps the weights of {lost!r} elsewhere and brings them in for each call, so its bias would not train. Set bias='none', or load "
                "the model without offload."
            )
        tell_dry(staged, adapter_name)
    except BaseException:
        for s in staged:
            if not s.new:
                s.layer.scaling.pop(adapter_name, None)
        for name, value in asked.items():
            setattr(config, name, value)
        undo(model, replicated)
        raise
    # from here on nothing can fail
    plan = Plan(skipped=dict(selection.skipped), coverage=dict(selection.coverage))
    if first:
        switch.replaced = replicated
        _freeze(model, switch)
    for _, module in biased:
        module.bias.requires_grad_(True)  # type: ignore[operator, union-attr]
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
    close_shortcuts(model, switch)
    watch(switch, adapter_name, config, [s.attached for s in staged] + ([shared] if shared is not None else []))
    for wrapper in [*(s.layer for s in staged), *(s.layer for s, _ in tokens), *(w for _, w, *_ in saved)]:
        wrapper.set_requires_grad(adapter_name, trains)
    return plan


def attach_saved(model: nn.Module, config: Any, adapter_name: str, switch: Switch) -> Plan:
    """Freeze the model, and make the trained copies of an adapter that adapts no layers (a prompt).

    Raises:
        ConfigError, NoMatchingPeftModuleError: if `modules_to_save` does not fit the model, which is then as it was.
    """
    selection = select(model, config, supports=lambda m: False)
    saved = stage_saved(model, selection, config, adapter_name, switch)
    plan = Plan()
    if not switch.frozen_before:
        _freeze(model, switch)
    _put_saved(model, _places(model), saved, adapter_name, plan)
    close_shortcuts(model, switch)
    return plan


def _freeze(model: nn.Module, switch: Switch) -> None:
    before: dict[int, bool] = {}
    for path, module in visited(model):
        for key, p in module._parameters.items():
            if p is not None:  # a shared one is noted under each of its names: a merge unties it
                switch.frozen_before[f"{path}.{key}" if path else key] = before.setdefault(id(p), p.requires_grad)
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


def settle(model: nn.Module, config: Any, adapter: str) -> None:
    """Let the method fill what follows from the tensors that a file has just brought."""
    if isinstance(config, Method) and type(config).settle is not Method.settle:
        attached = [layer.attached[adapter] for _, layer in adapted_layers(model) if adapter in layer.attached]
        here = [(a.place, Tensors(a)) for a in attached if a.place is not None]
        with torch.no_grad():
            config.settle(sorted(here, key=lambda pair: pair[0].index), loaded=True)


def _biases(model: nn.Module, config: Method, selection: Selection, saved: Sequence[Any]) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose biases train, as the config says, but for those of modules whose trained copies act instead."""
    mode = getattr(config, "bias", "none")
    if mode == "none":
        return
    replaced = {id(m) for _, wrapper, *_ in saved for m in wrapper.inside().modules()}
    hit = {id(m.get_base_layer() if isinstance(m, AdaptedLayer) else m) for m in selection.modules.values()}
    hit |= {id(m.out_proj) for m in selection.modules.values() if isinstance(m, nn.MultiheadAttention)}
    for path, module in model.named_modules():
        b = module._parameters.get("bias")
        if b is not None and not isinstance(module, Holder) and id(module) not in replaced and (mode == "all" or id(module) in hit):
            yield path, module


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


def active_adapters(model: nn.Module) -> list[str]:
    """The adapters that act here and now."""
    switch = find_switch(model)
    return list(switch.chosen().names or ()) if switch is not None else []


def set_adapter(model: nn.Module, names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Let these adapters act in this thread, and train (none in inference mode). A merged model is unmerged first, with a warning.

    Raises:
        RouteError: for a name that is not there.
        ConfigError: if one that is to train was put on layers that FSDP2 had sharded before.
    """
    names = [names] if isinstance(names, str) else list(names)
    found = [module for _, module in adapter_modules(model)]
    check_there(names, found)
    _check_late(model, [] if inference_mode else names)
    merged = [m for m in found if isinstance(m, AdaptedLayer) and m.merged_adapters]
    if merged and any(set(layer.merged_adapters) != {n for n in names if n in layer.attached} for layer in merged):
        from .merge import unmerge

        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", PeftWarning, stacklevel=2)
        unmerge(model)
    _choose(found, found[0].switch if found else the_switch(model), names, inference_mode)


def choose(model: nn.Module, switch: Switch, names: Sequence[str], inference_mode: bool = False) -> None:
    """Let these adapters act on every layer and module of the model, and train (none in inference mode).

    Raises:
        ConfigError: if one that is to train was put on layers that FSDP2 had sharded before.
    """
    _check_late(model, [] if inference_mode else names)
    _choose([module for _, module in adapter_modules(model)], switch, names, inference_mode)


def _check_late(model: nn.Module, names: Sequence[str]) -> None:
    """Raise ConfigError if one of these adapters, which are to train, was put on layers that FSDP2 had sharded before."""
    inside = sharded_modules(model) if names else set()
    if not inside:
        return
    reshard(model)
    for path, module in adapter_modules(model):
        for name in names if id(module) in inside else ():
            tensors = [owner._parameters.get(key) for *_, key, owner in module.adapter_slots(name)]
            if any(t is not None and t.is_floating_point() and not is_dtensor(t) for t in tensors):
                raise _after_sharding(name, path)


def _after_sharding(name: str, path: str) -> ConfigError:
    return ConfigError(
        f"{path}: the adapter {name!r} comes to layers that FSDP2 has sharded, which does not know its tensors: every process would train a copy of its own. "
        "Add all adapters before the model is sharded; one that came later can act without training (set_adapter(..., inference_mode=True))."
    )


def _choose(found: Sequence[Wrapper], switch: Switch, names: Sequence[str], inference_mode: bool) -> None:
    switch.set(names)
    switch.off.clear()
    for module in found:
        if module.own is not None:
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
        module.take_off(adapter_name)
    acted = switch.lasting().names or ()
    names = [n for n in acted if n != adapter_name]
    if adapter_name in acted:
        names = names or adapter_names(model)[:1]
        switch.set(names)
    for _, module in adapter_modules(model):
        own = module.own
        if own is not None and adapter_name in (own.names or ()):
            mine = tuple(n for n in own.names or () if n != adapter_name)
            module.own = replace(own, names=mine) if mine else None
    return names


def unload(model: nn.Module) -> nn.Module:
    """Take all adapters and wrappers off: merged layers get their frozen weights back, a rebuilt stack is the first one again, and what trained before
    trains again."""
    from .merge import unmerge

    check_root(model)
    unmerge(model)
    switch = find_switch(model)
    top = unwrap(model, lambda wrapper: wrapper.inside())
    undo(top, switch.replaced if switch is not None else None)
    return top


def check_root(model: nn.Module) -> None:
    """Raise MergeError if FSDP2 keeps tensors of the model by a module around it, without which they stay in pieces."""
    inside = sharded_modules(model)
    if inside and any(
        id(m) not in inside and any(p is not None and is_dtensor(p) for p in m._parameters.values()) for m in model.modules()
    ):
        raise MergeError(
            "FSDP2 has sharded the PeftModel, and the model inside cannot run without it. To serve the merged model take "
            "veneer.distributed.save_merged(model, folder); merge_adapter() and unmerge_adapter() work in place."
        )


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
        open_shortcuts(top, switch)
    return top
