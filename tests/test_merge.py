"""Merging: rounded once, told, undone bit for bit; tied and shared weights stay what they are."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune

import veneer
from veneer.engine.layer import adapted_layers
from veneer.engine.wrapper import Wrapper
from veneer.errors import MergeError
from veneer.testing.laws import move


def _bf16(size: float) -> Any:
    """A bf16 layer of 256 x 256 and a change whose norm is `size` times the weight's."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(256, 256, bias=False, dtype=torch.bfloat16))
    nn.init.normal_(base[0].weight, std=0.02)
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=8, lora_alpha=8, target_modules=["0"]))
    ((_, layer),) = adapted_layers(model)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        delta = layer.get_delta_weight("default").float()
        layer.lora_B["default"].weight.mul_(size * layer.weight.float().norm() / delta.norm())
    return model, layer


@pytest.mark.parametrize(("size", "verdict"), [(5e-2, "good"), (5e-4, "lossy")])
def test_the_report_tells_what_rounding_lost(size: float, verdict: str) -> None:
    model, layer = _bf16(size)
    frozen = layer.weight.detach().clone()
    delta = layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
    report = model.merge_adapter()
    # brute force
    exact = frozen.float() + delta
    rounded = exact.to(torch.bfloat16)
    assert torch.equal(layer.weight, rounded)
    got = rounded.float() - frozen.float()
    (entry,) = report.layers.values()
    assert entry.error == pytest.approx(float((got - delta).norm() / delta.norm()), rel=1e-3)
    assert entry.lost == pytest.approx(float(((got == 0) & (delta != 0)).float().mean()), rel=1e-3)
    assert entry.size == pytest.approx(size, rel=1e-2)
    assert entry.verdict == verdict
    assert verdict in str(report)


def test_two_adapters_are_rounded_once() -> None:
    model, layer = _bf16(1e-2)
    model.add_adapter("other", veneer.LoraConfig(r=4, target_modules=["0"]))
    nn.init.normal_(layer.lora_B["other"].weight, std=1e-3)
    model.base_model.set_adapter(["default", "other"])
    total = sum(layer.scaling[n] * layer.lora_B[n].weight @ layer.lora_A[n].weight for n in ("default", "other"))
    want = (layer.weight.float() + total).to(torch.bfloat16)
    frozen = layer.weight.detach().clone()
    model.merge_adapter()
    assert torch.equal(layer.weight, want)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, frozen)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])  # one after another gives the same as both at once
    assert torch.equal(layer.weight, want)


def test_a_broken_adapter_merges_nowhere() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    ((_, _), (_, second)) = adapted_layers(model)
    with torch.no_grad():
        second.lora_A["default"].weight[0, 0] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(MergeError, match=r"1: NaNs detected in the merged weights.*default"):
        model.merge_adapter()
    assert all(torch.equal(v, before[k]) or v.isnan().any() for k, v in model.state_dict().items())
    assert not any(layer.merged for _, layer in adapted_layers(model))


def test_merged_weights_move_with_the_model() -> None:
    model, layer = _bf16(1e-2)
    frozen = layer.weight.detach().clone()
    model.merge_adapter()
    model.float()
    model.unmerge_adapter()
    assert torch.equal(layer.weight, frozen.float())


class Tied(nn.Module):
    """A language model in small, its head tied to its table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.mix(self.embed(tokens))))
        return out


def _trained(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


@pytest.mark.parametrize("targets", [["head"], ["embed"], ["embed", "head"], ["head", "mix"]])
def test_merging_into_a_tied_weight_changes_what_was_adapted_only(targets: list[str], tmp_path: Path) -> None:
    """PEFT's merge of a tied head changes the table as well."""
    torch.manual_seed(0)
    base, tokens = Tied(), torch.randint(0, 20, (2, 5))
    model = _trained(veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules=targets)))
    y = model(tokens)
    table = base.embed.weight if "embed" not in targets else base.embed.base_layer.weight  # type: ignore[union-attr]
    before = table.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(model(tokens), y, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    assert torch.equal(table, before)
    assert torch.equal(model(tokens), y)
    holders = [m for m in model.modules() if m._parameters.get("weight") is table]
    assert len(holders) == 2  # tied again
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens), y, atol=1e-5, rtol=0)


