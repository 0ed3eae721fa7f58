"""The laws, each a function of one case. They need torch and veneer alone; a test runner is not asked for."""

from __future__ import annotations

import copy
import pickle
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.base import flat
from ..change import Change
from ..config import PeftConfig
from ..engine.layer import AdaptedLayer, adapted_layers
from ..engine.substitute import call_with
from ..errors import MergeError, PeftWarning, hint
from ..kernels import reference
from ..method import Method
from ..model import PeftModel
from ..ops import Op
from ..sites import Site
from .case import Case, Exempt, cases, examples, move, sites_of

__all__ = ["LAWS", "Case", "Exempt", "cases", "check_method", "examples", "hold", "move", "sites_of"]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: _bits(t) for k, v in model.state_dict().items() for name, t in flat(k, v)}


def _bits(t: Tensor) -> Tensor:
    """A copy of a tensor's bytes: as numbers, packed ones may be NaN, which equals nothing."""
    return t.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _frozen(model: PeftModel) -> dict[str, Tensor]:
    """Every number that does not train, as it is stored."""
    out = {name: t for n, p in model.named_parameters() if not p.requires_grad for name, t in flat(n, p)}
    for path, layer in adapted_layers(model):
        if not layer.site.codec.plain:
            out |= {f"{path}.{n}": t for n, t in layer.site.codec.packed(layer.frozen).items()}
    return {n: _bits(t) for n, t in out.items()}


# -------------------------------------------------------------------- the laws


def identity_at_the_start(case: Case) -> None:
    """A fresh adapter changes nothing, where the method says so."""
    if not getattr(case.config, "starts_as_identity", True) or getattr(case.config, "init_lora_weights", True) is False:
        raise Exempt("the method does not claim it")
    case.close(case.run(case.fresh().eval()), case.run(case.base().eval()))


def moves_the_output(case: Case) -> None:
    """A trained adapter changes something: no law below holds for want of an effect."""
    assert not torch.equal(case.run(case.trained()), case.run(case.base().eval())), (
        "the output with the trained adapter is the base model's"
    )


def output_is_that_of_the_changed_weight(case: Case) -> None:
    """The layer computes what the bare module computes with W' and b' in place of W and b, with the same gradients."""
    _mergeable(case)
    model = case.trained()
    root = model.get_base_model()
    leaves = [p for p in model.parameters() if p.requires_grad]

    def run() -> list[Tensor]:
        x = case.inputs()
        x = x.requires_grad_() if x.is_floating_point() else x
        y = case.run(model, x)
        wanted = [*leaves, x] if x.is_floating_point() else leaves
        grads = torch.autograd.grad(y.float().square().sum(), wanted, allow_unused=True)
        return [y, *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True))]

    got = run()
    path, layer = next(iter(adapted_layers(root)))
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, name, _Bare(layer))
    expected = run()
    for a, b in zip(got, expected if case.place.passes else expected[:1], strict=False):
        case.close(a, b, 2.0)


def _mergeable(case: Case) -> None:
    if not case.place.mergeable or case.config.unmergeable:
        raise Exempt(case.config.unmergeable or "no weight of the layer holds the change")


def _fits(case: Case) -> bool:
    """Whether the layer has what the change is merged into: a weight that sees all inputs, and a bias for one that is shifted."""
    layers = [layer for _, layer in adapted_layers(case.trained())]
    return case.place.mergeable and all(set(layer.effective(["default"])) <= set(layer.frozen_tensors()) for layer in layers)


