"""Arrow and GenKnowSub: routing between LoRA adapters that were trained apart."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer as V
from veneer.engine.layer import adapted_layers
from veneer.errors import ConfigError, LoadError, MergeError, RouteError
from veneer.testing.laws import move
from veneer.variants.arrow import prototype

from .golden.bases import Mlp


def base() -> Any:
    torch.manual_seed(0)
    return Mlp(10, 12, 6)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Five LoRA adapters of two layers, of ranks 2, 3, 2, 2, 2."""
    out = []
    for i, r in enumerate((2, 3, 2, 2, 2)):
        model = V.get_peft_model(base(), V.LoraConfig(r=r, lora_alpha=4 + i, target_modules=["lin0", "lin1"]))
        move(model, seed=i, size=0.5)
        model.save_pretrained(tmp_path / f"e{i}")
        out.append(str(tmp_path / f"e{i}"))
    return out


def arrow(folders: list[str], general: list[str] | None = None, **fields: Any) -> Any:
    return V.create_arrow_model(base(), folders, V.ArrowConfig(**fields), general_adapter_paths=general).eval()


def dense(layer: Any, x: Tensor, k: int, temperature: float, general: list[str] = []) -> Tensor:  # noqa: B006  never changed
    """The layer's output by the formula, with whole matrices, token by token."""
    names = [n for n in layer.attached if n.startswith("task")]
    get = lambda n, side: getattr(layer, f"lora_{side}")[n].weight
    mean = {s: sum(get(g, s) for g in general) / len(general) if general else 0 for s in "AB"}
    deltas = [(get(n, "B") - mean["B"]) @ (get(n, "A") - mean["A"]) for n in names]
    directions = [torch.linalg.svd(d).Vh[0] for d in deltas]
    y = layer.base_layer(x)
    for where in [(i, j) for i in range(x.shape[0]) for j in range(x.shape[1])]:
        token = x[where]
        score = torch.stack([(v @ token).abs() for v in directions])
        best = score.topk(k).indices
        for e, c in zip(best, (score[best] / temperature).softmax(0), strict=True):
            y[where] += c * layer.scaling[names[e]] * deltas[e] @ token
    return y


