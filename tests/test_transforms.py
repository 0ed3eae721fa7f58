"""What users' own code does with an adapted layer: torch.func, backwards under autocast, no rows at all, shapes alone, a weight set to train."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap

import veneer
from veneer.kernels.autograd import written_out
from veneer.method import Method, load_methods
from veneer.testing import Case, Exempt, cases, examples
from veneer.testing.laws import move

METHODS = [m for m in load_methods().values() if issubclass(m, Method)]
CASES = [
    pytest.param(case, id=f"{i}-{case}") for m in METHODS for i, config in enumerate(examples(m)) for case in cases([config], ["linear"])
]
each = pytest.mark.parametrize("case", CASES)


def _trained(case: Case) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    try:
        refused = case.refused or ("it asks for more than a batch" if case.extra() else "")
    except Exempt as e:
        refused = str(e)
    if refused:
        pytest.skip(refused)
    model = case.trained()
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not leaves:
        pytest.skip("nothing of it trains")
    return model, leaves


def _close(got: Tensor, expected: Tensor, loose: float = 1e-4) -> None:
    torch.testing.assert_close(got, expected, atol=loose * float(expected.detach().abs().max().clamp_min(1e-3)), rtol=0)


@each
def test_torch_func_gives_the_gradients_of_autograd(case: Case) -> None:
    model, leaves = _trained(case)

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, values, (x,)).square().sum()
        return out

    x = case.inputs()
    expected = torch.autograd.grad(loss(leaves, x), list(leaves.values()), allow_unused=True)
    for got, want in zip(grad(loss)(leaves, x).values(), expected, strict=True):
        _close(got, torch.zeros_like(got) if want is None else want)


@each
def test_many_versions_of_an_adapter_run_at_once(case: Case) -> None:
    model, leaves = _trained(case)
    x, versions = case.inputs(), [leaves, {n: p + 0.05 for n, p in leaves.items()}]
    stacked = {n: torch.stack([v[n].detach() for v in versions]) for n in leaves}
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            got = vmap(lambda values: functional_call(model, values, (x,)))(stacked)
            for y, values in zip(got, versions, strict=True):
                _close(y, functional_call(model, values, (x,)))


@each
def test_forward_mode_gives_the_derivatives_of_reverse_mode(case: Case) -> None:
    model, _ = _trained(case)
    if case.mixes:
        pytest.skip("what chooses the mixture holds back gradients, which torch does in reverse mode alone")
    x = case.inputs()
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    _, expected = torch.autograd.functional.jvp(lambda z: case.run(model, z), x, along)  # by two backwards
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted), forward_ad.dual_level():
            got = forward_ad.unpack_dual(case.run(model, forward_ad.make_dual(x, along))).tangent
            _close(got, expected)


@each
def test_a_backward_under_autocast_is_that_of_its_forward(case: Case) -> None:
    model, leaves = _trained(case)
    plain = torch.autograd.grad(case.run(model).square().sum(), list(leaves.values()), allow_unused=True)
    loss = case.run(model).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for a, b in zip(got, plain, strict=True):
        if a is not None and b is not None:
            _close(a, b, 5e-2)  # what is not a function of ours is computed in 16 bits


@each
def test_no_rows_give_no_rows(case: Case) -> None:
    model, leaves = _trained(case)
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            y = case.run(model, case.inputs()[:0].requires_grad_())
        assert y.shape == (0, 5, 8)
    model.train()
    grads = torch.autograd.grad(case.run(model, case.inputs()[:0]).sum(), list(leaves.values()), allow_unused=True)
    assert all(b.isfinite().all() for b in model.buffers())
    assert all(g is None or not g.any() for g in grads)


@each
def test_shapes_alone_can_be_asked_for(case: Case) -> None:
    model, _ = _trained(case)
    model.to("meta")
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            y = case.run(model, case.inputs().to("meta"))
        assert y.is_meta
        assert y.shape == (4, 5, 8)


@each
def test_a_base_weight_that_is_set_to_train_trains(case: Case) -> None:
    """Whether a fused function is taken or not."""
    model, _ = _trained(case)
    if case.mixes:
        pytest.skip("what chooses the mixture sees the weight too, without gradients")
    w = next(p for n, p in model.named_parameters() if n.endswith("site.base_layer.weight"))
    w.requires_grad_()
    x = case.inputs()

    def loss() -> Tensor:
        return case.run(model, x).double().square().sum()

    (got,) = torch.autograd.grad(loss(), w)
    generator = torch.Generator().manual_seed(0)
    step = 1e-3 * torch.randn(w.shape, generator=generator)
    with torch.no_grad():
        w.add_(step)
        more = loss()
        w.sub_(2 * step)
        less = loss()
    torch.testing.assert_close((got * step).sum().double(), (more - less) / 2, rtol=3e-2, atol=1e-3)


class _Overwriting(torch.nn.Module):
    """What follows the layer writes into its output."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.site = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.site(x)
        y += 1
        return y.relu_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each
