"""The laws, each a function of one case. They need torch and veneer alone; a test runner is not asked for."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..change import bias as changed_bias
from ..change import weight as changed_weight
from ..config import PeftConfig
from ..engine.inject import adapted_layers
from ..engine.substitute import call_with
from ..kernels import reference
from ..mapping import get_peft_model
from ..method import Method
from ..model import PeftModel
from .sites import SITES, SiteCase

ROWS = 4


class Exempt(Exception):  # noqa: N818  no error: the law does not speak of this case
    """Raised by a law that says nothing about a case, with the reason."""


@dataclass(frozen=True)
class Case:
    """A config on a site in a dtype."""

    config: Method
    site: str
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{type(self.config).__name__}-{self.site}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def place(self) -> SiteCase:
        return SITES[self.site]

    def base(self) -> nn.Module:
        """The site's model, the same every time."""
        torch.manual_seed(1)
        return self.place.model().to(self.dtype)

    def inputs(self, rows: int = ROWS) -> Tensor:
        """A batch, the same every time."""
        torch.manual_seed(2)
        x = self.place.inputs(rows)
        return x.to(self.dtype) if x.is_floating_point() else x

    def targeted(self) -> Method:
        """The config, told where the site is."""
        known = {f.name for f in dataclasses.fields(self.config)}
        missing = set(self.place.fields) - known
        if missing:
            raise Exempt(f"{type(self.config).__name__} has no {sorted(missing)}")
        return dataclasses.replace(copy.deepcopy(self.config), **copy.deepcopy(self.place.fields))

    def fresh(self) -> PeftModel:
        """The site's model with the adapter as it starts."""
        torch.manual_seed(3)
        return get_peft_model(self.base(), self.targeted())

    def trained(self) -> PeftModel:
        """The same with every trained number moved, in eval mode."""
        model = self.fresh()
        move(model)
        return model.eval()

    def close(self, a: Tensor, b: Tensor, loose: float = 1.0) -> None:
        """Equal up to what the dtype can carry."""
        tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2}[self.dtype] * loose
        torch.testing.assert_close(a, b, atol=tolerance * float(b.detach().float().abs().max().clamp_min(1)), rtol=0)


def move(model: nn.Module, seed: int = 4, size: float = 0.1) -> None:
    """Add noise to every number that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * size)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def _frozen(model: PeftModel) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


# -------------------------------------------------------------------- the laws


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output without gradients: torch takes other paths where some are wanted, which differ in the last bit."""
    y: Tensor = model(x)
    return y


def identity_at_the_start(case: Case) -> None:
    """A fresh adapter changes nothing, where the method says so."""
    if not getattr(case.config, "starts_as_identity", True) or getattr(case.config, "init_lora_weights", True) is False:
        raise Exempt("the method does not claim it")
    case.close(case.fresh().eval()(case.inputs()), case.base().eval()(case.inputs()))


def moves_the_output(case: Case) -> None:
    """A trained adapter changes something: no law below holds for want of an effect."""
    assert not torch.equal(case.trained()(case.inputs()), case.base().eval()(case.inputs()))


def output_is_that_of_the_changed_weight(case: Case) -> None:
    """The layer computes what the bare module computes with W' and b' in place of W and b."""
    if not case.place.mergeable:
        raise Exempt("no weight of the layer holds the change")
    model = case.trained()
    root = model.get_base_model()
    for path, layer in list(adapted_layers(root)):
        parent, _, name = path.rpartition(".")
        changes, site = layer.changes(["default"]), layer.site
        w = site.stored(changed_weight(changes, site.weight(layer.base_layer)))
        tensors: dict[str, Any] = {site.weight_name: w}
        b = changed_bias(changes, site.bias(layer.base_layer))
        if b is not None:
            tensors[site.bias_name] = b.to(w.dtype)
        if site.kind == "attention":
            inner = layer.base_layer.out_proj
            tensors |= {f"out_proj.base_layer.{k}": v for k, v in inner.effective(["default"]).items()}  # type: ignore[operator, union-attr]
        expected = _Bare(layer.base_layer, tensors)
        x = case.inputs()
        got = model(x)
        setattr(root.get_submodule(parent) if parent else root, name, expected)
        case.close(got, model(x), 2.0)
        return