@torch.no_grad()
def test_tokens_go_to_the_experts_that_move_them_most(folders: list[str]) -> None:
    x = torch.randn(3, 5, 10)
    model = arrow(folders[:3], top_k=2, router_temperature=0.7)
    layer = model.get_base_model().lin0
    torch.testing.assert_close(layer(x), dense(layer, x, 2, 0.7), atol=1e-5, rtol=0)
    assert model.active_adapters == ["arrow_router"]
    flat = layer(x.flatten(0, 1))
    torch.testing.assert_close(flat.view(3, 5, -1), layer(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(model(x[1:2]), model(x)[1:2], atol=1e-6, rtol=0)
    one = arrow(folders[:1], top_k=3)  # never more experts than there are
    torch.testing.assert_close(one(x), V.PeftModel.from_pretrained(base(), folders[0])(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_general_knowledge_is_taken_off_and_the_experts_stay(folders: list[str], tmp_path: Path) -> None:
    x = torch.randn(3, 5, 10)
    model = arrow([folders[0], folders[2]], folders[3:], use_gks=True, top_k=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layer = model.get_base_model().lin1
    h = torch.randn(3, 5, 12)
    torch.testing.assert_close(layer(h), dense(layer, h, 1, 1.0, ["gks_0", "gks_1"]), atol=1e-5, rtol=0)
    model(x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with model.using("task_0"):
        torch.testing.assert_close(model(x), V.PeftModel.from_pretrained(base(), folders[0])(x))
    with pytest.raises(RouteError, match=r"one rank.*'task_0': 2.*'task_1': 3"):
        arrow(folders[:2], folders[3:], use_gks=True)(x)


@pytest.mark.parametrize(("r", "n_out"), [(1, 8), (4, 8), (12, 8), (4, 2)])
def test_prototypes(r: int, n_out: int) -> None:
    torch.manual_seed(r)
    up, down = torch.randn(n_out, r), torch.randn(r, 10)
    v = torch.linalg.svd(up @ down).Vh[0]
    assert abs(float(v @ prototype(up, down, None))) == pytest.approx(1, abs=1e-5)
    up = up * torch.logspace(0, -r, r)  # far from each other, 15 steps reach it as well
    v = torch.linalg.svd(up @ down).Vh[0]
    assert abs(float(v @ prototype(up, down, 3))) == pytest.approx(1, abs=1e-4)
    assert not prototype(torch.zeros(n_out, r), down, None).any() and not prototype(torch.zeros(n_out, r), down, 3).any()


@torch.no_grad()
def test_what_changes_is_noticed(folders: list[str]) -> None:
    """New numbers, another scaling, one expert more or fewer: each is routed by what it is now."""
    model, x = arrow(folders[:2], top_k=2), torch.randn(2, 3, 10)
    layer = model.get_base_model().lin0
    outs = [layer(x)]
    layer.lora_A["task_0"].weight.mul_(-2).add_(0.3)
    outs.append(layer(x))
    torch.testing.assert_close(outs[-1], dense(layer, x, 2, 1.0), atol=1e-5, rtol=0)
    layer.set_scale("task_1", 0.5)
    outs.append(layer(x))
    torch.testing.assert_close(outs[-1], dense(layer, x, 2, 1.0), atol=1e-5, rtol=0)
    model.load_adapter(folders[2], "task_9")
    outs.append(layer(x))
    torch.testing.assert_close(outs[-1], dense(layer, x, 2, 1.0), atol=1e-5, rtol=0)
    model.delete_adapter("task_0")
    outs.append(layer(x))
    torch.testing.assert_close(outs[-1], dense(layer, x, 2, 1.0), atol=1e-5, rtol=0)
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in itertools.pairwise(outs))


def test_the_experts_can_be_trained_through_the_router(folders: list[str]) -> None:
    x = torch.randn(2, 3, 10)
    model = arrow(folders[:3], top_k=2)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    model(x)  # what is kept without a graph does not stand in the way
    model.set_requires_grad(["task_0", "task_1"])
    model(x).square().sum().backward()
    layer = model.get_base_model().lin1
    assert (
        layer.lora_A["task_0"].weight.grad.any() and layer.lora_B["task_1"].weight.grad.any() and layer.lora_A["task_2"].weight.grad is None
    )
    known = layer.attached["arrow_router"].place.memory["experts"].value[0]
    torch.optim.SGD([layer.lora_A["task_0"].weight], lr=0.1).step()
    model(x)
    assert not torch.equal(layer.attached["arrow_router"].place.memory["experts"].value[0], known)  # prototypes follow, without a gradient
    one = arrow(folders[:1])  # alone, an expert has all of the gate
    one.set_requires_grad("task_0")
    grads = []
    for name in ("arrow_router", "task_0"):
        one.zero_grad()
        with one.using(name):
            one(x).square().sum().backward()
        grads.append([p.grad.clone() for n, p in one.named_parameters() if "task_0" in n])
    for through, alone in zip(*grads, strict=True):
        torch.testing.assert_close(through, alone, rtol=1e-4, atol=1e-4)


def test_a_saved_router_finds_its_experts(folders: list[str], tmp_path: Path) -> None:
    x = torch.randn(2, 3, 10)
    model = arrow([folders[0], folders[2]], folders[3:], use_gks=True, top_k=1, rng_seed=3)
    model.save_pretrained(tmp_path / "all")
    again: Any = V.PeftModel.from_pretrained(base(), tmp_path / "all" / "arrow_router", adapter_name="router")
    assert torch.equal(again(x), model(x)) and again.active_adapters == ["router"]
    assert sorted(again.peft_config) == ["gks_0", "gks_1", "router", "task_0", "task_1"]
    assert again.peft_config["router"].arrow_config == model.peft_config["arrow_router"].arrow_config
    (tmp_path / "all" / "task_1" / "adapter_config.json").unlink()
    fresh = base()
    with pytest.raises(LoadError, match=r"'task_1'.*load_adapter\(folder, 'task_1'\)"):
        V.PeftModel.from_pretrained(fresh, tmp_path / "all" / "arrow_router")
    assert isinstance(fresh.lin0, nn.Linear)  # as it was
    part: Any = V.PeftModel.from_pretrained(base(), folders[0], adapter_name="task_0")
    for name, folder in {"task_1": folders[2], "gks_0": folders[3], "gks_1": folders[4]}.items():
        part.load_adapter(folder, name)
    part.load_adapter(tmp_path / "all" / "arrow_router", "arrow_router")
    part.set_adapter("arrow_router")
    assert torch.equal(part(x), model(x))


def test_what_arrow_cannot_do_is_said(folders: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        V.create_arrow_model(base(), [], V.ArrowConfig())
    with pytest.raises(ConfigError, match="general_adapter_paths"):
        V.create_arrow_model(base(), folders[:1], V.ArrowConfig(use_gks=True))
    with pytest.raises(ConfigError, match="top_k"):
        V.ArrowConfig(top_k=0)
    model = arrow(folders[:2])
    with pytest.raises(MergeError, match="experts of its own"):
        model.merge_adapter()
    for name in ("task_0", "task_1"):
        model.delete_adapter(name)
    with pytest.raises(RouteError, match=r"no experts on 'lin0'.*task_0"):
        model(torch.randn(2, 3, 10))
    dora = V.get_peft_model(base(), V.LoraConfig(target_modules=["lin0"], use_dora=True))
    dora.save_pretrained(tmp_path / "dora")
    with pytest.raises(ConfigError, match="'task_0' does more"):
        arrow([str(tmp_path / "dora")])(torch.randn(2, 3, 10))
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv1d(4, 4, 1))
    V.get_peft_model(conv, V.LoraConfig(target_modules=["0"])).save_pretrained(tmp_path / "conv")
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="conv"):
        V.create_arrow_model(nn.Sequential(nn.Conv1d(4, 4, 1)), [str(tmp_path / "conv")], V.ArrowConfig())


@torch.no_grad()
def test_experts_of_different_layers(folders: list[str], tmp_path: Path) -> None:
    """Each layer has the experts that stand on it; the router stands wherever one does."""
    part = V.get_peft_model(base(), V.LoraConfig(r=2, target_modules=["lin1"]))
    move(part, seed=8, size=0.5)
    part.save_pretrained(tmp_path / "part")
    model = arrow([str(tmp_path / "part"), folders[0]], top_k=2)
    assert model.peft_config["arrow_router"].target_modules == {"lin0", "lin1"}
    x = torch.randn(2, 3, 10)
    layer = model.get_base_model().lin0
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ layer.get_delta_weight("task_1").T, atol=1e-5, rtol=0)
    model.set_adapter("arrow_router")
    mixed = model(x, adapter_names=["arrow_router", "task_0"])
    torch.testing.assert_close(mixed[:1], model(x[:1]), atol=1e-6, rtol=0)
    with model.using("task_0"):
        torch.testing.assert_close(mixed[1:], model(x[1:]), atol=1e-6, rtol=0)


@torch.no_grad()
def test_both_stacks_of_an_encoder_decoder_are_routed(tmp_path: Path) -> None:
    """In `generate` the encoder is called on its own: what is known of the decoder's experts is looked at all the same."""
    from .golden.bases import build

    def t5() -> Any:
        torch.manual_seed(0)
        return build(
            "t5_seq2seq_lm", vocab_size=48, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4, decoder_start_token_id=0, pad_token_id=0
        )

    for i in range(2):
        expert = V.get_peft_model(t5(), V.LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
        move(expert, seed=i, size=0.5)
        expert.save_pretrained(tmp_path / str(i))
    model: Any = V.create_arrow_model(t5(), [str(tmp_path / "0"), str(tmp_path / "1")], V.ArrowConfig(top_k=1)).eval()
    ids = torch.randint(3, 48, (2, 6))
    fixed = {"max_new_tokens": 5, "do_sample": False}
    first = model.generate(input_ids=ids, **fixed)
    for name, p in model.named_parameters():
        if ".decoder." in name and "lora_B.task_" in name:
            p.mul_(-3)
    changed = model.generate(input_ids=ids, **fixed)
    for _, layer in adapted_layers(model):  # nothing kept from before
        layer.attached["arrow_router"].place.memory.clear()
    assert torch.equal(model.generate(input_ids=ids, **fixed), changed) and not torch.equal(first, changed)
