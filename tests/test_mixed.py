"""Adapters of different methods on one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import veneer
from veneer.change import bias, weight
from veneer.engine.layer import adapted_layers
from veneer.method import Method, load_methods
from veneer.testing import examples
from veneer.testing.laws import move

METHODS = [m for m in load_methods().values() if issubclass(m, Method) and "linear" in m.kinds and not examples(m)[0].unmergeable]


def _config(method: type[Method], **fields: object) -> Method:
    config = examples(method)[0]
    config.target_modules = ["0", "2"]  # type: ignore[attr-defined]
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def _base() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8))


def _mixed(first: Method, second: Method) -> veneer.PeftMixedModel:
    model = veneer.get_peft_model(_base(), first, "one", mixed=True)
    assert isinstance(model, veneer.PeftMixedModel)
    model.add_adapter("two", second)
    model.set_adapter(["one", "two"])
    move(model, size=0.05)
    return model.eval()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("order", ["lora first", "lora second"])
def test_with_lora(method: type[Method], order: str, tmp_path: Path) -> None:
    """Together they are the one change after the other; merging, unmerging, saving and mixed batches hold for both."""
    torch.manual_seed(0)
    lora = _config(veneer.LoraConfig)
    pair = (lora, _config(method)) if order == "lora first" else (_config(method), lora)
    model, x = _mixed(*pair), torch.randn(4, 12)
    y = model(x)
    h = x
    for layer, act in zip([m for _, m in adapted_layers(model)], (torch.tanh, lambda t: t), strict=True):
        changes = [(layer.change(n), layer.attached[n].config.stacking) for n in ("one", "two")]
        b = bias(changes, layer.base_layer.bias)  # type: ignore[arg-type]
        h = act(h @ weight(changes, layer.base_layer.weight).T + b)  # type: ignore[arg-type, operator]
    torch.testing.assert_close(y, h, atol=2e-5, rtol=0)

    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, atol=5e-5, rtol=0)
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    rows = model(x, adapter_names=["one", "__base__", "two", "one"])
    alone = {}
    for name in ("one", "two"):
        with model.using(name):
            alone[name] = model(x)
    with model.disable_adapter():
        alone["__base__"] = model(x)
    for i, name in enumerate(["one", "__base__", "two", "one"]):
        torch.testing.assert_close(rows[i], alone[name][i], atol=2e-6, rtol=0)

    model.save_pretrained(tmp_path)
    again = veneer.PeftMixedModel.from_pretrained(_base(), tmp_path / "one", "one")
    again.load_adapter(tmp_path / "two", "two")
    again.set_adapter(["one", "two"])
    assert torch.equal(again(x), y)
    model.delete_adapter("one")
    torch.testing.assert_close(model(x), alone["two"], atol=2e-6, rtol=0)


def test_both_train_and_a_schedule_acts() -> None:
    model = veneer.get_peft_model(
        _base(), veneer.AdaLoraConfig(init_r=4, target_r=2, total_step=6, tinit=1, tfinal=1, deltaT=1, target_modules=["0"]), mixed=True
    )
    model.add_adapter("other", veneer.LoraConfig(target_modules=["0", "2"]))
    model.set_adapter(["default", "other"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    move(model)
    for step in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
        assert model.base_model.update_and_allocate(step + 1) is None  # offered as the method's own tuner offers it
    layer = model.get_base_model()[0]  # type: ignore[index]
    assert int((layer.leaf("default", "lora_E") != 0).sum()) == 2
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_a_mixed_model_refuses() -> None:
    model = veneer.get_peft_model(_base(), veneer.LoraConfig(target_modules=["0"], bias="all"), mixed=True)
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("two", veneer.IA3Config(target_modules=["0"], feedforward_modules=[], bias="all"))
    with pytest.raises(veneer.ConfigError, match="changes no weights"):
        model.add_adapter("two", veneer.PromptTuningConfig(num_virtual_tokens=2))
    assert model.active_adapters == ["default"] and list(model.peft_config) == ["default"]
    plain = veneer.get_peft_model(_base(), veneer.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="mixed=True"):
        plain.add_adapter("two", veneer.HRAConfig(target_modules=["0"]))


def test_its_layers_tell_their_status() -> None:
    model = _mixed(_config(veneer.LoraConfig), _config(veneer.LoHaConfig))
    status = model.get_model_status()
    assert status.peft_types == {"one": "LORA", "two": "LOHA"} and status.active_adapters == ["one", "two"]
    assert status.num_adapter_layers == 2
