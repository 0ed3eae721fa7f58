"""Lily: what its layers share, and what they mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer as V
from veneer.errors import ConfigError, LoadError, MergeError
from veneer.testing.laws import move

from .golden.bases import DeepMlp


def lily(depth: int = 5, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = V.LilyConfig(**{"r": 3, "num_B": 2, "stride_A": 2, "target_modules": ["up", "down"], "scaling": 1.5, **fields})
    model = V.get_peft_model(DeepMlp(depth=depth), config)
    move(model, size=0.5)
    return model.eval()


def layers(model: Any) -> dict[str, Any]:
    return {f"{i}.{n}": block[n] for i, block in enumerate(model.get_base_model().layers) for n in ("up", "down")}


def test_the_mixture_is_that_of_all_tokens() -> None:
    model = lily(depth=1)
    layer = layers(model)["0.up"]
    x = torch.randn(3, 5, 12)
    a, b, router = (getattr(layer, f"lily_{n}")["default"].weight for n in ("A", "B", "router"))
    h = x @ a.T
    p = (h @ router.T).softmax(-1).flatten(0, 1).mean(0)
    mixed = sum(p[e] * b[3 * e : 3 * e + 3] for e in range(2))
    expected = layer.base_layer(x) + 1.5 * h @ mixed
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(layer(x[:1]), expected[:1], atol=1e-4)  # a row depends on those beside it


def test_neighbours_share_a_and_all_of_a_kind_share_b() -> None:
    model = lily()
    there = layers(model)
    a = {n: layer.lily_A["default"].weight for n, layer in there.items()}
    b = {n: layer.lily_B["default"].weight for n, layer in there.items()}
    for kind in ("up", "down"):
        assert a[f"0.{kind}"] is a[f"1.{kind}"] and a[f"2.{kind}"] is a[f"3.{kind}"]
        assert len({id(a[f"{i}.{kind}"]) for i in range(5)}) == 3
        assert len({id(b[f"{i}.{kind}"]) for i in range(5)}) == 1
    assert b["0.up"] is not b["0.down"]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * (3 + 1 + 5)  # each shared tensor once: 3 A, 1 B and 5 routers of either kind
    x = torch.randn(2, 4, 12)
    model(x).square().sum().backward()
    alone = lily(stride_A=1)  # the same numbers, each layer with an A of its own: its gradient is a part of the shared one's
    with torch.no_grad():
        for n, layer in layers(alone).items():
            for leaf in ("lily_A", "lily_B", "lily_router"):
                getattr(layer, leaf)["default"].weight.copy_(getattr(there[n], leaf)["default"].weight)
    alone(x).square().sum().backward()
    parts = [layers(alone)[f"{i}.up"].lily_A["default"].weight.grad for i in (2, 3)]
    torch.testing.assert_close(a["2.up"].grad, parts[0] + parts[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["up", "down"], ["layers.0.up", "layers.1.up", "up", "down"], r".*\.(up|down)"], ids=str)
def test_the_file_repeats_what_is_shared(targets: Any, tmp_path: Path) -> None:
    model = lily(target_modules=targets)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 3 * 10
    key = "base_model.model.layers.{}.up.lily_A.weight"
    pair = (2, 3) if len(targets) == 4 else (0, 1)  # a target that hits one layer shares with no other
    assert torch.equal(tensors[key.format(0)], tensors[key.format(1)]) == (pair == (0, 1))
    assert torch.equal(tensors[key.format(pair[0])], tensors[key.format(pair[1])])
    x = torch.randn(2, 4, 12)
    base = lambda: (torch.manual_seed(0), DeepMlp(depth=5))[1]
    again = V.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(again(x), model(x))
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]
    tensors[key.format(pair[1])] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoadError, match=r"tied.*differ"):
        V.PeftModel.from_pretrained(base(), tmp_path)


def test_shapes_of_one_name_share_apart() -> None:
    model = nn.ModuleDict({n: nn.ModuleDict({"proj": nn.Linear(*s)}) for n, s in {"a": (4, 6), "b": (6, 6), "c": (4, 6)}.items()})
    adapted: Any = V.get_peft_model(model, V.LilyConfig(r=2, target_modules=["proj"], stride_A=3)).get_base_model()
    b = {n: adapted[n]["proj"].lily_B["default"].weight for n in "abc"}
    assert b["a"] is b["c"] and b["a"] is not b["b"]


def test_adapters_come_and_go_apart() -> None:
    model = lily()
    x = torch.randn(2, 4, 12)
    first = model(x)
    model.add_adapter("other", V.LilyConfig(r=2, target_modules=["up"], stride_A=5))
    model.set_adapter("other")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".other." in n for n in trained)
    move(model, seed=9, size=0.5)
    assert not torch.allclose(model(x), first)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(model(x), first)
    assert not [n for n, _ in model.named_parameters() if "other" in n]


def test_together_with_lora_the_changes_add_up() -> None:
    torch.manual_seed(0)
    model: Any = V.get_peft_model(nn.Sequential(nn.Linear(6, 4)), V.LilyConfig(r=2, target_modules=["0"]), "one", mixed=True)
    model.add_adapter("two", V.LoraConfig(r=2, target_modules=["0"]))
    model.set_adapter(["one", "two"])
    move(model, size=0.5)
    x, outs = torch.randn(3, 5, 6), {}
    for name in ("one", "two"):
        with model.using(name):
            outs[name] = model(x)
    with model.disable_adapter():
        base = model(x)
    torch.testing.assert_close(model(x), outs["one"] + outs["two"] - base)
    with pytest.raises(MergeError, match="depends on the input"):
        model.merge_adapter()


@pytest.mark.parametrize(("fields", "name"), [({"num_B": 1}, "num_B"), ({"stride_A": 0}, "stride_A"), ({"r": 0}, "`r`")])
def test_wrong_fields(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        V.LilyConfig(**fields)