class _Bare(nn.Module):
    """The module inside an adapted layer, run with its changed tensors, formed whole."""

    def __init__(self, layer: AdaptedLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if layer.quantised:
            tensors = layer.effective(["default"])
            site = layer.weight_site
            return site.dense(layer.base_layer, tensors[site.weight_name], tensors.get(site.bias_name))(*args, **kwargs)
        tensors = layer.effective(["default"])
        if layer.site.kind == "attention":
            inner: Any = layer.base_layer.out_proj
            tensors |= {f"out_proj.base_layer.{k}": v for k, v in inner.effective(["default"]).items()}
        return call_with(layer.base_layer, tensors, args, kwargs)


def fused_equals_reference(case: Case) -> None:
    """The fused path gives the readable one's output and every gradient."""
    from ..sites import linear

    def run(fused: bool) -> list[Tensor]:
        model = case.trained()
        x = case.inputs()
        x = x.requires_grad_() if x.is_floating_point() else x
        originals = {name: vars(linear)[name] for name in ("lowrank_linear", "derived_linear")}
        if not fused:
            vars(linear).update({name: vars(reference)[name] for name in originals})
        try:
            y = case.run(model, x)
            leaves = [p for p in model.parameters() if p.requires_grad] + ([x] if x.requires_grad else [])
            return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]
        finally:
            vars(linear).update(originals)

    for got, expected in zip(run(True), run(False), strict=True):
        case.close(got, expected, 2.0)


def merged_equals_unmerged(case: Case) -> None:
    """Merging keeps the output; a change that the layer cannot hold is refused, and nothing has changed then."""
    model = case.trained()
    y, before = case.run(model), _state(model)
    try:
        model.merge_adapter()
    except MergeError:
        assert all(torch.equal(v, before[k]) for k, v in _state(model).items())
        if not case.config.unmergeable and _fits(case):
            raise
        return
    assert not case.config.unmergeable, "a change that depends on the input was merged"
    case.close(case.run(model), y, 2.0)
    case.close(case.run(case.trained().merge_and_unload()), y, 2.0)


def unmerging_is_exact(case: Case) -> None:
    """A hundred times merged and unmerged, every bit is as before."""
    _fitting(case)
    model = case.trained()
    before, y = _state(model), case.run(model)
    for _ in range(100 if case.site == "linear" else 3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in _state(model).items())
    assert torch.equal(case.run(model), y)


def _fitting(case: Case) -> None:
    _mergeable(case)
    if not _fits(case):
        raise Exempt("the layer has no bias to merge into")


def saved_and_loaded_is_the_same(case: Case) -> None:
    """Through a file, every tensor and the output come back bit for bit; a second save writes the same tensors."""
    model = case.trained()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        base = case.base()
        torch.manual_seed(7)  # what no file holds has to come out the same from any state of the generator
        again = PeftModel.from_pretrained(base, folder).eval()
        ours, theirs = _state(model), _state(again)
        assert set(ours) == set(theirs), f"of these tensors only one model has each: {sorted(set(ours) ^ set(theirs))}"
        other = [k for k, v in ours.items() if not torch.equal(v, theirs[k])]
        assert not other, f"{other} have other values after loading"
        unsaved = (
            "the output is another after loading: what no file holds (`saved=False`) has to come out the same again, such as from a seed"
        )
        assert torch.equal(case.output(again), case.output(model)), unsaved


def only_the_adapter_trains(case: Case) -> None:
    """A training step moves every trained tensor that has a gradient and not one bit of the base."""
    model = case.fresh().train()
    move(model)
    before = _frozen(model)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    case.run(model).float().square().sum().backward()
    for n, p in model.named_parameters():
        if n in trained:
            assert p.grad is not None and bool((p.grad != 0).any()), f"no gradient reached {n}"
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(v, before[n]) for n, v in _frozen(model).items())
    assert all(not torch.equal(after[n], v) for n, v in trained.items())


def several_adapters(case: Case) -> None:
    """A second adapter: switching, disabling and deleting give just the outputs of who acts; frozen stays frozen."""
    model = case.trained()
    first, base = case.output(model), case.output(case.base().eval())
    model.add_adapter("other", case.targeted())
    assert torch.equal(case.output(model), first)
    model.set_adapter("other")
    move(model, seed=5)
    second = case.output(model)
    assert not torch.equal(second, first)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with model.disable_adapter():
        case.close(case.output(model), base)
    with model.using("default"):
        assert torch.equal(case.output(model), first)
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    model.set_adapter("default")
    assert torch.equal(case.output(model), first)
    model.delete_adapter("other")
    assert torch.equal(case.output(model), first)
    case.close(case.output(model.unload()), base)


