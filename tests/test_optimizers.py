"""LoRA+, LoRA-FA and Riemannian preconditioning: against their formulas, not against another implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.errors import ConfigError
from veneer.optimizers import LoraFAOptimizer, create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.norm(self.first(self.table(ids)).tanh()))  # type: ignore[no-any-return]


def _model(**fields: Any) -> Any:
    torch.manual_seed(0)
    model = veneer.get_peft_model(Net(), veneer.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["first", "last"], **fields}))
    for n, p in model.named_parameters():
        if "lora_B" in n or "embedding_A" in n:
            nn.init.normal_(p, std=0.3)
    return model


def _backward(model: nn.Module, seed: int = 1) -> None:
    model.zero_grad()
    ids = torch.randint(0, 11, (7,), generator=torch.Generator().manual_seed(seed))
    model(ids).square().mean().backward()


def _named(model: nn.Module) -> dict[str, Any]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def test_loraplus_gives_each_tensor_its_rate() -> None:
    model = _model(target_modules=["first", "last", "table"], use_dora=False, modules_to_save=["norm"], bias="all")
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-5, betas=(0.8, 0.9)
    )
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["betas"] == (0.8, 0.9)
    by_id = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    named = _named(model)
    assert len(by_id) == len(named) == sum(len(g["params"]) for g in optimizer.param_groups)
    for n, p in named.items():
        if "embedding" in n:
            assert by_id[id(p)] == (1e-5, 0.1), n
        elif "lora_A" in n:
            assert by_id[id(p)] == (1e-3, 0.1), n
        elif "lora_B" in n:
            assert by_id[id(p)] == (16e-3, 0.1), n
        else:
            assert by_id[id(p)] == (16e-3, 0.0), n  # biases and the norm's tensors
    before = {n: p.detach().clone() for n, p in named.items()}
    _backward(model)
    optimizer.step()
    moved = {n: float((p.detach() - before[n]).abs().max()) for n, p in named.items() if "first" in n and "lora" in n}
    a, b = (next(v for n, v in moved.items() if f"lora_{x}" in n) for x in "AB")
    assert b == pytest.approx(16 * a, rel=0.15)  # Adam's first step is the rate itself; the rest is weight decay


def test_lorafa_is_adamw_on_the_projected_gradient() -> None:
    model = _model(rank_pattern={"last": 2})
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2, weight_decay=0.1)
    assert isinstance(optimizer, LoraFAOptimizer)
    assert not any("lora_A" in n for n in _named(model))
    layers = {n: model.base_model.model.get_submodule(n) for n in ("first", "last")}
    copies = {n: nn.Parameter(m.lora_B["default"].weight.detach().clone()) for n, m in layers.items()}
    twin = torch.optim.AdamW(list(copies.values()), lr=1e-2, weight_decay=0.1, eps=1e-12)
    optimizer.param_groups[0]["eps"] = 1e-12
    for i in range(3):
        _backward(model, i)
        for n, m in layers.items():
            a, scaling = m.lora_A["default"].weight.detach(), 6 / len(m.lora_A["default"].weight)
            copies[n].grad = m.lora_B["default"].weight.grad @ torch.linalg.inv(a @ a.T) / scaling**2
        optimizer.step()
        twin.step()
        for n, m in layers.items():
            torch.testing.assert_close(m.lora_B["default"].weight.detach(), copies[n].detach(), atol=1e-6, rtol=1e-3)


def test_a_projected_step_comes_nearest_to_the_step_of_the_full_weight() -> None:
    """Of all steps of B, g (AAᵀ)⁻¹ / s² is the one whose s B A is nearest to the gradient of W (checked by least squares)."""
    model = _model(target_modules=["first"])
    optimizer: Any = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2)
    layer = model.base_model.model.first
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.extend((args[0], output))

    layer.register_forward_hook(keep)
    _backward(model)
    whole = seen[1].grad.T @ seen[0]  # type: ignore[union-attr]  # ∇W = Σ δ xᵀ
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    step = optimizer._gradient(b)
    best = torch.linalg.lstsq(2 * a.detach().T, whole.detach().T).solution.T  # min ‖s X A - ∇W‖, s = 2
    torch.testing.assert_close(step, best, atol=1e-5, rtol=1e-4)


def test_lorafa_takes_more_ranks_than_inputs() -> None:
    """A Aᵀ is singular there. Of the steps of B that come nearest to the gradient of W, the smallest is taken."""
    torch.manual_seed(0)
    model = veneer.get_peft_model(nn.Sequential(nn.Linear(4, 32)), veneer.LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    optimizer: Any = create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-2)
    layer: Any = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(16, 4)
    losses = []
    for i in range(20):
        optimizer.zero_grad()
        loss = (model(x) - x.repeat(1, 8)).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        if i == 0:
            step, whole = optimizer._gradient(b), b.grad @ torch.linalg.pinv(a.T) / 2  # ∇B = s ∇W Aᵀ
            torch.testing.assert_close(2 * step @ a, whole, atol=1e-5, rtol=1e-3)
        optimizer.step()
    assert losses[-1] < losses[0]


def test_lorafa_refuses_another_scaling_than_the_adapters() -> None:
    model = _model()
    with pytest.raises(ConfigError, match=r"r=8, and the adapter 'default' has r=3"):
        create_lorafa_optimizer(model, r=8, lora_alpha=6, lr=1e-2)
    with pytest.raises(ConfigError, match="use_rslora"):
        create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2, use_rslora=True)
    assert any("lora_A" in n for n in _named(model))  # nothing was frozen


def test_riemannian_gradients_are_divided_by_the_other_factors_metric() -> None:
    model = _model()
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1, reg=1e-2, momentum=0.0)
    assert type(optimizer) is torch.optim.SGD
    layer = model.base_model.model.first
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    _backward(model)
    eye = torch.eye(3)
    new_a = a.detach() - 0.1 * torch.linalg.inv(b.detach().T @ b.detach() + 1e-2 * eye) @ a.grad
    new_b = b.detach() - 0.1 * b.grad @ torch.linalg.inv(a.detach() @ a.detach().T + 1e-2 * eye)
    optimizer.step()
    torch.testing.assert_close(a.detach(), new_a)
    torch.testing.assert_close(b.detach(), new_b)


def test_a_riemannian_step_does_not_depend_on_how_the_product_is_split() -> None:
    """What the method is for: B A = (B c)(A / c), and the step of the product is the same for any c."""
    deltas = []
    for c in (1.0, 4.0):
        model = _model(target_modules=["first"])
        layer = model.base_model.model.first
        with torch.no_grad():
            layer.lora_A["default"].weight.div_(c)
            layer.lora_B["default"].weight.mul_(c)
        optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3, reg=1e-9)
        before = layer.get_delta_weight("default").detach()
        _backward(model)
        optimizer.step()
        deltas.append(layer.get_delta_weight("default").detach() - before)
    torch.testing.assert_close(deltas[0], deltas[1], rtol=2e-2, atol=1e-7)


def test_riemannian_takes_convolutions_and_refuses_closures() -> None:
    torch.manual_seed(0)
    model = veneer.get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), veneer.LoraConfig(r=2, target_modules=["0"]))
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-2)
    x = torch.randn(2, 3, 5, 5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < losses[0]
    with pytest.raises(ConfigError, match="without a closure"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: create_loraplus_optimizer(m, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4),
        lambda m: create_lorafa_optimizer(m, r=8, lora_alpha=8, lr=1e-3),
        lambda m: create_riemannian_optimizer(m, torch.optim.AdamW, lr=1e-3),
    ],
)
def test_a_method_without_factors_is_refused(make: Any) -> None:
    model = veneer.get_peft_model(Net(), veneer.IA3Config(target_modules=["first"], feedforward_modules=[]))
    with pytest.raises(ConfigError, match="no such pair trains"):
        make(model)


def test_lorafa_goes_on_from_its_state() -> None:
    runs = []
    for cut in (False, True):
        model = _model()
        optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2)
        for i in range(4):
            if cut and i == 2:
                state = optimizer.state_dict()
                optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2)
                optimizer.load_state_dict(state)
            _backward(model, i)
            optimizer.step()
        runs.append({n: p.detach().clone() for n, p in _named(model).items()})
    assert all(torch.equal(v, runs[1][n]) for n, v in runs[0].items())