class _Bare(nn.Module):
    def __init__(self, module: nn.Module, tensors: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.tensors = module, tensors

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return call_with(self.module, self.tensors, args, kwargs)


def fused_equals_reference(case: Case) -> None:
    """The fused path gives the readable one's output and every gradient."""
    from ..sites import linear

    def run(fused: bool) -> list[Tensor]:
        model = case.trained()
        x = case.inputs()
        x = x.requires_grad_() if x.is_floating_point() else x
        original = vars(linear)["lowrank_linear"]
        vars(linear)["lowrank_linear"] = original if fused else reference.lowrank_linear
        try:
            y = model(x)
            leaves = [p for p in model.parameters() if p.requires_grad] + ([x] if x.requires_grad else [])
            return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]
        finally:
            vars(linear)["lowrank_linear"] = original

    for got, expected in zip(run(True), run(False), strict=True):
        case.close(got, expected, 2.0)


def merged_equals_unmerged(case: Case) -> None:
    """Merging keeps the output."""
    model = case.trained()
    x = case.inputs()
    y = model(x)
    if not case.place.mergeable and case.config.prefix == "lora_":
        before = _state(model)
        try:
            model.merge_adapter()
        except ValueError:
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            return
        raise AssertionError("a change that no weight can hold was merged")
    model.merge_adapter()
    case.close(model(x), y, 2.0)
    case.close(case.trained().merge_and_unload()(x), y, 2.0)


def unmerging_is_exact(case: Case) -> None:
    """A hundred times merged and unmerged, every bit is as before."""
    if not case.place.mergeable:
        raise Exempt("no weight of the layer holds the change")
    model = case.trained()
    before, y = _state(model), model(case.inputs())
    for _ in range(100 if case.site == "linear" else 3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(case.inputs()), y)


def saved_and_loaded_is_the_same(case: Case) -> None:
    """Through a file, every tensor and the output come back bit for bit; a second save writes the same tensors."""
    model = case.trained()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(case.base(), folder).eval()
        assert torch.equal(output(again, case.inputs()), output(model, case.inputs()))
        ours, theirs = model.state_dict(), again.state_dict()
        assert set(ours) == set(theirs)
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def only_the_adapter_trains(case: Case) -> None:
    """A training step moves every trained tensor that has a gradient and not one bit of the base."""
    model = case.fresh().train()
    move(model)
    before = _frozen(model)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(case.inputs()).float().square().sum().backward()
    for n, p in model.named_parameters():
        if n in trained:
            assert p.grad is not None and bool((p.grad != 0).any()), f"no gradient reached {n}"
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], v) for n, v in before.items())
    assert all(not torch.equal(after[n], v) for n, v in trained.items())


def several_adapters(case: Case) -> None:
    """A second adapter: switching, disabling and deleting give just the outputs of who acts; frozen stays frozen."""
    model = case.trained()
    x = case.inputs()
    first, base = output(model, x), output(case.base().eval(), x)
    model.add_adapter("other", case.targeted())
    assert torch.equal(output(model, x), first)
    model.set_adapter("other")
    move(model, seed=5)
    second = output(model, x)
    assert not torch.equal(second, first)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with model.disable_adapter():
        case.close(output(model, x), base)
    with model.using("default"):
        assert torch.equal(output(model, x), first)
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    model.set_adapter("default")
    assert torch.equal(output(model, x), first)
    model.delete_adapter("other")
    assert torch.equal(output(model, x), first)
    case.close(output(model.unload(), x), base)


def both_at_once_merge_as_they_run(case: Case) -> None:
    """Two active adapters: the merged model gives the unmerged one's output."""
    if not case.place.mergeable:
        raise Exempt("no weight of the layer holds the change")
    model = case.trained()
    model.add_adapter("other", case.targeted())
    model.base_model.set_adapter(["default", "other"])
    move(model, seed=5, size=0.05)
    y = model(case.inputs())
    model.merge_adapter()
    case.close(model(case.inputs()), y, 4.0)


def mixed_batch_equals_one_by_one(case: Case) -> None:
    """Rows with different adapters, and with none, give what each gives alone."""
    model = case.trained()
    model.add_adapter("other", case.targeted())
    model.set_adapter("other")
    move(model, seed=5)
    x = case.inputs()
    names = ["default", "other", "__base__", "other"]
    got = model(x, adapter_names=names)
    for i, name in enumerate(names):
        row = x[i : i + 1]
        if name == "__base__":
            with model.disable_adapter():
                expected = model(row)
        else:
            with model.using(name):
                expected = model(row)
        case.close(got[i : i + 1], expected)


