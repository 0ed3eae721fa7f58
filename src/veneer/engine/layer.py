"""The one adapted layer: any site, any method, any number of adapters.

Long, since a layer answers to many: torch, PEFT's names, checkpoints, merging, compiled code. What an adapter does here stands in `changing`, a batch over
several in `mixing`.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..change import Stacking
from ..errors import ConfigError, MergeError
from ..method import Method
from ..sharding import whole, zero_fetches
from ..sites import Adaptable, Site
from ..sites.parallel import check_cut
from .changing import change_of
from .holders import Attached, Followed, Tensors, container_of, drop, get_slot, hold, made, set_slot, slots, spare_slots, visited
from .mixing import run_rows
from .offload import brought_in, runs_on
from .place import Place
from .repeat import Repeat
from .route import Choice, Facts, Switch, ready
from .substitute import call_with
from .traced import Acting, Seat, Traced, acting, direct, seen
from .wrapper import Wrapper, check_reduced, warn_of_heir

NO_FACTS: Mapping[str, Facts] = {}


class _NoOneWeightError(TypeError, AttributeError):
    """An `AttributeError` too: torch.jit asks a module for each of its attributes whether it is there."""


class AdaptedLayer(Wrapper):
    """A module with adapters on one of its weights. In memory its tensors have PEFT's names: `<leaf>.<adapter>.weight`.

    Attributes:
        base_layer: the module that was there, untouched.
        site: how its weight is held and used.
        attached: the adapters on it, by name.
        scaling: the factor of each adapter's change; may be changed at any time. A tensor in a model that is prepared for hot-swapping.
        factor: a further one, of the layer itself.
        packed: while adapters are merged into a quantised layer, the module that was there; `base_layer` is then the merged one.
        cut: whether a tensor-parallel plan keeps it in pieces; None until it runs.
        assumed: while a merge onto other weights is computed, W (n_out, n_in) in the place of the frozen one.
    """

    base_layer: nn.Module
    site: Adaptable
    attached: dict[str, Attached]
    scaling: Followed
    merged_adapters: list[str]
    originals: dict[str, tuple[nn.Parameter | None, Tensor]]  # while merged: parameter (none for a buffer) and frozen values, by name
    let_train: set[str]  # the adapters whose tensors were last told to get gradients
    factor: float
    last: Repeat | None
    input_dtype: torch.dtype | None  # of a quantised layer, which takes any: that of the last input
    packed: nn.Module | None = None
    assumed: Tensor | None = None
    cut: bool | None = None
    seat: Seat | None = None
    shown: Acting | None = None
    plain: bool = False  # whether compiled code may go the short way

    def __init__(self, base_layer: nn.Module, site: Adaptable, switch: Switch, name: str = "") -> None:
        self.__dict__ = made(nn.Module).__dict__  # and no attribute through torch's checks of each: there may be thousands of layers
        self._modules["base_layer"] = base_layer
        self.__dict__.update(
            site=site,
            switch=switch,
            name=name,
            attached={},
            scaling=Followed(),
            merged_adapters=[],
            originals={},
            own=None,
            let_train=set(),
            factor=1.0,
            last=None,
            input_dtype=None,
            training=base_layer.training,
        )
        switch.layers.append(weakref.ref(self))

    # ---------------------------------------------------------------- adapters

    def attach(self, adapter: str, attached: Attached, tensors: Mapping[str, Tensor]) -> None:
        """Take on an adapter whose tensors have been made. Nothing here can fail half-way."""
        hold(self, adapter, attached, tensors)
        rate = attached.config.dropout()
        dropouts = container_of(self, f"{attached.config.prefix}dropout")
        dropouts[adapter] = nn.Dropout(rate).train(self.training) if rate > 0 else made(nn.Identity)
        self.scaling.setdefault(adapter, attached.config.scale())
        self.attached[adapter] = attached
        self.site.codec.settle(self.get_base_layer())
        place = attached.place
        base = place.new_base if place is not None else None
        if place is not None and base is not None:
            place.new_base = None
            site = self.weight_site
            p = site.codec.weight(self.get_base_layer(), site.weight_name)
            p.data = site.stored(base).to(p).contiguous()
        self.tell_compiled()

    def change(self, adapter: str, facts: Mapping[str, Facts] = NO_FACTS, *, at_rest: bool = False) -> Any:
        """What the adapter does here, from its present tensors and, for methods that route, what is known of the call: a `Change`, or
        what else the site takes.

        Args:
            at_rest: without what acts in training alone, dropout above all.
        """
        return change_of(self, self.attached[adapter], facts, at_rest)

    def changes(self, names: Sequence[str], facts: Mapping[str, Facts] = NO_FACTS, *, at_rest: bool = False) -> list[tuple[Any, Stacking]]:
        return self._changes([self.attached[n] for n in names], facts, at_rest)

    def _changes(self, acting: Sequence[Attached], facts: Mapping[str, Facts], at_rest: bool = False) -> list[tuple[Any, Stacking]]:
        configs = [a.config if a.traced is None else a.traced.config for a in acting]
        for i, config in enumerate(configs[:-1]):
            config.check_together(configs[i + 1 :])
        return [(change_of(self, a, facts, at_rest), c.stacking) for a, c in zip(acting, configs, strict=True)]

    def leaf(self, adapter: str, name: str) -> Tensor:
        """One of the adapter's tensors."""
        return self.attached[adapter].tensor(name)

    def replace_leaves(self, adapter: str, tensors: Mapping[str, Tensor], config_updates: Mapping[str, Any] | None = None) -> None:
        """Put new tensors, of another shape if need be, in the place of the adapter's, and update its config on this layer."""
        a = self.attached[adapter]
        if config_updates:
            a.config = type(a.config)(**{**_fields(a.config), **config_updates})
            assert a.place is not None
            a.leaves = a.config.leaves(a.place)
            self.scaling[adapter] = a.config.scale()
        for name, t in tensors.items():
            store, key = a.source[name]
            old: Tensor = store[key]
            new = t.detach().to(device=self.home() if old.is_meta else old.device, dtype=old.dtype).clone()
            store[key] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        self.tell_compiled()

    def start_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """(A0, B0), the frozen start that the change is counted from, where the method has one."""
        a = self.attached[adapter]
        return (a.tensor("lora_A0"), a.tensor("lora_B0")) if "lora_A0" in a.leaves else None

    @property
    def weight_site(self) -> Site:
        """The site as one of a single weight.

        Raises:
            TypeError: for one that is not.
        """
        if not isinstance(self.site, Site):
            raise self._no_one_weight()
        return self.site

    def _no_one_weight(self) -> _NoOneWeightError:
        return _NoOneWeightError(f"{self.name!r} is adapted as a {self.site.kind}, not in one weight of it.")

    def home(self) -> torch.device:
        """Where the layer runs."""
        return runs_on(self.frozen) or self.site.where(self.frozen)[0]

    @property
    def quantised(self) -> bool:
        """Whether the frozen weight is packed by a quantisation library."""
        return isinstance(self.site, Site) and not self.site.codec.plain

    @property
    def frozen(self) -> nn.Module:
        """The module with the frozen tensors; of a merged layer that is not quantised, they are in `originals`."""
        return self._modules["base_layer"] if self.packed is None else self.packed  # type: ignore[return-value]

    def frozen_tensors(self) -> dict[str, Tensor]:
        """The frozen tensors that adapters may change here, by name inside the module, also while merged."""
        return {**self.site.tensors(self.frozen), **self.originals_whole()}

    def frozen_weight(self) -> Tensor:
        """The frozen W (n_out, n_in), also while merged; of a packed one, dequantised for this use."""
        if self.assumed is not None:
            return self.assumed
        site = self.weight_site
        kept = self.originals.get(site.weight_name)
        if kept is not None:
            return site.canonical(whole(kept[1]))
        if "_hf_hook" not in self.frozen.__dict__:
            return site.weight(self.frozen)
        with brought_in(self.frozen):
            return site.weight(self.frozen)

    def originals_whole(self) -> dict[str, Tensor]:
        return {name: whole(values) for name, (_, values) in self.originals.items()}

    # ---------------------------------------------------------------- compiled

    def tell_compiled(self) -> None:
        """After a change of what adapters there are here, or of their configs."""
        if self.switch.compiled:
            self.lay_out()

    def lay_out(self) -> None:
        """Lay out what compiled code reads here; see `veneer.engine.traced`."""
        for a in self.attached.values():
            if a.traced is not None:
                a.traced.read_from(a)
            elif a.place is not None and self.factor == 1:
                a.traced = Traced(a, a.place)
        self.plain = self.site.ordinary and type(self.base_layer) is nn.Linear
        self.seat = Seat(self) if "_original_parameters" not in self.__dict__ else None  # DeepSpeed's, under ZeRO-3: see `forward`
        self.show(self.switch.default)

    def show(self, choice: Choice) -> None:
        """Let compiled code know who acts by default."""
        self.__dict__["shown"] = acting(self, choice)

    def show_here(self, choice: Choice | None) -> None:
        """Let compiled code know who acts in this thread; None: whoever acts by default."""
        if self.seat is not None:
            self.seat.acting = None if choice is None else acting(self, choice)

    def _replicate_for_data_parallel(self) -> AdaptedLayer:
        new: Any = super()._replicate_for_data_parallel()
        new.__dict__["attached"] = {name: a.replica(new) for name, a in self.attached.items()}
        new.last = None
        return new  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {k: v for k, v in state.items() if k not in ("seat", "shown", "plain")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.switch.__dict__.setdefault("layers", []).append(weakref.ref(self))

    # ---------------------------------------------------------------- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if compiling and ready():
            here = seen(self)
            if here is not None:
                y = direct(self, here[0], args[0]) if self.plain and len(here) == len(args) == 1 and not kwargs else None
                return y if y is not None else self.run_acting(here, args, kwargs)
        choice = self.switch.current(self.own)
        last = self.last  # read once: another thread may take an adapter off
        if not compiling and last is not None:
            out = last.run(self, choice, args, kwargs)
            if out is not None:
                return out
        if "_original_parameters" in self.__dict__:  # DeepSpeed's, under ZeRO-3
            self._check_in_pieces()
            zero_fetches(self, self._read_here())
        if not compiling and self.training:
            for name in choice.acting:
                if (a := self.attached.get(name)) is not None:
                    check_reduced(name, self.name, (store[key] for store, key in a.trains))
        if choice.rows is not None and choice.enabled:
            return run_rows(self, choice, args, kwargs)
        out = self.run_acting(self._acting(choice), args, kwargs, choice.facts)
        if not torch.is_grad_enabled() and not compiling:
            self.last = Repeat.of(self, choice)
        return out

    def _check_in_pieces(self) -> None:
        for name, a in self.attached.items():
            if not a.config.in_pieces:
                raise ConfigError(
                    f"{self.name}: DeepSpeed's ZeRO-3 keeps every tensor in pieces, and the adapter {name!r} ({type(a.config).__name__}) is not known to train "
                    "right there: LoRA, DoRA, IA3, OFT and VeRA are. Use ZeRO-2, FSDP2 (veneer.distributed.shard) or DDP."
                )

    def _read_here(self) -> Iterator[Tensor]:
        """What a call reads itself, instead of calling the modules that hold it."""
        for module in self.modules():
            yield from (p for p in module._parameters.values() if p is not None)
        for a in self.attached.values():
            yield from (a.tensor(n) if not transposed else other.tensor(leaf) for n, (other, leaf, transposed) in a.derived.items())

    def _acting(self, choice: Choice) -> list[Attached]:
        if not choice.enabled or not choice.names:
            return []
        found = [self.attached.get(n) for n in choice.names]  # one look for each: another thread may take one off
        return [a for a in found if a is not None]

    def run_acting(
        self, acting: list[Attached], args: tuple[Any, ...], kwargs: Mapping[str, Any], facts: Mapping[str, Facts] = NO_FACTS
    ) -> Any:
        base: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        inner = getattr(base, "out_proj", None) if self.site.kind == "attention" else None
        names = [a.place.adapter for a in acting if a.place is not None] if isinstance(inner, AdaptedLayer) else []
        as_it_is = self._is_merged(acting) and (not isinstance(inner, AdaptedLayer) or inner.is_merged(names))
        if as_it_is and not (self.site.mutates and not acting):  # with nothing merged: no adapter acts
            return base(*args, **kwargs)
        frozen: dict[str, Any] = self.originals_whole() if self.originals else {}
        if not torch.compiler.is_compiling() and self.cut is None:
            self.cut = check_cut(self.frozen, self.site, self.name)
        if frozen and self.cut and self.site.kind != "linear":
            raise ConfigError(
                f"{self.name}: a tensor-parallel {self.site.kind} whose adapters are merged runs with these or not at all. Unmerge first."
            )
        if self.quantised:
            return self._run_packed(acting, args, kwargs, facts)
        if isinstance(inner, AdaptedLayer):
            frozen |= {f"out_proj.base_layer.{k}": v for k, v in inner.effective(names).items()}
        if not acting and not self.site.mutates and not (frozen and self.cut):  # a cut module's forward is bound to the merged one
            return call_with(base, frozen, args, kwargs)
        return self.site.apply(base, self._changes(acting, facts), args, kwargs, frozen)

    def is_merged(self, names: Sequence[str]) -> bool:
        """Whether those of these adapters that are here are the ones that are merged."""
        return self._is_merged([self.attached[n] for n in names if n in self.attached])

    def _is_merged(self, acting: list[Attached]) -> bool:
        """Whether these are the adapters that are merged."""
        merged = self.merged_adapters
        return len(acting) == len(merged) and all(self.attached.get(n) is a for n, a in zip(merged, acting, strict=True))

    def _run_packed(self, acting: list[Attached], args: tuple[Any, ...], kwargs: Mapping[str, Any], facts: Mapping[str, Facts]) -> Any:
        """With W packed: what needs W whole, or forms a change of its size, is computed again in the backward, so that no layer keeps any."""
        base = self.frozen
        if not acting:
            return base(*args, **kwargs)

        def run(*args: Any) -> Any:
            return self.site.apply(base, self._changes(acting, facts), args, kwargs, {})

        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            self.input_dtype = args[0].dtype
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or all(self._lean(a, facts) for a in acting):
            return run(*args)
        return checkpoint(run, *args, use_reentrant=False)

    @staticmethod
    def _lean(a: Attached, facts: Mapping[str, Facts]) -> bool:
        """Whether the adapter's change is applied without W and without anything of its size; found out once, by making it."""
        if a.lean is None:
            assert a.place is not None
            here = a.place.during(facts.get(a.place.adapter, {}))
            here.read = False
            with torch.random.fork_rng(devices=[]):
                change: Any = a.config.change(Tensors(a, detached=True), here)
                a.lean = change.lean and not here.read
        return a.lean

    def effective(self, names: Sequence[str]) -> dict[str, Any]:
        """The base layer's tensors as these adapters change them, by name."""
        names = [n for n in names if n in self.attached]
        frozen: dict[str, Any] = self.originals_whole()
        return self.site.substituted(self.frozen, self.changes(names), frozen) if names else frozen

    # ---------------------------------------------------------------- checkpoint

    def adapter_slots(self, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """(name in the file, name in memory, key, owner) of each saved tensor, relative to the layer's path."""
        if adapter in self.attached:
            yield from slots(self, adapter, self.attached[adapter], False)

    def adapter_start_slots(self, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """The same for frozen start values, which stand in a file of their own."""
        if adapter in self.attached:
            yield from slots(self, adapter, self.attached[adapter], True)

    def adapter_spare_slots(self, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """The same for what a file need not have: tensors of the layer that this one is tied to."""
        if adapter in self.attached:
            yield from spare_slots(self, adapter, self.attached[adapter])

    # ---------------------------------------------------------------- PEFT's public names

    def inside(self) -> nn.Module:
        return self.base_layer

    def adapters(self) -> list[str]:
        return list(self.attached)

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The attributes that hold trained tensors of adapters, each by adapter."""
        return tuple(
            dict.fromkeys(
                leaf.container or n for a in self.attached.values() for n, leaf in a.leaves.items() if leaf.trainable and n not in a.derived
            )
        )

    def get_base_layer(self) -> nn.Module:
        """The module that was there, under however many wrappers."""
        base: Any = self._modules["base_layer"]
        while isinstance(base, AdaptedLayer):
            base = base._modules["base_layer"]
        return base  # type: ignore[no-any-return]

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the trainable tensors of these adapters get gradients, or not."""
        for adapter in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            a = self.attached.get(adapter)
            if a is None:
                continue
            (self.let_train.add if requires_grad else self.let_train.discard)(adapter)
            for name, leaf in a.leaves.items():
                if leaf.trainable and name not in a.derived:
                    t = a.tensor(name)
                    if t.requires_grad != requires_grad:
                        t.requires_grad_(requires_grad)

    def require_grad_only(self, names: Sequence[str]) -> None:
        for adapter in {*self.let_train, *names}:  # of others, what somebody lets train by hand gets no gradients: they do not act
            a, wanted = self.attached.get(adapter), adapter in names
            for store, key in a.trains if a is not None else ():
                if store[key].requires_grad is not wanted:
                    store[key].requires_grad_(wanted)
        self.__dict__["let_train"] = {n for n in names if n in self.attached}

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off this layer. If no other was chosen here, the first that is left acts, and trains, with a warning."""
        choice = self.chosen()
        self.take_off(adapter_name)
        if adapter_name not in (choice.names or ()):
            return
        names = tuple(n for n in choice.names or () if n != adapter_name)
        if not names and self.attached:
            names = (next(iter(self.attached)),)
            self.set_requires_grad(names)
            warn_of_heir(adapter_name, names[0], stacklevel=3)
        self.own = Choice(names, None, choice.enabled)

    def take_off(self, adapter_name: str) -> None:
        """Drop an adapter with its tensors. The merged base, if it was merged, becomes the frozen one again."""
        if adapter_name not in self.attached:
            return
        if adapter_name in self.merged_adapters:
            self.unmerge()
        a = self.attached.pop(adapter_name)
        self.last = None  # which may hold its tensors
        drop(self, adapter_name, a)
        del container_of(self, f"{a.config.prefix}dropout")[adapter_name]
        self.scaling.pop(adapter_name, None)
        self.let_train.discard(adapter_name)
        self.tell_compiled()
        inner = getattr(self.base_layer, "out_proj", None) if self.site.kind == "attention" else None
        if isinstance(inner, AdaptedLayer):
            inner.take_off(adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W of one adapter, in the layout of the module's own weight.

        Raises:
            MergeError: if the change depends on the input.
        """
        if why := self.attached[adapter].config.unmergeable:
            raise MergeError(f"{self.name}: no weight holds the change of the adapter {adapter!r}: {why}.")
        site, change = self.weight_site, self.change(adapter, at_rest=True)
        if change.additive:
            return site.stored(change.add.dense()) if change.add is not None else torch.zeros_like(self.get_base_weight())
        w = self.frozen_weight()
        return site.stored(change.weight(w) - w)

    def get_base_weight(self) -> Tensor:
        """The frozen weight in the module's own layout."""
        return self.weight_site.stored(self.frozen_weight())

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Put the change of these (or the active) adapters into the layer's weight, a quantised one made dense; the frozen one is kept aside."""
        from .merge import merge_layers

        names = list(adapter_names) if adapter_names is not None else self.active_adapters
        merge_layers([(self.name, self)], names)

    def unmerge(self) -> None:
        """Put the frozen tensors back, bit for bit."""
        from .merge import unmerge_layer

        unmerge_layer(self)

    def put_merged(self, module: nn.Module, names: list[str]) -> None:
        """Let a module with these adapters merged stand in the place of the quantised one, which is kept."""
        self.__dict__["packed"] = self.frozen  # not a submodule: a checkpoint has the merged one
        self.base_layer = module
        self.merged_adapters = names

    def put_back(self) -> None:
        """Put the quantised module itself back."""
        if self.packed is not None:
            self.base_layer = self.packed.train(self.training)
            self.forget_packed()

    def forget_packed(self) -> None:
        """Let go of the quantised module."""
        self.__dict__.pop("packed", None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is on this layer and what it does there is a ΔW, which does not depend on the input."""
        return adapter_name in self.attached and self.attached[adapter_name].config.has_delta()

    def rescale(self, adapter: str, scaling: float) -> None:
        """Set the scaling of an adapter; in place where it is a tensor, which compiled code goes on with."""
        now: Any = self.scaling[adapter]
        if isinstance(now, Tensor):
            now.fill_(scaling)
        else:
            self.scaling[adapter] = scaling

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the scaling `scale` times the nominal one."""
        if adapter in self.attached:
            self.rescale(adapter, scale * self.attached[adapter].config.scale())

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.rescale(name, float(self.scaling[name]) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters, or set it back to the nominal one."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.rescale(name, self.attached[name].config.scale() if scale is None else float(self.scaling[name]) / scale)

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # the frozen values of a merged layer move with it
        self.originals = {k: (p, fn(t)) for k, (p, t) in self.originals.items()}
        if self.packed is not None:
            self.packed._apply(fn, recurse)
        for name, s in self.scaling.items():
            if isinstance(s, Tensor):
                self.scaling[name] = fn(s).to(s.dtype).copy_(s)  # which a narrow dtype on the way would have rounded
            elif (a := self.attached.get(name)) is not None and a.traced is not None and isinstance(a.traced.scaling, Tensor):
                a.traced.scaling = fn(a.traced.scaling).to(a.traced.scaling.dtype).fill_(s)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "weight_site":  # it has raised, and Python asks here
                raise self._no_one_weight() from None
            attached = self.__dict__.get("attached") or {}
            values = {k: getattr(a.config, name) for k, a in attached.items() if name in {f.name for f in dataclasses.fields(a.config)}}
            if values:
                return values  # PEFT's per-adapter tables: layer.r["default"]
            base = self._modules.get("base_layer")
            if base is None or name.startswith("__"):
                raise
            return getattr(base, name)

    def extra_repr(self) -> str:
        kinds = ", ".join(f"{n}: {type(a.config).__name__}" for n, a in self.attached.items())
        sides = f" {self.site.n_out}x{self.site.n_in}" if self.site.n_out else ""
        return f"{self.site.kind}{sides}; {kinds}"


__all__ = ["AdaptedLayer", "Place", "get_slot", "set_slot"]


def _fields(config: Method) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Every adapted layer with its path."""
    for path, module in visited(model):
        if isinstance(module, AdaptedLayer):
            yield path, module