def threads_choose_for_themselves(case: Case) -> None:
    """Two threads inside `using` at the same time, each with another adapter, get what their own gives alone."""
    if case.dtype.itemsize < 4:
        raise Exempt("numbers of any width are chosen alike")
    model = case.trained()
    model.add_adapter("other", case.targeted())
    model.set_adapter("other")
    move(model, seed=5)
    names, x = ("default", "other"), case.inputs()

    def run(name: str, both: Callable[[], Any] = lambda: None) -> Tensor:
        with model.using(name):
            both()
            y = case.output(model, x)
            both()
        return y

    alone = [run(name) for name in names]
    barrier = threading.Barrier(len(names), timeout=60)
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: run(name, barrier.wait), names))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def both_at_once_merge_as_they_run(case: Case) -> None:
    """Two active adapters: the merged model gives the unmerged one's output."""
    _fitting(case)
    model = case.trained()
    model.add_adapter("other", case.targeted())
    model.base_model.set_adapter(["default", "other"])
    move(model, seed=5, size=0.05)
    y = case.run(model)
    model.merge_adapter()
    case.close(case.run(model), y, 4.0)


def mixed_batch_equals_one_by_one(case: Case) -> None:
    """Rows with different adapters, and with none, give what each gives alone."""
    model = case.trained()
    model.add_adapter("other", case.targeted())
    model.set_adapter("other")
    move(model, seed=5)
    x = case.inputs()
    names = ["default", "other", "__base__", "other"]
    got = model(x, adapter_names=names, **case.extra())
    for i, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else model.using(name):
            expected = model(x[i : i + 1], **case.extra(i))
        case.close(got[i : i + 1], expected)


def autocast_runs(case: Case) -> None:
    """Under bf16 autocast, forward and backward run and agree with the output without it."""
    if case.dtype != torch.float32:
        raise Exempt("autocast is for float32 models")
    model = case.trained()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run(model)
    plain = case.run(model)
    torch.testing.assert_close(y.float(), plain, atol=0.1 * float(plain.detach().abs().max().clamp_min(1)), rtol=0)
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
        anchor = torch.zeros((), requires_grad=True)
        with model.using("default"):
            y = case.run(model, x) if kind is None else checkpoint(lambda z, a: case.run(model, z), x, anchor, use_reentrant=kind)
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
    """torch.compile traces the model without a break; where the method has to know of the call, the user's model inside."""
    model = case.trained()
    y = case.run(model)
    (model.get_base_model() if case.config.routes else model).compile(backend="aot_eager", fullgraph=True)
    try:
        with warnings.catch_warnings():
            # torch's own, where what is known of a call has a graph
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            case.close(case.run(model), y)
    finally:
        torch._dynamo.reset()


def copies_are_independent(case: Case) -> None:
    """deepcopy and pickle give the same output, and a life of their own."""
    model = case.trained()
    y = case.run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.run(other), y)
        move(other, seed=6)
        other.disable_adapter_layers()
    assert torch.equal(case.run(model), y)


def builds_on_meta(case: Case) -> None:
    """With low_cpu_mem_usage the adapter takes no memory until a file fills it."""
    model = case.fresh(low_cpu_mem_usage=True)
    assert any(p.is_meta for p in model.parameters())
    reference_model = case.trained()
    with tempfile.TemporaryDirectory() as folder:
        reference_model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(case.base(), folder, low_cpu_mem_usage=True).eval()
    assert torch.equal(case.output(loaded), case.output(reference_model))


def config_survives_json(case: Case) -> None:
    """Through its file the config comes back equal."""
    config = case.targeted()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        again = PeftConfig.from_pretrained(folder)
    assert type(again) is type(config), f"its file is read as {type(again).__name__}: a class of its own needs a peft_type of its own"
    ours, theirs = _plain(config.to_dict()), _plain(again.to_dict())
    assert ours == theirs, f"other values come back: { {k: theirs.get(k) for k, v in ours.items() if theirs.get(k) != v} } of {ours}"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in values.items()}


Law = Callable[[Case], None]
LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        identity_at_the_start, moves_the_output, only_the_adapter_trains, output_is_that_of_the_changed_weight, fused_equals_reference,
        merged_equals_unmerged, unmerging_is_exact, saved_and_loaded_is_the_same, several_adapters, threads_choose_for_themselves,
        both_at_once_merge_as_they_run, mixed_batch_equals_one_by_one, autocast_runs, checkpointing_recomputes_the_same, compiles_whole,
        copies_are_independent, builds_on_meta, config_survives_json,
    )
}  # fmt: skip