def test_ensured_tying_trains_and_merges_one_pair_of_factors() -> None:
    torch.manual_seed(0)
    base, tokens = Tied(), torch.randint(0, 20, (2, 5))
    config = veneer.LoraConfig(r=2, target_modules=["embed"], ensure_weight_tying=True)
    model = _trained(veneer.get_peft_model(base, config))
    layers = {path.rpartition(".")[2]: layer for path, layer in adapted_layers(model)}
    assert set(layers) == {"embed", "head"}
    torch.testing.assert_close(layers["embed"].get_delta_weight("default"), layers["head"].get_delta_weight("default"))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2  # A and B, once
    y = model(tokens)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens), y, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged.embed.weight, merged.head.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}])
def test_a_head_that_follows_an_embedding_starts_with_it(start: str, fields: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, tokens = Tied(), torch.randint(0, 20, (2, 5))
    y = base(tokens)
    config = veneer.LoraConfig(r=2, init_lora_weights=start, target_modules=["embed", "mix"], ensure_weight_tying=True, **fields)
    model = veneer.get_peft_model(copy.deepcopy(base), config)
    torch.testing.assert_close(model(tokens), y)
    y = _trained(model)(tokens)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(tokens), y)
    torch.testing.assert_close(model.merge_and_unload()(tokens), y, atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [["embed"], ["embed", "head"]])
def test_new_rows_of_a_table_are_those_of_a_head_tied_to_it(targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, tokens = Tied(), torch.randint(0, 20, (2, 5))
    model = _trained(veneer.get_peft_model(copy.deepcopy(base), veneer.TrainableTokensConfig(token_indices=[3, 7], target_modules=targets)))
    (rows,) = [p for p in model.parameters() if p.requires_grad]
    naive = copy.deepcopy(base)
    with torch.no_grad():
        naive.embed.weight[[3, 7]] = rows
    y = model(tokens)
    torch.testing.assert_close(y, naive(tokens))
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == {f"base_model.model.{n}.trainable_tokens_delta" for n in ("embed", "head")}  # as PEFT's files
    torch.testing.assert_close(veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(tokens), y)
    torch.testing.assert_close(model.merge_and_unload()(tokens), y, atol=1e-5, rtol=0)


def test_two_adapters_with_copies_of_tied_modules_mix_in_a_batch() -> None:
    torch.manual_seed(0)
    config = veneer.LoraConfig(r=2, target_modules=["mix"], modules_to_save=["embed"], ensure_weight_tying=True)
    model, tokens = veneer.get_peft_model(Tied(), config, "a"), torch.randint(0, 20, (2, 5))
    model.add_adapter("b", copy.deepcopy(config))
    model.set_requires_grad(["a", "b"])
    _trained(model)
    rows = model(tokens, adapter_names=["b", "a"])
    for row, name in enumerate("ba"):
        with model.using(name):
            torch.testing.assert_close(rows[row], model(tokens)[row])


def test_a_module_used_at_two_places_is_adapted_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.tanh(self.a(x)))
            return out

    torch.manual_seed(0)
    model = _trained(veneer.get_peft_model(Twice(), veneer.LoraConfig(r=2, target_modules=["a"])))
    root: Any = model.get_base_model()
    assert root.a is root.b
    assert len([n for n, p in model.named_parameters() if p.requires_grad]) == 2
    x = torch.randn(3, 4)
    y = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y, atol=1e-6, rtol=0)