def autocast_runs(case: Case) -> None:
    """Under bf16 autocast, forward and backward run and agree with the output without it."""
    if case.dtype != torch.float32:
        raise Exempt("autocast is for float32 models")
    model = case.trained()
    x = case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    torch.testing.assert_close(y.float(), model(x), atol=0.1 * float(model(x).detach().abs().max().clamp_min(1)), rtol=0)
    y.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def checkpointing_recomputes_the_same(case: Case) -> None:
    """Under gradient checkpointing of both kinds the gradients are those without; the adapter of the forward acts in the backward too."""
    from torch.utils.checkpoint import checkpoint

    def grads(kind: bool | None) -> list[Tensor]:
        model = case.trained()
        model.add_adapter("other", case.targeted())
        x = case.inputs()
        x = x.requires_grad_() if x.is_floating_point() else x
        root = model.get_base_model()
        anchor = torch.zeros((), requires_grad=True)
        with model.using("default"):
            y = root(x) if kind is None else checkpoint(lambda z, a: root(z), x, anchor, use_reentrant=kind)
        model.base_model.set_adapter("other")  # the choice has changed before the backward
        model.base_model.set_requires_grad("default", True)
        y.float().square().sum().backward()
        return [p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and ".default" in n]

    plain = grads(None)
    for kind in (False, True):
        again = grads(kind)
        assert len(again) == len(plain)
        for a, b in zip(again, plain, strict=True):
            case.close(a, b)


def compiles_whole(case: Case) -> None:
    """torch.compile traces the model without a break."""
    model = case.trained()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    case.close(compiled(case.inputs()), model(case.inputs()))
    torch._dynamo.reset()


def copies_are_independent(case: Case) -> None:
    """deepcopy and pickle give the same output, and a life of their own."""
    model = case.trained()
    y = model(case.inputs())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(case.inputs()), y)
        move(other, seed=6)
        other.disable_adapter_layers()
    assert torch.equal(model(case.inputs()), y)


def builds_on_meta(case: Case) -> None:
    """With low_cpu_mem_usage the adapter takes no memory until a file fills it."""
    model = get_peft_model(case.base(), case.targeted(), low_cpu_mem_usage=True)
    assert any(p.is_meta for p in model.parameters())
    reference_model = case.trained()
    with tempfile.TemporaryDirectory() as folder:
        reference_model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(case.base(), folder, low_cpu_mem_usage=True).eval()
    assert torch.equal(output(loaded, case.inputs()), output(reference_model, case.inputs()))


def config_survives_json(case: Case) -> None:
    """Through its file the config comes back equal."""
    config = case.targeted()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        again = PeftConfig.from_pretrained(folder)
    assert type(again) is type(config)
    assert _plain(again.to_dict()) == _plain(config.to_dict())


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in values.items()}


Law = Callable[[Case], None]
LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        identity_at_the_start, moves_the_output, output_is_that_of_the_changed_weight, fused_equals_reference, merged_equals_unmerged,
        unmerging_is_exact, saved_and_loaded_is_the_same, only_the_adapter_trains, several_adapters, both_at_once_merge_as_they_run,
        mixed_batch_equals_one_by_one, autocast_runs, checkpointing_recomputes_the_same, compiles_whole, copies_are_independent, builds_on_meta,
        config_survives_json,
    )
}  # fmt: skip


def sites_of(config: Method) -> list[str]:
    """The sites that the config's method claims."""
    return [n for n, s in SITES.items() if s.kind in config.kinds and set(s.fields) <= {f.name for f in dataclasses.fields(config)}]


def cases(
    configs: Iterable[Method], sites: Iterable[str] | None = None, dtypes: Iterable[torch.dtype] = (torch.float32,)
) -> Iterator[Case]:
    """Every config on every site it claims in every dtype."""
    wanted = set(sites) if sites is not None else None
    for config in configs:
        for site in sites_of(config):
            if wanted is None or site in wanted:
                for dtype in dtypes:
                    yield Case(config, site, dtype)


def check_method(
    config: Method,
    *,
    sites: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
    exceptions: dict[str, str] | None = None,
) -> list[str]:
    """Hold a method to every law on every site it claims; returns what was checked, as "law: case".

    Args:
        config: any config of the method; the kit targets its own small models.
        exceptions: law -> reason, for laws the method declares not to keep; one that holds after all is an error.

    Raises:
        AssertionError: for the first law that is broken, naming law and case.
    """
    declared = exceptions or {}
    done: list[str] = []
    for case in cases([config], sites, dtypes):
        for name, law in LAWS.items():
            try:
                law(case)
            except Exempt:
                continue
            except Exception as e:
                if name in declared:
                    continue
                raise AssertionError(f"{name} does not hold for {case}: {e}") from e
            if name in declared:
                raise AssertionError(f"{name} holds for {case}, and is declared not to: {declared[name]}")
            done.append(f"{name}: {case}")
    return done
