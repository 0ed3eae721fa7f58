"""Products of 16-bit numbers on a processor that has none of its own: taken in 32 bits, and nothing else is changed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
from veneer.kernels import products
from veneer.testing.laws import move
from veneer.training.loss import summed_cross_entropy

from .test_budgets import FORMS, _kept

LOW = (torch.float16, torch.bfloat16)
MANY = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default}


class Products(TorchDispatchMode):
    """Which dtypes matrices are multiplied in, and the largest matrix that is made of a 16-bit one by widening it."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []
        self.sizes: list[tuple[int, ...]] = []
        self.widened = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in MANY:
            self.dtypes.append(args[-1].dtype)
            self.sizes.append((*args[-2].shape, args[-1].shape[1]))
        if func is torch.ops.aten._to_copy.default and args[0].dtype in LOW and out.dtype == torch.float32:
            self.widened = max(self.widened, out.numel())
        return out


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor without 16-bit products, on which all products count as large, and a block of a weight is small."""
    monkeypatch.setattr(products, "_MISSING", frozenset(LOW))
    monkeypatch.setattr(products, "_THICK", 1)
    monkeypatch.setattr(products, "_WORTH", 0)
    monkeypatch.setattr(products, "_BLOCK", 500)
    yield


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(40, 24), (3, 16, 24)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.usefixtures("slow")
def test_the_product_and_its_gradients_are_rounded_once(dtype: torch.dtype, shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(shape, dtype=dtype).requires_grad_(), torch.randn(70, 24, dtype=dtype).requires_grad_()
    b = torch.randn(70, dtype=dtype).requires_grad_() if biased else None
    inputs = [t for t in (x, w, b) if t is not None]
    with Products() as counted:
        y = products.linear(x, w, b)
        grad = torch.randn_like(y)
        got = torch.autograd.grad(y, inputs, grad)
    assert counted.dtypes and set(counted.dtypes) == {torch.float32}
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = F.linear(*exact)
    for a, e in zip((y, *got), (want, *torch.autograd.grad(want, exact, grad.double())), strict=True):
        assert a.dtype == dtype
        assert float((a.detach().double() - e.detach()).norm()) < float(e.detach().norm()) * torch.finfo(dtype).eps / 2
        torch.testing.assert_close(a, e.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.usefixtures("slow")
def test_derivatives_of_its_gradients() -> None:
    torch.manual_seed(0)
    x, w = (torch.randn(n, 8).bfloat16().requires_grad_() for n in (6, 5))
    found = []
    for product in (products.linear, F.linear):
        (dx,) = torch.autograd.grad(product(x, w).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (x, w)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))


@pytest.mark.usefixtures("slow")
def test_gradients_through_a_frozen_weight_have_gradients() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(6, 8).bfloat16().requires_grad_(), torch.randn(5, 8).bfloat16()
    found = []
    for product in (products.linear, F.linear):
        (dx,) = torch.autograd.grad(product(x, w).float().square().sum(), x, create_graph=True)
        found.append((dx, *torch.autograd.grad(dx.float().square().sum(), x)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.detach().abs().max()))


@pytest.mark.usefixtures("slow")
def test_a_weight_is_widened_some_columns_at_a_time() -> None:
    x, w = torch.randn(16, 24, dtype=torch.bfloat16), torch.randn(400, 24, dtype=torch.bfloat16)
    with Products() as counted, torch.no_grad():
        products.linear(x, w)
    assert len(counted.dtypes) == 20 and counted.widened <= 500


def _step(form: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], int, Products]:
    """Output, gradients, bytes kept, and the products of a step through one adapted layer."""
    torch.manual_seed(0)
    config = FORMS[form]()
    config.target_modules = {"0"}
    model = veneer.get_peft_model(nn.Sequential(nn.Linear(64, 96, bias=False)).to(dtype), config)
    move(model, size=0.05)
    x = torch.randn(2, 40, 64).to(dtype).requires_grad_()
    torch.manual_seed(1)
    with Products() as counted:
        y, kept = _kept(model, x)
        y.backward(torch.randn(y.shape).to(dtype))
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), grads | {"x": x.grad} if x.grad is not None else grads, kept, counted


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", LOW)
def test_every_form_computes_and_keeps_the_same(form: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    there, grads, kept, _ = _step(form, dtype)
    request.getfixturevalue("slow")
    here, same, as_much, counted = _step(form, dtype)
    assert as_much <= kept
    assert all(t == torch.float32 for t in counted.dtypes)
    whole = sum(m * k * n for m, k, n in counted.sizes)
    assert whole >= 2 * 80 * 64 * 96  # the frozen product and its gradient, in as many parts as it may be
    off = 16 * torch.finfo(dtype).eps  # a few roundings, in another order
    assert here.dtype == dtype and float((here - there).norm()) <= off * float(there.norm())
    assert same.keys() == grads.keys()
    for name, g in grads.items():
        assert float((same[name].float() - g.float()).norm()) <= off * float(g.float().norm()), name


@pytest.mark.usefixtures("slow")
def test_under_autocast_too() -> None:
    model = veneer.get_peft_model(nn.Sequential(nn.Linear(64, 96)), veneer.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(40, 64)
    with Products() as counted, torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert set(counted.dtypes) == {torch.float32}
    torch.testing.assert_close(y.float(), model(x), rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("slow")
def test_rows_with_adapters_of_their_own_and_the_loss_over_a_vocabulary() -> None:
    torch.manual_seed(0)
    model = veneer.get_peft_model(
        nn.Sequential(nn.Linear(64, 96)).bfloat16(), veneer.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), "a"
    )
    model.add_adapter("b", veneer.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 40, 64, dtype=torch.bfloat16)
    together = model(x, adapter_names=["a", "b", "__base__"])
    for row, name in enumerate(["a", "b"]):
        model.set_adapter(name)
        torch.testing.assert_close(together[row], model(x[row]), rtol=0.02, atol=0.02)
    h, w, labels = torch.randn(30, 64, dtype=torch.bfloat16).requires_grad_(), torch.randn(50, 64, dtype=torch.bfloat16), torch.arange(30)
    with Products() as counted:
        (got,) = torch.autograd.grad(summed_cross_entropy(h, w, None, labels), h)
    assert set(counted.dtypes) == {torch.float32}
    (want,) = torch.autograd.grad(F.cross_entropy(h.float() @ w.float().T, labels, reduction="sum"), h)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def _answers(code: str, **environment: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | environment)
    return run.stdout.strip()


def test_what_the_library_of_products_may_not_use_is_missing() -> None:
    code = """
import torch
from veneer.kernels.products import slow
print(*(slow(torch.zeros(1, dtype=d)) for d in (torch.bfloat16, torch.float16, torch.float32)))
"""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    assert _answers(code, ONEDNN_MAX_CPU_ISA="AVX512_CORE") == f"{x86} {x86} False"


@pytest.mark.parametrize("method", ["linear", "mm"])
@pytest.mark.usefixtures("slow")
def test_wider_numbers_are_multiplied_as_ever(method: str) -> None:
    product: Callable[[Tensor, Tensor], Tensor] = getattr(products, method)
    for dtype in (torch.float32, torch.float64):
        a = torch.randn(6, 6, dtype=dtype)
        assert torch.equal(product(a, a), a @ (a.T if method == "linear" else a))