def test_one_set_of_layer_weights_used_twelve_times() -> None:
    """ALBERT: the factors are trained once and act in every pass."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        vocab_size=40, embedding_size=8, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(0)
    base = transformers.AlbertModel(config).eval()
    ids = torch.arange(10).unsqueeze(0)
    model = _trained(veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules=["query", "value", "ffn"])))
    assert sum(1 for _ in adapted_layers(model)) == 3
    y = model(input_ids=ids).last_hidden_state
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).last_hidden_state, y, atol=1e-5, rtol=0)


def test_experts_change_without_the_sum_being_formed() -> None:
    """A 3-D parameter under LoRA: forward and backward make no second tensor of E x n_out x n_in beside the changed weight itself."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 32, 16) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([nn.functional.linear(x, w) for w in self.w]).sum(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.experts(x)
            return out

    torch.manual_seed(0)
    model = _trained(veneer.get_peft_model(Model(), veneer.LoraConfig(r=2, target_modules=[], target_parameters=["experts.w"])))
    from torch.utils._python_dispatch import TorchDispatchMode

    class Large(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.made: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not func.is_view and out.numel() >= 8 * 32 * 16:
                self.made.append(str(func))
            return out

    x = torch.randn(4, 16, requires_grad=True)
    with Large() as large:
        model(x).sum().backward()
    assert large.made == []


def test_deleting_an_adapter_frees_its_tensors() -> None:
    import gc
    import weakref

    model = veneer.get_peft_model(nn.Sequential(nn.Linear(8, 8)), veneer.LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("other", veneer.LoraConfig(r=2, target_modules=["0"]))
    held = [weakref.ref(p) for n, p in model.named_parameters() if ".other" in n]
    assert len(held) == 2
    with torch.no_grad(), model.using("other"):
        model.eval()(torch.randn(2, 8))  # a layer remembers its last call without gradients
    model(torch.randn(2, 8)).sum().backward()
    model.delete_adapter("other")
    gc.collect()
    assert all(r() is None for r in held)
    assert not any("other" in n for n in model.state_dict())


def _pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize(
    ("compute", "keep"),
    [
        (torch.nn.utils.parametrizations.weight_norm, lambda m: torch.nn.utils.parametrize.remove_parametrizations(m, "weight")),
        (_pruned, lambda m: prune.remove(m, "weight")),
    ],
)
@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_weight_that_is_computed_is_not_merged_into_until_it_is_one(compute: Any, keep: Any, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(proj=nn.Linear(6, 5)))
    compute(base.proj)
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules=["proj"], **config)).eval()
    ((_, layer),) = adapted_layers(model)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 6)
    y = model(x)
    with pytest.raises(MergeError, match=r"proj: its weight is computed at each call.*prune\.remove"):
        model.merge_adapter()
    assert torch.equal(model(x), y)
    keep(layer.base_layer)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("compute", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm, _pruned])
