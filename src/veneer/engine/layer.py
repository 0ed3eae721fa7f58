"""The one adapted layer: any site, any method, any number of adapters."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..change import Change, Stacking
from ..errors import RouteError
from ..method import Method
from ..sites import Site
from .holders import Attached, Kept, Keyed, Tensors, drop, get_slot, hold, set_slot, slots
from .route import BASE, Choice, Facts, Switch
from .substitute import call_with

NO_FACTS: Mapping[str, Facts] = {}


class Place:
    """What a method may know of where it acts: one adapter on one layer."""

    def __init__(self, layer: AdaptedLayer, adapter: str, name: str) -> None:
        self.layer, self.adapter, self.name = layer, adapter, name
        site = layer.site
        self.kind, self.n_out, self.n_in = site.kind, site.n_out, site.n_in
        self.kernel, self.groups, self.experts = site.kernel, site.groups, site.experts
        self.channels = site.channels
        self.index, self.count = 0, 1  # which of the adapter's layers this is, and how many there are
        self.memory: dict[str, Any] = {}  # what a method that acts at optimizer steps remembers here; never saved
        self.new_base: Tensor | None = None  # a start that is defined by another base (LoftQ) leaves it here; W (n_out, n_in)
        self.facts: Facts = {}

    def during(self, facts: Facts) -> Place:
        """The same place in one call of the model."""
        here = copy.copy(self)
        here.facts = facts
        return here

    def fact(self, name: str) -> Tensor:
        """What the adapter's method has found out about this call (see `Method.facts`), a row for each row of the batch.

        Raises:
            RouteError: if the call did not come through the model that knows.
        """
        if name not in self.facts:
            raise RouteError(
                f"The adapter {self.adapter!r} needs to know `{name}` of each call, and nothing told {self.name!r}. Call the PeftModel itself"
                + (f", with {name}=..." if name in self.layer.attached[self.adapter].config.takes else "")
                + ", not the model inside it."
            )
        return self.facts[name]

    def other(self, adapter: str) -> Change | None:
        """What another adapter does to the frozen weight here; None where it is not on this layer."""
        return self.layer.change(adapter) if adapter in self.layer.attached else None

    @property
    def module(self) -> nn.Module:
        """The adapted module itself."""
        return self.layer.get_base_layer()

    def weight(self) -> Tensor:
        """The frozen W (n_out, n_in), also while adapters are merged into the layer."""
        return self.layer.frozen_weight()

    def bias(self) -> Tensor | None:
        """The frozen bias (n_out,), also while adapters are merged into the layer."""
        site = self.layer.site
        return self.layer._originals().get(site.bias_name, site.bias(self.layer.base_layer))

    def tensor(self, leaf: str) -> Tensor:
        """One of the adapter's tensors here, with its gradient: for what acts at optimizer steps."""
        return self.layer.leaf(self.adapter, leaf)

    @property
    def scaling(self) -> float:
        return self.layer.scaling[self.adapter] * self.layer.factor

    @property
    def dropout(self) -> float:
        """The probability of input dropout that acts now: 0 outside training."""
        drop = self.layer.dropouts.get(self.adapter)
        return float(drop.p) if isinstance(drop, nn.Dropout) and drop.training else 0.0

    @property
    def training(self) -> bool:
        return self.layer.training


