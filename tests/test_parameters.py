"""A parameter under an adapter is whatever its module makes of it: what stands for W + U V answers as the sum itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import veneer
from veneer.testing.laws import move

Use = Callable[[Any, Tensor], Tensor]
X = (3, 6)


class Holder(nn.Module):
    def __init__(self, use: Use, *shape: int) -> None:
        super().__init__()
        self.w, self.use = nn.Parameter(torch.randn(shape) / 3), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.w, x)


TWO: dict[str, Use] = {
    "linear": lambda w, x: F.linear(x, w),
    "linear with a bias": lambda w, x: F.linear(x, w, torch.ones(5)),
    "linear by names": lambda w, x: F.linear(input=x, weight=w, bias=torch.ones(5)),
    "weight by name": lambda w, x: F.linear(x, weight=w),
    "x @ w.T": lambda w, x: x @ w.T,
    "mm": lambda w, x: x.mm(w.t()),
    "matmul by names": lambda w, x: torch.matmul(input=x, other=w.mT),
    "w @ x": lambda w, x: (w @ x.T).T,
    "transposed by names": lambda w, x: x @ w.transpose(dim0=0, dim1=1),
    "permuted by names": lambda w, x: x @ w.permute(dims=(1, 0)),
    "einsum": lambda w, x: torch.einsum("bi,oi->bo", x, w),
    "addmm": lambda w, x: torch.addmm(torch.ones(5), x, w.t()),
    "rows": lambda w, x: F.linear(x, w[1:3]),
    "chunks": lambda w, x: torch.cat([F.linear(x, part) for part in w.chunk(2, 0)], -1),
    "normalised": lambda w, x: F.linear(x, F.normalize(w, dim=1)),
    "in 64 bits": lambda w, x: F.linear(x.double(), w.to(torch.float64)).float(),
    "w * 2": lambda w, x: F.linear(x, w * 2.0),
    "2 * w": lambda w, x: F.linear(x, 2 * w),
    "w + 1": lambda w, x: F.linear(x, w + 1),
    "1 - w": lambda w, x: F.linear(x, 1 - w),
    "w / 3": lambda w, x: F.linear(x, w / 3),
    "w ** 2": lambda w, x: F.linear(x, w**2),
    "-w": lambda w, x: F.linear(x, -w),
    "abs": lambda w, x: F.linear(x, abs(w)),
    "w > 0": lambda w, x: F.linear(x, torch.where(w > 0, w, 0)),
    "w != 0": lambda w, x: F.linear(x, w * (w != 0)),
    "w times a tensor": lambda w, x: F.linear(x, w * torch.arange(5.0).unsqueeze(1)),
}
THREE: dict[str, Use] = {
    "bmm": lambda w, x: torch.bmm(x.expand(4, -1, -1), w.transpose(1, 2)),
    "one": lambda w, x: torch.stack([F.linear(x, w[i]) for i in range(4)]),
    "each": lambda w, x: torch.stack([x @ part.T for part in w]),
    "chosen": lambda w, x: torch.bmm(x.unsqueeze(1), w[torch.tensor([0, 3, 3])].mT),
    "some": lambda w, x: torch.stack([F.linear(x, part) for part in w[torch.tensor([True, False, True, False])]]),
    "flat": lambda w, x: F.linear(x, w.flatten(0, 1)),
    "scaled": lambda w, x: x @ (0.5 * w).mT,
}


@pytest.mark.parametrize(
    ("use", "shape"),
    [
        *[pytest.param(u, (5, 6), id=k) for k, u in TWO.items()],
        *[pytest.param(u, (4, 5, 6), id=f"experts, {k}") for k, u in THREE.items()],
    ],
)
def test_whatever_a_module_does_with_its_parameter(use: Use, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    config = veneer.LoraConfig(r=2, target_modules=[], target_parameters=["0.w"])
    model = veneer.get_peft_model(nn.Sequential(Holder(use, *shape)), config).eval()
    x = torch.randn(X)
    base = model(x)
    move(model, size=0.5)
    y = model(x)
    assert not torch.allclose(y, base)
    leaves = [p for p in model.parameters() if p.requires_grad]
    assert all(g.any() for g in torch.autograd.grad(y.square().sum(), leaves))
    model.merge_adapter()
    torch.testing.assert_close(y, model(x), atol=1e-4, rtol=1e-4)


def test_each_expert_starts_as_a_matrix_of_its_own() -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(Holder(THREE["one"], 4, 5, 6)), torch.randn(X)
    y = base(x)
    model = veneer.get_peft_model(
        base, veneer.LoraConfig(r=4, init_lora_weights="orthogonal", target_parameters=["0.w"], target_modules=[])
    )
    torch.testing.assert_close(model(x), y)
    assert all(p.any() for p in model.parameters() if p.requires_grad)
    wide = nn.Sequential(Holder(THREE["one"], 8, 20, 500))
    model = veneer.get_peft_model(wide, veneer.LoraConfig(r=4, init_lora_weights="gaussian", target_parameters=["0.w"], target_modules=[]))
    (a,) = [p for n, p in model.named_parameters() if "lora_A" in n]
    assert float(a.detach().std()) == pytest.approx(1 / 4, rel=0.05)


class Counting(nn.Module):
    """Writes into itself what others read: a counter, a loss of its own, a running mean in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.randn(4, 4)), 0
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.loss = x.square().mean()
        self.mean = 0.5 * self.mean + 0.5
        y: Tensor = x @ self.weight
        return y


def test_what_a_module_writes_into_itself_is_found_there() -> None:
    """It runs as a copy with other weights."""
    inner = Counting()
    model = veneer.get_peft_model(nn.Sequential(inner), veneer.LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"]))
    x = torch.randn(3, 4)
    model(x)
    model(x)
    assert inner.calls == 2 and float(inner.mean) == 0.75 and torch.equal(inner.loss, x.square().mean())
    assert set(inner._parameters) == {"weight"} and "weight" not in inner.__dict__