def hold(law: str, case: Case) -> bool:
    """Hold a case to a law, or, where its method declares not to keep it, see that it does not.

    Returns:
        Whether the law was kept; False for one that is declared not to be.

    Raises:
        Exempt: if the law does not speak of the case, or the method refuses the site with these options.
        AssertionError: if the law is broken, or is kept although it is declared not to be.
    """
    declared = case.config.exceptions.get(law)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The dropout of the adapter", PeftWarning)  # a law speaks of what acts
            if case.refused:
                raise Exempt(case.refused)
            LAWS[law](case)
    except Exempt:
        raise
    except Exception as e:
        if declared:
            return False
        said = " ".join((LAWS[law].__doc__ or "").split())
        raise AssertionError(f"{law} does not hold for {case}: {_why(case)}{e or type(e).__name__}\nThe law: {said}") from e
    if (
        declared and case.dtype.itemsize >= 4 and case.place.loose == 1
    ):  # what a law forbids may be too small for 16 bits, or rounded inputs, to show
        raise AssertionError(f"{law} holds for {case}, and is declared not to: {declared}")
    return True


def _why(case: Case) -> str:
    """What is wrong with the parts of the change, as far as their forms tell."""
    name = type(case.config).__name__
    try:
        for path, layer in adapted_layers(case.trained()):
            a = layer.attached.get("default")
            if a is None or not isinstance(layer.site, Site) or layer.site.experts or case.config.routes:
                continue
            try:
                change, w = layer.change("default", at_rest=True), layer.frozen_weight()
            except AttributeError as e:
                asked = str(e)
                return (
                    ""
                    if not asked.isidentifier()
                    else f"{name}.change asks for {asked!r}, and its leaves are {', '.join(a.leaves)}.{hint(asked, a.leaves)} "
                )
            if not isinstance(change, Change):
                return f"{name}.change gives a {type(change).__name__}, not a veneer.Change. "
            n_out, n_in = w.shape
            sides = {"left": (n_out, n_out), "right": (n_in * layer.site.groups,) * 2, "add": (n_out, n_in)}
            for part, wanted in sides.items():
                op = getattr(change, part)
                if op is None:
                    continue
                if not isinstance(op, Op):
                    return f"{name}.change gives a {type(op).__name__} as `{part}`, not one of veneer.ops. "
                if not op.fixed and not case.config.unmergeable:
                    return f"{name}'s `{part}` depends on the input, so no weight holds it: the class has to say why in `unmergeable`. "
                found = tuple(op.dense().shape) if op.fixed else wanted
                if found != wanted and case.place.mergeable:
                    return f"{name}'s `{part}` is {found} at {path!r}, where it has to be {wanted}. "
    except Exception:
        return ""  # what went wrong is said anyway
    return ""


def check_method(
    config: Method | type[Method], *, sites: Iterable[str] | None = None, dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16)
) -> list[str]:
    """Hold a method to every law on every site it claims; returns what was checked, as "law: case".

    Laws that the method declares not to keep (`Method.exceptions`) have to fail in full precision.

    Args:
        config: any config of the method, or the method itself, with its `examples`; the kit targets its own small models.

    Raises:
        AssertionError: for the first law that is broken, naming law and case.
    """
    given = examples(config) if isinstance(config, type) else [config]
    for law in {law for c in given for law in c.exceptions if law not in LAWS}:
        raise AssertionError(f"`exceptions` names {law!r}, which is no law. The laws are {', '.join(LAWS)}.{hint(law, LAWS)}")
    done: list[str] = []
    for case in cases(given, sites, dtypes):
        for law in LAWS:
            try:
                if hold(law, case):
                    done.append(f"{law}: {case}")
            except Exempt:
                continue
    if not done:
        why = next((f" {case}: {case.refused}" for case in cases(given, sites, dtypes) if case.refused), "")
        raise AssertionError(f"{config} was refused by every site it claims, so nothing was checked.{why}")
    return done