class AdaptedLayer(nn.Module):
    """A module with adapters on one of its weights. In memory its tensors have PEFT's names: `<leaf>.<adapter>.weight`.

    Attributes:
        base_layer: the module that was there, untouched.
        site: how its weight is held and used.
        attached: the adapters on it, by name.
        scaling: the factor of each adapter's change; may be changed at any time.
        factor: a further one, of the layer itself.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, site: Site, switch: Switch, name: str = "") -> None:
        super().__init__()
        self.base_layer = base_layer
        self.site = site
        self.switch = switch
        self.name = name
        self.attached: dict[str, Attached] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.originals: dict[str, tuple[nn.Parameter | None, Tensor | None]] = {}  # while merged: parameter and frozen values, by name
        self.own: Choice | None = None
        self.factor = 1.0
        self.training = base_layer.training

    # ---------------------------------------------------------------- adapters

    def attach(self, adapter: str, attached: Attached, tensors: Mapping[str, Tensor]) -> None:
        """Take on an adapter whose tensors have been made. Nothing here can fail half-way."""
        hold(self, adapter, attached, tensors)
        rate = attached.config.dropout()
        dropouts = f"{attached.config.prefix}dropout"
        if dropouts not in self._modules:
            self._modules[dropouts] = Keyed()
        self._modules[dropouts]._modules[adapter] = nn.Dropout(rate).train(self.training) if rate > 0 else nn.Identity()  # type: ignore[union-attr]
        self.scaling.setdefault(adapter, attached.config.scale())
        self.attached[adapter] = attached
        place = attached.place
        base = place.new_base if place is not None else None
        if place is not None and base is not None:
            place.new_base = None
            p = self.site.codec.weight(self.get_base_layer(), self.site.weight_name)
            p.data = self.site.stored(base).to(p).contiguous()

    @property
    def dropouts(self) -> Mapping[str, nn.Module]:
        for name, module in self._modules.items():
            if name.endswith("dropout") and isinstance(module, Keyed):
                return module._modules  # type: ignore[return-value]
        return {}

    def change(self, adapter: str, facts: Mapping[str, Facts] = NO_FACTS) -> Change:
        """What the adapter does to the frozen weight, from its present tensors and, for methods that route, what is known of the call."""
        a = self.attached[adapter]
        assert a.place is not None
        if adapter in facts:
            return a.config.change(Tensors(a), a.place.during(facts[adapter]))
        if self.training or torch.compiler.is_compiling():
            return a.config.change(Tensors(a), a.place)
        scaling = a.place.scaling
        if a.kept is None or not a.kept.holds(scaling):
            change = a.config.change(Tensors(a), a.place)
            a.kept = Kept.of(change, a, scaling)
            return change
        return a.kept.change

    def changes(self, names: Sequence[str], facts: Mapping[str, Facts] = NO_FACTS) -> list[tuple[Change, Stacking]]:
        configs = [self.attached[n].config for n in names]
        for i, config in enumerate(configs[:-1]):
            config.check_together(configs[i + 1 :])
        return [(self.change(n, facts), c.stacking) for n, c in zip(names, configs, strict=True)]

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

    def start_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """(A0, B0), the frozen start that the change is counted from, where the method has one."""
        a = self.attached[adapter]
        return (a.tensor("lora_A0"), a.tensor("lora_B0")) if "lora_A0" in a.leaves else None

    def frozen_weight(self) -> Tensor:
        """The frozen W (n_out, n_in), also while merged."""
        kept = self.originals.get(self.site.weight_name)
        if kept is not None and kept[1] is not None:
            return self.site.canonical(kept[1])
        return self.site.weight(self.base_layer)

    def _originals(self) -> dict[str, Tensor | None]:
        return {name: values for name, (_, values) in self.originals.items()}

    # ---------------------------------------------------------------- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        choice = self.switch.current(self.own)
        if choice.rows is not None and choice.enabled:
            return self._run_rows(choice, args, kwargs)
        return self._run(self._acting(choice), args, kwargs, choice.facts)

    def _acting(self, choice: Choice) -> list[str]:
        if not choice.enabled or not choice.names:
            return []
        return [n for n in choice.names if n in self.attached]

    def _run(self, names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any], facts: Mapping[str, Facts] = NO_FACTS) -> Any:
        base: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        if names == self.merged_adapters and not (self.site.mutates and not names):  # with nothing merged: no adapter acts
            return base(*args, **kwargs)
        frozen: dict[str, Any] = self._originals() if self.originals else {}
        inner = getattr(base, "out_proj", None) if self.site.kind == "attention" else None
        if isinstance(inner, AdaptedLayer):
            frozen |= {f"out_proj.base_layer.{k}": v for k, v in inner.effective(names).items()}
        if not names and not self.site.mutates:
            return call_with(base, frozen, args, kwargs)
        return self.site.apply(base, self.changes(names, facts), args, kwargs, frozen)

    def effective(self, names: Sequence[str]) -> dict[str, Any]:
        """The base layer's tensors as these adapters change them, by name."""
        names = [n for n in names if n in self.attached]
        frozen: dict[str, Any] = self._originals()
        return self.site.substituted(self.base_layer, self.changes(names), frozen) if names else frozen

    def _run_rows(self, choice: Choice, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        assert choice.rows is not None
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(choice.rows):
            groups.setdefault(name if name in self.attached else BASE, []).append(i)
        if len(groups) == 1:
            (name,) = groups
            return self._run([] if name == BASE else [name], args, kwargs, choice.facts)

        def run(names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any], at: Tensor) -> Any:
            mine = {n: {k: t.index_select(0, at) for k, t in choice.facts[n].items()} for n in names if n in choice.facts}
            return self._run(names, args, kwargs, mine)

        return split_rows(groups, choice.rows, self.site.batch_dim, args, kwargs, run, self.name)

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

    def adapters(self) -> list[str]:
        return list(self.attached)

    def get_base_layer(self) -> nn.Module:
        """The module that was there, under however many wrappers."""
        base = self.base_layer
        while isinstance(base, AdaptedLayer):
            base = base.base_layer
        return base

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def active_adapters(self) -> list[str]:
        choice = self.own or self.switch.chosen()
        return list(choice.names or ())

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def disable_adapters(self) -> bool:
        return not (self.own or self.switch.chosen()).enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose adapters for this layer alone, and let just these train (none in inference mode)."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        enabled = (self.own or self.switch.chosen()).enabled
        self.own = Choice(names, None, enabled)
        self.require_grad_only(() if inference_mode else names)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch this layer's adapters on or off. What trains stays what trained."""
        names = (self.own or self.switch.chosen()).names
        self.own = Choice(names, None, enabled)

    def require_grad_only(self, names: Sequence[str]) -> None:
        for adapter in self.attached:
            self.set_requires_grad(adapter, adapter in names)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the trainable tensors of these adapters get gradients, or not."""
        for adapter in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            a = self.attached.get(adapter)
            if a is None:
                continue
            for name, leaf in a.leaves.items():
                if leaf.trainable and name not in a.derived:
                    t = a.tensor(name)
                    if t.requires_grad != requires_grad:
                        t.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off, with its tensors. The merged base, if it was merged, becomes the frozen one again."""
        if adapter_name not in self.attached:
            return
        if adapter_name in self.merged_adapters:
            self.unmerge()
        a = self.attached.pop(adapter_name)
        drop(self, adapter_name, a)
        dropouts = self._modules[f"{a.config.prefix}dropout"]
        dropouts._modules.pop(adapter_name, None)  # type: ignore[union-attr]
        self.scaling.pop(adapter_name, None)
        inner = getattr(self.base_layer, "out_proj", None) if self.site.kind == "attention" else None
        if isinstance(inner, AdaptedLayer):
            inner.delete_adapter(adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W of one adapter, in the layout of the module's own weight."""
        change = self.change(adapter)
        if change.additive:
            return self.site.stored(change.add.dense()) if change.add is not None else torch.zeros_like(self.get_base_weight())
        w = self.frozen_weight()
        return self.site.stored(change.weight(w) - w)

    def get_base_weight(self) -> Tensor:
        """The frozen weight in the module's own layout."""
        return self.site.stored(self.frozen_weight())

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Put the change of these (or the active) adapters into the layer's weight; the frozen one is kept aside."""
        from .merge import merge_layers

        names = list(adapter_names) if adapter_names is not None else self.active_adapters
        merge_layers([(self.name, self)], names)

    def unmerge(self) -> None:
        """Put the frozen tensors back, bit for bit."""
        from .merge import unmerge_layer

        unmerge_layer(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is on this layer and what it does there is a ΔW, which does not depend on the input."""
        return adapter_name in self.attached and self.attached[adapter_name].config.has_delta()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the scaling `scale` times the nominal one."""
        if adapter in self.attached:
            self.scaling[adapter] = scale * self.attached[adapter].config.scale()

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters, or set it back to the nominal one."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.attached[name].config.scale() if scale is None else self.scaling[name] / scale

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # the frozen values of a merged layer move with it
        self.originals = {k: (p, None if t is None else fn(t)) for k, (p, t) in self.originals.items()}
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
        return f"{self.site.kind} {self.site.n_out}x{self.site.n_in}; {kinds}"


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
    size = len(rows)
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    if first is None or first.ndim <= batch_dim or first.shape[batch_dim] != size:
        got = None if first is None else tuple(first.shape)
        raise RouteError(
            f"adapter_names gives {size} names, but the layer {name!r} got an input of shape {got}: its rows cannot be told apart. "
            "Give one name per row of the batch; a layer that regroups tokens (a mixture of experts) takes one adapter per call (model.using(name))."
        )
    outs: list[Any] = []
    for group, at in groups.items():
        index = torch.tensor(at, device=first.device)

        def part(v: Any, index: Tensor = index) -> Any:
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


__all__ = ["AdaptedLayer", "Place", "get_slot", "set_slot", "split_rows"]


def _fields(config: Method) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
