"""The one adapted layer: any site, any method, any number of adapters."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..change import Change, Stacking, low_rank
from ..errors import ConfigError, MergeError, RouteError
from ..kernels.norms import checksum
from ..method import Method
from ..ops import LowRank, Switched
from ..sharding import whole, zero_fetches
from ..sites import Adaptable, Site
from ..sites.linear import LinearSite
from ..sites.parallel import check_cut
from ..sites.whole import WholeSite
from .caching import keeping, stamp
from .holders import Attached, Followed, Kept, Recalled, Tensors, container_of, drop, get_slot, hold, made, set_slot, slots, visited
from .offload import brought_in
from .place import Place
from .repeat import Repeat
from .route import BASE, Choice, Facts, Switch, ready
from .substitute import call_with
from .traced import Acting, Seat, Traced, acting, direct, seen
from .wrapper import Wrapper

NO_FACTS: Mapping[str, Facts] = {}


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
        return self._change(self.attached[adapter], facts, at_rest)

    def _change(self, a: Attached, facts: Mapping[str, Facts], at_rest: bool = False) -> Any:
        if a.traced is not None and torch.compiler.is_compiling() and not facts and not at_rest:
            made = a.traced.config.change(a.traced.held or Tensors(a), a.traced)
            return self._skipped(made, a.traced.config, a) if self.training else made
        assert a.place is not None
        if self.training and at_rest:
            return a.config.change(Tensors(a), a.place.at_rest())
        told = facts.get(a.place.adapter) if facts else None
        if self.training or told is not None or torch.compiler.is_compiling():
            change = a.config.change(Tensors(a), a.place if told is None else a.place.during(told))
            return self._skipped(change, a.config, a) if self.training else change
        if keeping() and not torch.is_grad_enabled() and isinstance(self.site, Site):
            return self._cached(a)
        scaling = a.place.scaling
        if a.kept is not None and a.kept.holds(scaling):
            return a.kept.change
        if torch.is_grad_enabled() or a.config.routes or isinstance(scaling, Tensor) or not isinstance(self.site, Site):
            change = a.config.change(Tensors(a), a.place)
            a.kept = Kept.of(change, a, scaling)
            return change
        return self._recalled(a, scaling)

    def _recalled(self, a: Attached, scaling: float) -> Any:
        """The change as it was the last time, if all it is made of is equal to what it was."""
        assert a.place is not None
        tensors = Tensors(a)
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        before = a.recalled
        if before is not None and before.holds(scaling, vars(tensors), lambda: checksum(self.frozen_weight()), autocast):
            return before.change
        here = a.place.during({})
        here.told, here.asked = a.place.told, False
        change: Any = a.config.change(tensors, here)
        a.kept, a.recalled = Kept.of(change, a, scaling), None
        if a.kept is None and self.assumed is None and Recalled.worth(change, vars(tensors)):
            weight = checksum(self.frozen_weight()) if here.asked else None
            if not here.asked or weight is not None:
                a.recalled = Recalled(change, scaling, {k: t.clone() for k, t in vars(tensors).items()}, weight, autocast)
        return change

    @staticmethod
    def _skipped(change: Any, config: Method, a: Attached) -> Any:
        """The change, or none of it with the probability that the method asks for."""
        rate = config.skip()
        if rate > 0 and change.add is not None:
            some = a.tensor(next(iter(a.leaves)))
            change.add = Switched(change.add, torch.rand((), device=some.device) >= rate)
        return change

    def _cached(self, a: Attached) -> Change:
        """The change as it was the last time, if nothing it is made of has been written to since."""
        assert a.place is not None
        now = (float(a.place.scaling), stamp([*vars(tensors := Tensors(a)).values(), self.frozen_weight()]))
        if a.cached is None or a.cached[0] != now:
            change: Any = a.config.change(tensors, a.place)
            if type(change.add) is not LowRank:
                return change  # type: ignore[no-any-return]  # it may be as large as the weight
            a.cached = now, change
        return a.cached[1]

    def changes(self, names: Sequence[str], facts: Mapping[str, Facts] = NO_FACTS, *, at_rest: bool = False) -> list[tuple[Any, Stacking]]:
        return self._changes([self.attached[n] for n in names], facts, at_rest)

    def _changes(self, acting: Sequence[Attached], facts: Mapping[str, Facts], at_rest: bool = False) -> list[tuple[Any, Stacking]]:
        configs = [a.config if a.traced is None else a.traced.config for a in acting]
        for i, config in enumerate(configs[:-1]):
            config.check_together(configs[i + 1 :])
        return [(self._change(a, facts, at_rest), c.stacking) for a, c in zip(acting, configs, strict=True)]

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
            new = t.detach().to(device=old.device, dtype=old.dtype).clone()
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
            raise TypeError(f"{self.name!r} is adapted as a {self.site.kind}, not in one weight of it.")
        return self.site

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
        return {**self.site.tensors(self.frozen), **self._originals()}

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

    def _originals(self) -> dict[str, Tensor]:
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
        site = self.site
        self.plain = (
            type(site) is LinearSite
            and site.codec.plain
            and not site.transposed
            and not site.own_forward
            and type(self.base_layer) is nn.Linear
        )
        self.seat = Seat(self) if "_original_parameters" not in self.__dict__ else None  # DeepSpeed's, under ZeRO-3: see `forward`
        self.show(self.switch.default)

    def show(self, choice: Choice) -> None:
        """Let compiled code know who acts by default."""
        self.__dict__["shown"] = acting(self, choice)

    def show_here(self, choice: Choice) -> None:
        """Let compiled code know who acts in this thread."""
        if self.seat is not None:
            self.seat.acting = acting(self, choice)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("seat", "shown", "plain")}

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
                return y if y is not None else self._run(here, args, kwargs)
        choice = self.switch.current(self.own)
        if not compiling and self.last is not None:
            out = self.last.run(self, choice, args, kwargs)
            if out is not None:
                return out
        if "_original_parameters" in self.__dict__:  # DeepSpeed's, under ZeRO-3
            self._check_in_pieces()
            zero_fetches(self, self._read_here())
        if choice.rows is not None and choice.enabled:
            return self._run_rows(choice, args, kwargs)
        out = self._run(self._acting(choice), args, kwargs, choice.facts)
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
        return [self.attached[n] for n in choice.names if n in self.attached]

    def _run(self, acting: list[Attached], args: tuple[Any, ...], kwargs: Mapping[str, Any], facts: Mapping[str, Facts] = NO_FACTS) -> Any:
        base: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        if self._is_merged(acting) and not (self.site.mutates and not acting):  # with nothing merged: no adapter acts
            return base(*args, **kwargs)
        frozen: dict[str, Any] = self._originals() if self.originals else {}
        if not torch.compiler.is_compiling() and self.cut is None:
            self.cut = check_cut(self.frozen, self.site, self.name)
        if frozen and self.cut and self.site.kind != "linear":
            raise ConfigError(
                f"{self.name}: a tensor-parallel {self.site.kind} whose adapters are merged runs with these or not at all. Unmerge first."
            )
        if self.quantised:
            return self._run_packed(acting, args, kwargs, facts)
        inner = getattr(base, "out_proj", None) if self.site.kind == "attention" else None
        if isinstance(inner, AdaptedLayer):
            names = [a.place.adapter for a in acting if a.place is not None]
            frozen |= {f"out_proj.base_layer.{k}": v for k, v in inner.effective(names).items()}
        if not acting and not self.site.mutates and not (frozen and self.cut):  # a cut module's forward is bound to the merged one
            return call_with(base, frozen, args, kwargs)
        return self.site.apply(base, self._changes(acting, facts), args, kwargs, frozen)

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
        frozen: dict[str, Any] = self._originals()
        return self.site.substituted(self.frozen, self.changes(names), frozen) if names else frozen

    def _run_rows(self, choice: Choice, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        assert choice.rows is not None
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(choice.rows):
            groups.setdefault(name if name in self.attached else BASE, []).append(i)
        if len(groups) == 1:
            (name,) = groups
            return self._run([] if name == BASE else [self.attached[name]], args, kwargs, choice.facts)

        if isinstance(self.site, WholeSite):
            _told_apart(choice.rows, self.site.batch_dim, args, kwargs, self.name)
            effects = [(self.change(name, choice.facts), at) for name, at in groups.items() if name != BASE]
            return self.site.run(self.base_layer, effects, args, kwargs)

        lows = self._lows(groups, choice, args, kwargs)
        if lows:  # these and the rows without an adapter need no product of their own
            thin = [i for name in (BASE, *lows) for i in groups.pop(name, ())]
            order = {name: k for k, name in enumerate(lows)}
            owner = [order.get(name, -1) for name in choice.rows]
            groups = {BASE: sorted(thin), **groups}
            if len(groups) == 1:
                _told_apart(choice.rows, 0, args, kwargs, self.name)
                return self._run_lows(lows, owner, args[0])

        def run(names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any], at: Tensor) -> Any:
            if lows and not names:
                return self._run_lows(lows, [owner[i] for i in at.tolist()], args[0])
            mine = {n: {k: t.index_select(0, at) for k, t in choice.facts[n].items()} for n in names if n in choice.facts}
            return self._run([self.attached[n] for n in names], args, kwargs, mine)

        return split_rows(groups, choice.rows, self.site.batch_dim, args, kwargs, run, self.name)

    def _lows(self, groups: Mapping[str, Any], choice: Choice, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, LowRank]:
        """The adapters of a mixed batch that add a low-rank change and do nothing else, with it: their rows share the frozen product."""
        if not isinstance(self.site, LinearSite) or not self.site.splits(self.frozen, args, kwargs):
            return {}
        found = {}
        for name in groups:
            if name == BASE or name in choice.facts:
                continue
            change = self.change(name)
            low = low_rank(change)
            if low is not None and change.shift is None and not low.dropout:
                found[name] = low
        return found if len(found) + (BASE in groups) > 1 else {}

    def _run_lows(self, lows: Mapping[str, LowRank], owner: Sequence[int], x: Tensor) -> Tensor:
        assert isinstance(self.site, LinearSite)
        return self.site.apply_rows(self.frozen, list(lows.values()), owner, x, self._originals())

    # ---------------------------------------------------------------- checkpoint

    def adapter_slots(self, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """(name in the file, name in memory, key, owner) of each saved tensor, relative to the layer's path."""
        if adapter in self.attached:
            yield from slots(self, adapter, self.attached[adapter], False)

    def adapter_start_slots(self, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """The same for frozen start values, which stand in a file of their own."""
        if adapter in self.attached:
            yield from slots(self, adapter, self.attached[adapter], True)

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
        """Take an adapter off, with its tensors. The merged base, if it was merged, becomes the frozen one again."""
        if adapter_name not in self.attached:
            return
        if adapter_name in self.merged_adapters:
            self.unmerge()
        a = self.attached.pop(adapter_name)
        drop(self, adapter_name, a)
        del container_of(self, f"{a.config.prefix}dropout")[adapter_name]
        self.scaling.pop(adapter_name, None)
        self.let_train.discard(adapter_name)
        self.tell_compiled()
        inner = getattr(self.base_layer, "out_proj", None) if self.site.kind == "attention" else None
        if isinstance(inner, AdaptedLayer):
            inner.delete_adapter(adapter_name)

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
                self.scaling[name] = fn(s).to(s.dtype)
            elif (a := self.attached.get(name)) is not None and a.traced is not None and isinstance(a.traced.scaling, Tensor):
                a.traced.scaling = fn(a.traced.scaling).to(a.traced.scaling.dtype).fill_(s)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
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


def split_rows(
    groups: Mapping[str, Sequence[int]],
    rows: Sequence[str],
    batch_dim: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    run: Any,
    name: str,
) -> Any:
    """Run each group of rows, `run(names, args, kwargs, numbers of the rows)`, with its own adapter and put the outputs back in order.

    Raises:
        RouteError: if the first input has not one row per name.
    """
    size, first = len(rows), _told_apart(rows, batch_dim, args, kwargs, name)
    if any(hasattr(a, "get_seq_length") for a in (*args, *kwargs.values())):
        raise RouteError(
            f"{name!r} writes into a cache of keys and values, which cannot be split into rows with different adapters. Give use_cache=False, "
            "or take one adapter per call (model.using(name))."
        )
    outs: list[Any] = []
    for group, at in groups.items():
        index = torch.tensor(at, device=first.device)

        def part(v: Any, index: Tensor = index) -> Any:
            if isinstance(v, tuple):
                return tuple(part(x, index) for x in v)
            return v.index_select(batch_dim, index) if isinstance(v, Tensor) and v.ndim > batch_dim and v.shape[batch_dim] == size else v

        outs.append(run([] if group == BASE else [group], tuple(part(a) for a in args), {k: part(v) for k, v in kwargs.items()}, index))
    order = torch.tensor([i for at in groups.values() for i in at], device=first.device)
    back = torch.argsort(order)

    def join(parts: Sequence[Any]) -> Any:
        if isinstance(parts[0], Tensor):
            return torch.cat([p.to(parts[0].dtype) for p in parts], batch_dim).index_select(batch_dim, back)
        if isinstance(parts[0], tuple):
            return tuple(join(p) for p in zip(*parts, strict=True))
        return parts[0]

    return join(outs)


def _told_apart(rows: Sequence[str], batch_dim: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Tensor:
    """The first input, which has one row per name."""
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    if first is None or first.ndim <= batch_dim or first.shape[batch_dim] != len(rows):
        got = None if first is None else tuple(first.shape)
        raise RouteError(
            f"adapter_names gives {len(rows)} names, but the layer {name!r} got an input of shape {got}: its rows cannot be told apart. "
            "Give one name per row of the batch; a layer that regroups tokens (a mixture of experts) takes one adapter per call (model.using(name))."
        )
    return first


__all__ = ["AdaptedLayer", "Place", "get_slot", "set_slot", "split_rows"]


def _fields(config: Method) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Every adapted layer with its path."""
    for path, module in visited(model):
        if isinstance(module, AdaptedLayer):
            yield path, module
