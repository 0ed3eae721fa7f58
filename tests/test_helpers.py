"""Small public helpers: condition numbers, kept norms, the trainer's mixin."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.helpers import DoraCaching, KappaTuneSelector, MontecloraTrainerMixin, find_kappa_target_modules
from veneer.variants import dora


class Experts(nn.Module):
    """Two linear layers and the weights of three experts, of known condition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.good, self.bad, self.wide = nn.Linear(20, 30), nn.Linear(30, 20), nn.Linear(20, 50)
        self.block = nn.Module()
        self.block.gate_up_proj = nn.Parameter(torch.stack([self.matrix(8, 12, k) for k in (2.0, 4.0, 6.0)]))
        self.block.down_proj = nn.Parameter(torch.stack([self.matrix(12, 8, 1e3)] * 3))
        for layer, kappa in ((self.good, 3.0), (self.bad, 1e5), (self.wide, 50.0)):
            layer.weight.data = self.matrix(*layer.weight.shape, kappa)

    @staticmethod
    def matrix(n: int, m: int, kappa: float) -> Tensor:
        k = min(n, m)
        u, v = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64))[0], torch.linalg.qr(torch.randn(m, k, dtype=torch.float64))[0]
        return ((u * torch.logspace(0, -torch.log10(torch.tensor(kappa)), k, dtype=torch.float64)) @ v.T).float()


def test_condition_numbers_choose_targets() -> None:
    model = Experts()
    selector = KappaTuneSelector(model, show_progress=False)
    assert selector.get_best_targets() == ["good", "wide", "bad"]
    assert selector.get_best_targets(num_modules=2) == ["good", "wide"]
    assert selector.get_best_targets(top_p=0.1) == ["good"]
    assert selector.get_best_targets(threshold=60) == ["good", "wide"]
    assert selector.get_best_targets(0.9, 1, 0.1) == ["good"]  # the number counts first
    assert selector._modules is not None and selector._parameters is None
    for name, kappa in (("good", 3.0), ("wide", 50.0), ("bad", 1e5)):
        assert selector._modules[name] == pytest.approx(kappa, rel=1e-2)
    assert selector.get_best_target_parameters() == ["block.gate_up_proj", "block.down_proj"]
    assert selector._parameters == pytest.approx({"block.gate_up_proj": 4.0, "block.down_proj": 1e3}, rel=1e-3)
    assert find_kappa_target_modules(model, 0.4, show_progress=False) == {
        "target_modules": ["good"],
        "target_parameters": ["block.gate_up_proj"],
    }
    assert find_kappa_target_modules(nn.Sequential(nn.Linear(3, 3)), show_progress=False) == {
        "target_modules": ["0"],
        "target_parameters": None,
    }
    assert KappaTuneSelector(model, 40, show_progress=False).get_best_targets() == ["good", "bad"]
    assert KappaTuneSelector(model, 40, (".down_proj",), False).get_best_target_parameters() == ["block.down_proj"]


def test_a_singular_weight_is_the_worst() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight[3] = 0
    selector = KappaTuneSelector(model, show_progress=False)
    assert selector.get_best_targets() == ["1", "0"]
    s = torch.linalg.svdvals(model[1].weight.detach().double())
    assert selector._modules is not None and selector._modules["1"] == pytest.approx(float(s[0] / (s[-1] + 1e-8)))


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every computation of DoRA's norms."""
    calls: list[int] = []
    original = dora.row_norm_sq
    monkeypatch.setattr(dora, "row_norm_sq", lambda *a: (calls.append(1), original(*a))[1])
    return calls


def test_dora_s_norms_are_kept_until_something_is_written(norms: list[int]) -> None:
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules=["0", "1"], use_dora=True, init_lora_weights=False)).eval()
    x = torch.randn(3, 6)

    def count() -> tuple[Tensor, int]:
        norms.clear()
        with torch.no_grad():
            y = model(x)
        return y, len(norms)

    plain, each = count()
    assert each == 2
    with DoraCaching():
        count()
        y, calls = count()
        assert torch.equal(y, plain) and calls == 0
        layer = model.get_base_model()[0]
        with torch.no_grad():
            layer.lora_B["default"].weight.mul_(2)
        y, calls = count()
        assert calls == 1 and not torch.equal(y, plain)
        with torch.no_grad():
            layer.base_layer.weight.add_(0.1)
        assert count()[1] == 1
        layer.scale_layer(3.0)
        changed, calls = count()
        assert calls == 1
        norms.clear()
        model(x)  # gradients are wanted: nothing is kept
        assert len(norms) == 2
        model.train()
        assert count()[1] == 2
        model.eval()
        count()
        assert torch.equal(copy.deepcopy(model)(x), model(x))
    y, calls = count()
    assert calls == 1 and torch.equal(y, changed)  # of the second layer nothing has changed since: it is recalled
    DoraCaching()(enabled=True)
    try:
        count()
        assert count()[1] == 0
    finally:
        DoraCaching()(enabled=False)
    count()
    assert count()[1] == 0  # without it norms are recalled too, and what they are made of is looked at each time:
    layer.base_layer.weight.data[0].mul_(2)
    assert count()[1] == 1


def test_nothing_as_large_as_a_weight_is_kept() -> None:
    model = veneer.get_peft_model(nn.Sequential(nn.Linear(6, 6)), veneer.FourierFTConfig(n_frequency=5, target_modules=["0"])).eval()
    with DoraCaching(), torch.no_grad():
        y = model(torch.ones(1, 6))
        assert torch.equal(model(torch.ones(1, 6)), y)
    assert model.get_base_model()[0].attached["default"].cached is None


def test_the_mixin_adds_nothing_twice() -> None:
    class Trainer:
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
            y = model(inputs["x"])
            return (y.sum(), y) if return_outputs else y.sum()

    class Mixed(MontecloraTrainerMixin, Trainer):
        pass

    config = veneer.LoraConfig(r=2, target_modules=["0"], monteclora_config=veneer.MontecloraConfig(2))
    model = veneer.get_peft_model(nn.Sequential(nn.Linear(6, 6)), config).eval()
    inputs = {"x": torch.ones(2, 6)}
    assert torch.equal(Mixed().compute_loss(model, inputs), Trainer().compute_loss(model, inputs))
    loss, y = Mixed().compute_loss(model, inputs, return_outputs=True)
    assert torch.equal(loss, y.sum())