def test_what_follows_may_write_into_the_output(case: Case, dtype: torch.dtype) -> None:
    case = Case(case.config, case.site, dtype)
    model, leaves = _trained(case)
    if case.mixes:
        pytest.skip("the layer is not run on its own")
    outer = model.get_base_model()
    for x in (case.inputs(), case.inputs().flatten(0, 1)):
        x.requires_grad_()
        got = torch.autograd.grad(_Overwriting(outer.site)(x).float().square().sum(), [x, *leaves.values()], allow_unused=True)
        want = torch.autograd.grad((outer.site(x) + 1).relu().float().square().sum(), [x, *leaves.values()], allow_unused=True)
        for a, b in zip(got, want, strict=True):
            if a is not None and b is not None:
                _close(a, b, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("square", [False, True])
@each
def test_gradients_have_gradients(case: Case, square: bool) -> None:
    """As a gradient penalty wants them, or a step of meta-learning; also of a loss that is linear in the output."""
    case = Case(case.config, case.site, torch.float64)
    model, leaves = _trained(case)
    if case.mixes:
        pytest.skip("what chooses the mixture sees the weight too, without gradients")
    if getattr(case.config, "use_dora", False):
        pytest.skip("its norms are constants to gradients")
    x, generator = case.inputs().requires_grad_(), torch.Generator().manual_seed(0)
    values = [x, *leaves.values()]
    weights = torch.randn(case.run(model, x).shape, dtype=x.dtype, generator=generator)

    def penalty() -> Tensor:
        y = case.run(model, x)
        loss = (y * weights).sum() + (y.square().sum() if square else 0)
        grads = torch.autograd.grad(loss, values, create_graph=True, allow_unused=True)
        return torch.stack([g.square().sum() for g in grads if g is not None]).sum()

    if getattr(case.config, "velora_config", None) is not None:
        model.train()
        with pytest.raises(RuntimeError, match="VeLoRA"):
            penalty()
        return
    got = torch.autograd.grad(penalty(), values, allow_unused=True)
    steps = [1e-4 * torch.randn(v.shape, dtype=v.dtype, generator=generator) for v in values]
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for v, step in zip(values, steps, strict=True):
                v.add_(sign * step)
        sides.append(penalty().detach())
        with torch.no_grad():
            for v, step in zip(values, steps, strict=True):
                v.sub_(sign * step)
    expected = (sides[0] - sides[1]) / 2
    total = torch.stack([(g * step).sum() for g, step in zip(got, steps, strict=True) if g is not None]).sum()
    torch.testing.assert_close(total, expected, rtol=5e-3, atol=1e-7 * float(sides[0].abs()))  # some tensors are float32 all the same


class _Twice(torch.nn.Module):
    """A layer that runs on its own output, as ALBERT's do."""

    def __init__(self) -> None:
        super().__init__()
        self.site = torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.site(torch.tanh(self.site(x)))


@pytest.mark.parametrize(
    "config",
    [
        veneer.LoraConfig(r=2),
        veneer.IA3Config(feedforward_modules=[]),
        veneer.LoHaConfig(r=2),
        veneer.ShiraConfig(r=2),
        veneer.RoadConfig(group_size=8),
    ],
    ids=lambda c: type(c).__name__,
)
def test_a_graph_of_gradients_has_the_same_gradients_where_a_layer_runs_on_its_own_output(config: Any) -> None:
    torch.manual_seed(0)
    config = copy.copy(config)
    config.target_modules = ["site"]
    model = veneer.get_peft_model(_Twice(), config)
    move(model)
    x = torch.randn(5, 8, requires_grad=True)
    values = [x, *(p for p in model.parameters() if p.requires_grad)]
    loss = model(x).square().sum()
    want = torch.autograd.grad(loss, values, retain_graph=True)
    got = torch.autograd.grad(loss, values, create_graph=True)
    for a, b in zip(got, want, strict=True):
        _close(a.detach(), b, 1e-5)


def test_a_tensor_in_two_places_of_a_function_gets_the_gradient_of_each() -> None:
    def again(ctx: Any, _: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        a, b = ctx.saved_tensors
        return a * b, (a, b)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        @written_out(again)
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
            a, b = ctx.saved_tensors
            return g * b, g * a

    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (g,) = torch.autograd.grad(Product.apply(x, x).sum(), x, create_graph=True)  # type: ignore[no-untyped-call]
    assert torch.equal(g, 2 * x)
    assert torch.equal(torch.autograd.grad(g.sum(), x)[0], torch.full((3,), 2.0))


WRITTEN = [
    *[veneer.LoraConfig(r=2), veneer.LoraConfig(r=12), veneer.LoraConfig(r=2, use_dora=True)],
    *[veneer.IA3Config(feedforward_modules=["second"]), veneer.OFTConfig(oft_block_size=4), veneer.LoHaConfig(r=2), veneer.HRAConfig(r=2)],
    *[veneer.RoadConfig(group_size=4), veneer.RandLoraConfig(r=2), veneer.VeraConfig(r=4), veneer.ShiraConfig(r=2), veneer.LoKrConfig(r=2)],
    *[veneer.LilyConfig(r=2), veneer.LNTuningConfig()],
]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes of frozen tensors become numbers
@pytest.mark.parametrize("config", WRITTEN, ids=lambda c: type(c).__name__)
def test_graphs_for_elsewhere_hold_for_any_number_of_rows(config: Any) -> None:
    """torch.export with dynamic shapes, and torch.jit.trace into a file: of torch's own operators alone, and not of the example's size."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(OrderedDict(first=torch.nn.Linear(16, 24), act=torch.nn.ReLU(), second=torch.nn.Linear(24, 16)))
    model = veneer.get_peft_model(base, dataclasses.replace(config, target_modules=["first", "second"]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    model.eval()
    x, other = torch.randn(3, 5, 16), torch.randn(7, 40, 16)
    expected = model(other).detach()
    sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    for strict in (
        (False,) if isinstance(config, veneer.VeraConfig) else (False, True)
    ):  # strict: of tensors that layers share torch says KeyError
        written = torch.export.export(model.get_base_model(), (x,), dynamic_shapes=(sizes,), strict=strict)
        torch.testing.assert_close(written.module()(other), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x, check_trace=False), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(other), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
    torch.testing.assert_close(model(other), expected)
