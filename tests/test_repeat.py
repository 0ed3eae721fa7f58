"""A call without gradients that is answered from the last one gives what a call that asks everything gives, whatever has happened between them."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.engine.layer import adapted_layers
from veneer.engine.repeat import Repeat
from veneer.testing.laws import move


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: veneer.LoraConfig(r=2, target_modules=["proj"]),
    "ia3": lambda: veneer.IA3Config(target_modules=["proj"], feedforward_modules=[]),
    "ia3, inputs": lambda: veneer.IA3Config(target_modules=["proj"], feedforward_modules=["proj"]),
    "vera": lambda: veneer.VeraConfig(r=2, target_modules=["proj"]),
}


def _first(layer: Any) -> tuple[dict[str, Any], str]:
    return next(iter(layer.attached["default"].source.values()))


def _written(model: Any, layer: Any) -> None:
    table, key = _first(layer)
    table[key].data.add_(0.5)


def _other_numbers(model: Any, layer: Any) -> None:
    table, key = _first(layer)
    table[key].data = table[key].data + 0.5  # as `Module.to` does


def _replaced(model: Any, layer: Any) -> None:
    table, key = _first(layer)
    table[key] = nn.Parameter(table[key].detach() + 0.5)


def _scaled(model: Any, layer: Any) -> None:
    layer.scaling["default"] = 3.0


def _frozen_written(model: Any, layer: Any) -> None:
    layer.base_layer.weight.data.mul_(2)


def _frozen_replaced(model: Any, layer: Any) -> None:
    layer.base_layer.weight = nn.Parameter(2 * layer.base_layer.weight.detach(), requires_grad=False)


def _bias_replaced(model: Any, layer: Any) -> None:
    layer.base_layer.bias = None


def _other(model: Any, layer: Any) -> None:
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")
    move(model, seed=5)


def _off(model: Any, layer: Any) -> None:
    model.base_model.disable_adapter_layers()


def _merged(model: Any, layer: Any) -> None:
    model.merge_adapter()
    layer.base_layer.weight.data.mul_(2)  # the merged weight is the one that is run


def _hooked(model: Any, layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda m, args, out: out + 1)


def _bound(model: Any, layer: Any) -> None:
    layer.base_layer.forward = lambda x: nn.functional.linear(x, 2 * layer.base_layer.weight)


EVENTS = [
    _written,
    _other_numbers,
    _replaced,
    _scaled,
    _frozen_written,
    _frozen_replaced,
    _bias_replaced,
    _other,
    _off,
    _merged,
    _hooked,
    _bound,
]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_whatever_happens_between_two_calls_is_noticed(config: str, event: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = veneer.get_peft_model(Net(), CONFIGS[config]()).eval()
    move(model)
    ((_, layer),) = adapted_layers(model)
    x = torch.randn(1, 6)
    ran: list[bool] = []
    whole = Repeat.run
    monkeypatch.setattr(Repeat, "run", lambda self, *args: ran.append((y := whole(self, *args)) is not None) or y)
    first = model(x)
    torch.testing.assert_close(model(x), first)
    assert ran == [True] and layer.last.few is not None  # the second call was answered from the first
    event(model, layer)
    got = model(x)
    layer.last = None
    torch.testing.assert_close(got, model(x))
    if event is not _scaled or config not in ("ia3", "ia3, inputs"):  # which knows no scaling
        assert not torch.allclose(got, first)


def test_modes_and_dtypes_ask_anew() -> None:
    torch.manual_seed(0)
    model = veneer.get_peft_model(Net(), veneer.LoraConfig(r=2, target_modules=["proj"], lora_dropout=0.5)).eval()
    move(model)
    x = torch.randn(1, 6)
    with torch.no_grad():
        model(x)
        y = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        model.train()
        assert any(not torch.allclose(model(x), y) for _ in range(8))
        model.eval()
        torch.testing.assert_close(model(x), y)
    model(x).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


@torch.no_grad()
def test_a_copy_finds_out_for_itself() -> None:
    torch.manual_seed(0)
    model = veneer.get_peft_model(Net(), veneer.LoraConfig(r=2, target_modules=["proj"])).eval()
    move(model)
    x = torch.randn(1, 6)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ((_, layer),) = adapted_layers(other)
        assert layer.last is None
        layer.base_layer.weight.mul_(2)
        assert not torch.allclose(other(x), y)
        torch.testing.assert_close(model(x), y)


@torch.no_grad()
def test_another_thread_may_forget_what_was_found_out_at_any_moment() -> None:
    """As a hot swap and the deletion of another adapter do: between any two instructions of a call."""
    torch.manual_seed(0)
    model = veneer.get_peft_model(Net(), veneer.LoraConfig(r=2, target_modules=["proj"])).eval()
    move(model)
    ((_, layer),) = adapted_layers(model)
    a, x = layer.attached["default"], torch.randn(1, 6)
    y, moments = model(x), 0

    def forgetting(at: int) -> Any:
        def each(frame: Any, event: str, _: Any) -> Any:
            nonlocal moments
            if frame.f_code.co_name not in ("forward", "change_of", "run", "of") or "veneer" not in frame.f_code.co_filename:
                return None
            frame.f_trace_opcodes = True
            moments += event == "opcode"
            if event == "opcode" and moments == at:
                layer.last = a.kept = None
            return each

        return each

    before = sys.gettrace()
    try:
        for short in (True, False):
            at, total = 1, 2
            while at <= total:
                layer.last = None
                model(x)
                layer.last = layer.last if short else None
                moments = 0
                sys.settrace(forgetting(at))
                got = model(x)
                sys.settrace(before)
                total, at = max(moments, 1), at + 1
                assert torch.equal(got, y)
            assert total > 50
    finally:
        sys.settrace(before)