@pytest.mark.parametrize("layer", [nn.Linear, nn.Conv1d])
def test_a_change_of_a_whole_weight_acts_on_one_that_is_computed(compute: Any, layer: type[nn.Module]) -> None:
    """The weight is a property, or written by a hook before each call: over W', it was."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8) if layer is nn.Linear else nn.Conv1d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(input=x)  # by its name: whatever the module does with it

    torch.manual_seed(0)
    net = Net()
    compute(net.proj)
    net.eval()
    config = veneer.OFTConfig(oft_block_size=4, target_modules=["proj"])
    plain = Net()
    plain.proj.weight.data, plain.proj.bias.data = net.proj.weight.detach().clone(), net.proj.bias.detach().clone()
    models = [veneer.get_peft_model(m, copy.copy(config)).eval() for m in (net, plain)]
    for m in models:
        move(m)
    x = torch.randn(3, 8) if layer is nn.Linear else torch.randn(3, 8, 5)
    y, want = (m(x) for m in models)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert all(p.grad is not None for p in models[0].parameters() if p.requires_grad)
    with models[0].disable_adapter(), torch.no_grad():
        assert not torch.allclose(models[0](x), y)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(models[0], backend="eager")(x), want)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_merge_keeps_channels_last(use_dora: bool) -> None:
    conv = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    model = veneer.get_peft_model(conv, veneer.LoraConfig(target_modules=["0"], init_lora_weights=False, use_dora=use_dora)).eval()
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    want = model(x)
    merged = model.merge_and_unload()
    assert merged[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(merged(x), want, atol=1e-5)


def test_tied_weights_that_were_moved_while_merged_come_back_moved() -> None:
    """While both are merged, no module has the shared parameter, so that `to` does not find it."""
    model = _trained(veneer.get_peft_model(Tied(), veneer.LoraConfig(r=2, target_modules=["embed", "head"])))
    tokens = torch.randint(0, 20, (2, 5))
    want = model.double()(tokens)
    model.float().merge_adapter()
    model.double().unmerge_adapter()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    torch.testing.assert_close(model(tokens), want)


@pytest.mark.parametrize("targets", [["head"], ["embed", "head"]])
def test_layers_that_are_merged_one_by_one_leave_tied_weights_to_the_others(targets: list[str]) -> None:
    """A layer does not know who else holds its weight."""
    model = _trained(veneer.get_peft_model(Tied(), veneer.LoraConfig(r=2, target_modules=targets)))
    tokens = torch.randint(0, 20, (2, 5))
    y, layers = model(tokens), [layer for _, layer in adapted_layers(model)]
    frozen = layers[0].get_base_layer().weight
    before = frozen.detach().clone()
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(model(tokens), y, atol=1e-5, rtol=0)
    for layer in layers:
        layer.unmerge()
    assert torch.equal(frozen, before) and all(layer.get_base_layer().weight is frozen for layer in layers)


def test_what_is_merged_is_what_acts_on_each_layer() -> None:
    """A layer's own choice goes before the model's."""
    model = veneer.get_peft_model(Tied(), veneer.LoraConfig(r=2, target_modules=["mix", "head"]), "a")
    model.add_adapter("b", veneer.LoraConfig(r=2, target_modules=["mix", "head"], modules_to_save=["embed"]))
    move(model)
    tokens = torch.randint(0, 20, (2, 5))
    for module in model.modules():
        if isinstance(module, Wrapper):
            module.set_adapter("b")
    y = model(tokens)
    with model.using("a"):
        assert model.base_model.model.embed.weight is model.base_model.model.embed.original_module.weight
    model.merge_adapter()
    assert all(layer.merged_adapters == ["b"] for _, layer in adapted_layers(model))
    torch.testing.assert_close(model.merge_and_unload()(tokens), y, atol=1e-5, rtol=0)


def test_of_several_trained_copies_none_is_taken_without_a_word() -> None:
    config = veneer.LoraConfig(r=2, target_modules=["mix"], modules_to_save=["head"])
    model = veneer.get_peft_model(Tied(), config, "a")
    model.add_adapter("b", copy.deepcopy(config))
    model.base_model.set_adapter(["a", "b"])
    with pytest.raises(MergeError, match=r"head: the adapters \['a', 'b'\] each have their own trained copy"):
        model.merge_and_unload()
    assert not any(layer.merged for _, layer in adapted_layers(model))
    model.merge_and_unload(adapter_names=["b"])


def test_after_a_merge_for_good_all_that_trained_before_trains() -> None:
    """Also a head that was tied and is not any more."""
    for merged in (Tied(), nn.Sequential(Tied())):
        merged = veneer.get_peft_model(merged, veneer.LoraConfig(r=2, target_modules=["head"])).merge_and_unload()
        assert all(p.requires_grad for p in merged.parameters()) and len([*merged.parameters()]) == 4


def test_an_attention_that_is_merged_in_one_of_its_two_parts() -> None:
    attention = nn.MultiheadAttention(8, 2)
    model = veneer.get_peft_model(nn.Sequential(attention), veneer.LoraConfig(r=2, target_modules=["0"])).eval()
    move(model)
    (_, outer), (_, inner) = adapted_layers(model)
    x = torch.randn(3, 2, 8)
    want = outer(x, x, x)[0]
    for layer in (outer, inner):
        layer.merge()
        torch.testing.assert_close(outer(x, x, x)[0], want)
        with model.disable_adapter():
            torch.testing.assert_close(outer(x, x, x)[0], copy.deepcopy(model).unload()[0](x, x, x)[0])
        layer.unmerge()
