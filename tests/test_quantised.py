"""Quantised bases: what never changes, how much is held at a time, merging onto what and into what, and what is refused. The laws are in their own file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import veneer
from veneer.bases import codec_for, stored_bytes
from veneer.distributed import save_merged
from veneer.errors import ConfigError, MergeError, PeftWarning
from veneer.method import Method, load_methods
from veneer.testing import examples
from veneer.testing.laws import move
from veneer.testing.packed import bitsandbytes, hqq, quanto, torchao

for library in ("bitsandbytes", "torchao", "optimum.quanto", "hqq", "transformers"):
    pytest.importorskip(library)

Pack = Callable[[nn.Linear], nn.Module]
NF4: Pack = lambda m: bitsandbytes(m, quant_type="nf4", compress_statistics=True)
STORAGES: dict[str, Pack] = {
    "nf4": NF4,
    "int8": bitsandbytes,
    "torchao": lambda m: torchao(m, "Int8WeightOnlyConfig"),
    "quanto": lambda m: quanto(m, "qint4"),
    "hqq": lambda m: hqq(m, 4),
}


class Place(nn.Module):
    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.site(x)) + x


class Stack(nn.Module):
    """Square linear layers in a row, `layers.0.site` and so on, with a nonlinearity between; the same weights every time."""

    def __init__(self, pack: Pack | None = None, layers: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        linear = [nn.Linear(64, 64).to(dtype) for _ in range(layers)]
        self.layers = nn.Sequential(*(Place(m if pack is None else pack(m)) for m in linear))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def adapted(base: Pack | nn.Module, config: Any = None, size: float = 0.1, **options: Any) -> Any:
    model = base if isinstance(base, nn.Module) else Stack(base, **options)
    torch.manual_seed(3)
    peft = veneer.get_peft_model(model, config or veneer.LoraConfig(r=4, target_modules=["site"]))
    move(peft, size=size)
    return peft


def layers_of(model: Any) -> list[Any]:
    return [place.site for place in model.get_base_model().layers]


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("training", [True, False])
def test_ten_steps_leave_every_packed_bit(storage: str, training: bool) -> None:
    """In eval mode as well, where bitsandbytes would repack a bare layer on some CPUs."""
    model = adapted(STORAGES[storage]).train(training)
    kept = [layer.site.codec.packed(layer.base_layer) for layer in layers_of(model)]
    before = copy.deepcopy([{n: t.clone() for n, t in k.items()} for k in kept])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(10):
        loss = model(torch.ones(3, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            model(torch.ones(3, 64))
    assert losses[-1] < losses[0]
    for layer, old in zip(layers_of(model), before, strict=True):
        now = layer.site.codec.packed(layer.base_layer)
        assert set(now) == set(old) and sum(t.numel() for t in now.values()) > 64 * 16
        assert all(torch.equal(now[n], t) for n, t in old.items())
        assert all(p.grad is None for p in layer.base_layer.parameters())


def test_a_layer_that_torchao_gives_no_backward_gets_one() -> None:
    """torchao's layers that round their inputs pass no gradient on: below them nothing would train, without a word."""
    pack: Pack = lambda m: torchao(m, "Int8DynamicActivationInt8WeightConfig")
    x = torch.randn(3, 64, requires_grad=True)
    model = adapted(pack)
    model(x).sum().backward()
    assert x.grad is not None and x.grad.abs().min() > 0
    assert all(bool(p.grad.abs().sum() > 0) for p in model.parameters() if p.requires_grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_bfloat16_agrees_with_the_dequantised_model(config: dict[str, Any]) -> None:
    lora = veneer.LoraConfig(r=4, target_modules=["site"], **config)
    model = adapted(NF4, lora, dtype=torch.bfloat16)
    plain = Stack(dtype=torch.bfloat16)
    with torch.no_grad():
        for mine, place in zip(layers_of(model), plain.layers, strict=True):
            place.site.weight.copy_(mine.frozen_weight())  # type: ignore[union-attr, operator]
    reference = adapted(plain, copy.deepcopy(lora))
    grads = []
    for m in (model, reference):
        torch.manual_seed(5)
        x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
        m.train()(x).float().square().sum().backward()
        grads.append([x.grad, *(p.grad for p in m.parameters() if p.requires_grad)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=3e-2 * float(b.abs().max()), rtol=0)


class Watch(TorchDispatchMode):
    """The most tensors of a weight's size, and floating, that are alive at a time."""

    def __init__(self, size: int, model: nn.Module | None = None) -> None:
        super().__init__()
        self.size, self.alive, self.most = size, {}, 0
        kept = [*model.parameters(), *model.buffers()] if model is not None else []
        self.kept = {t.untyped_storage()._cdata for t in kept}  # a view of what the model holds is nothing new

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if (
                type(t) is Tensor
                and t.is_floating_point()
                and (kept := t.untyped_storage()).nbytes() >= 4 * self.size
                and kept._cdata not in self.kept
            ):
                self.alive[kept._cdata] = StorageWeakRef(kept)
        self.alive = {k: r for k, r in self.alive.items() if not r.expired()}
        self.most = max(self.most, len(self.alive))
        return out


def most_alive(config: Method, layers: int, pack: Pack = NF4) -> int:
    model = adapted(pack, copy.deepcopy(config), layers=layers, size=0.02).train()
    x = torch.randn(2, 64)
    model(x).sum().backward()  # what is found out once
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with Watch(64 * 64, model) as watch:
        model(x).square().sum().backward()
    return watch.most


CONFIGS = [
    pytest.param(config, id=f"{m.__name__}-{i}")
    for m in load_methods().values()
    if issubclass(m, Method) and "linear" in m.kinds and not m.takes and not m.__name__.startswith("TrainableTokens")
    for i, config in enumerate(examples(m))
    if not config.experts()
]


@pytest.mark.parametrize("config", CONFIGS)
def test_what_a_step_holds_does_not_grow_with_the_layers(config: Method) -> None:
    """One layer's worth of dequantised or weight-sized tensors at a time, whatever the method: the same for six layers as for two."""
    config = copy.deepcopy(config)
    config.target_modules = {"site"}  # type: ignore[attr-defined]
    two, six = most_alive(config, 2), most_alive(config, 6)
    assert six <= two


@pytest.mark.parametrize("storage", STORAGES)
def test_lora_never_holds_more_than_one_dequantised_layer(storage: str) -> None:
    """What the storage itself makes while it dequantises one layer counts as one layer's worth."""
    pack, lora = STORAGES[storage], veneer.LoraConfig(r=4, target_modules=["site"])
    with Watch(64 * 64) as watch:
        layer = pack(nn.Linear(64, 64))
        watch.most, watch.alive = 0, {}
        with torch.no_grad():
            codec_for(layer).weight(layer, dtype=torch.float32)
            codec_for(layer).multiply(layer, torch.randn(2, 64))
    assert most_alive(lora, 4, pack) <= max(watch.most, 1)


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("store", ["dense", "quantised"])
@pytest.mark.parametrize("onto", ["dequantised", "original"])
def test_merging_onto_and_into_as_asked(storage: str, store: Any, onto: Any) -> None:
    model, full = adapted(STORAGES[storage]), Stack()
    weights = [place.site.weight.detach() for place in full.layers]  # type: ignore[union-attr]
    kept = [{n: t.clone() for n, t in layer.site.codec.packed(layer.base_layer).items()} for layer in layers_of(model)]
    x = torch.randn(3, 64)
    y = model(x)
    report = model.merge_adapter(onto=onto, store=store, original=full if onto == "original" else None)
    for i, layer in enumerate(layers_of(model)):
        low = layer.change("default").add
        delta = low.dense().detach()
        frozen = layer.frozen_weight()
        target = (weights[i] if onto == "original" else frozen) + delta
        held = layer.base_layer.weight if store == "dense" else layer.site.codec.weight(layer.base_layer)
        assert (type(layer.base_layer) is nn.Linear and codec_for(layer.base_layer).plain) is (store == "dense")
        if store == "dense":
            torch.testing.assert_close(held, target, atol=1e-5, rtol=0)
        told = report.layers[f"layers.{i}.site"]
        assert told.error == pytest.approx(float((held - target).norm() / delta.norm()), rel=1e-2, abs=1e-5)
        assert told.quantisation == pytest.approx(float((held - frozen - delta).norm() / delta.norm()), rel=1e-2, abs=1e-5)
        assert told.quantisation < 1
        assert (told.quantisation < 1e-5) is (store == "dense" and onto == "dequantised")
    assert not torch.equal(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    for layer, old in zip(layers_of(model), kept, strict=True):
        assert all(torch.equal(layer.site.codec.packed(layer.base_layer)[n], t) for n, t in old.items())


@pytest.mark.parametrize(
    ("merge", "advice"),
    [({"store": "quantised"}, "store='dense'"), ({"onto": "original"}, "onto='dequantised'")],
    ids=["quantised", "original"],
)
def test_a_warning_where_quantising_outweighs_what_was_learned(merge: dict[str, Any], advice: str) -> None:
    model = adapted(lambda m: hqq(m, 2), size=0.01)
    if "onto" in merge:
        merge = {**merge, "original": Stack()}
    with pytest.warns(PeftWarning, match=f"2 of 2 layers.*{advice}"):
        report = model.merge_adapter(**merge)
    assert report.layers["layers.0.site"].quantisation > 1 and report.layers["layers.0.site"].verdict == "drowned"
    assert "of the change" in str(report)


def test_while_merged_another_adapter_acts_on_the_packed_weight() -> None:
    model = adapted(NF4)
    x = torch.randn(3, 64)
    y = model(x)
    with model.disable_adapter():
        base = model(x)
    model.add_adapter("other", veneer.LoraConfig(r=2, target_modules=["site"], init_lora_weights=False))
    with model.using("other"):
        other = model(x)
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(x), y)
    with model.using("other"):
        assert torch.equal(model(x), other)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert not any("Linear4bit" in type(m).__name__ for m in model.modules())  # a checkpoint of the merged model holds what is merged
    model.unmerge_adapter()
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), both, atol=1e-5, rtol=1e-5)


def test_a_bias_is_merged_into_both_stores() -> None:
    for store in ("dense", "quantised"):
        model = adapted(lambda m: quanto(m, "qint8"), veneer.LoraConfig(r=4, target_modules=["site"], lora_bias=True))
        y = model(torch.zeros(1, 64))
        model.merge_adapter(store=store)
        torch.testing.assert_close(model(torch.zeros(1, 64)), y, atol=1e-2, rtol=0)


def test_qalora_goes_into_the_zero_points_of_a_grouped_storage() -> None:
    """A change that is the same for all inputs of a group costs no rounding: the integers stay, the zero points move."""
    lora = veneer.LoraConfig(r=4, target_modules=["site"], use_qalora=True, qalora_group_size=32)
    model = adapted(lambda m: hqq(m, 4, group_size=32), lora)
    x = torch.randn(3, 64)
    y, integers = model(x), [layer.base_layer.W_q.clone() for layer in layers_of(model)]
    report = model.merge_adapter(store="quantised")
    assert all(r.error < 1e-5 and r.verdict != "lossy" for r in report.layers.values())
    assert all(torch.equal(layer.base_layer.W_q, w) for layer, w in zip(layers_of(model), integers, strict=True))
    torch.testing.assert_close(model(x), y, atol=1e-4, rtol=1e-4)
    ordinary = adapted(lambda m: hqq(m, 4, group_size=32))
    assert ordinary.merge_adapter(store="quantised").layers["layers.0.site"].error > 0.01


def test_options_of_merging_that_say_nothing_are_refused() -> None:
    plain = adapted(Stack())
    for options in ({"store": "quantised"}, {"store": "dense"}, {"onto": "original"}):
        with pytest.raises(MergeError, match="none of the adapted ones is quantised"):
            plain.merge_adapter(**options)
    model = adapted(NF4)
    with pytest.raises(MergeError, match="Did you mean 'dense'"):
        model.merge_adapter(store="dens")  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="onto='original'"):
        model.merge_adapter(original="somewhere")
    with pytest.raises(veneer.LoadError, match="Nothing says where"):
        model.merge_adapter(onto="original")
    with pytest.raises(veneer.LoadError, match=r"layers\.1\.site\.weight.*shape"):
        model.merge_adapter(
            onto="original", original={"layers.0.site.weight": torch.zeros(64, 64), "layers.1.site.weight": torch.zeros(3, 3)}
        )
    assert not any(layer.merged for layer in layers_of(model))


def test_broken_adapters_leave_the_packed_model_as_it_was() -> None:
    model = adapted(NF4)
    with torch.no_grad():
        layers_of(model)[1].leaf("default", "lora_B").fill_(float("nan"))
    before = [layer.base_layer for layer in layers_of(model)]
    for store in ("dense", "quantised"):
        with pytest.raises(MergeError, match=r"layers\.1\.site: NaNs"):
            model.merge_adapter(store=store)
    assert [layer.base_layer for layer in layers_of(model)] == before


# ---------------------------------------------------------------- other sites


def test_quantised_embeddings() -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    table = nn.Embedding(20, 64)
    four, eight = bnb.nn.EmbeddingNF4(20, 64), bnb.nn.Embedding8bit(20, 64)
    tokens = torch.tensor([[1, 2, 3], [19, 0, 2]])
    for packed in (four, eight):
        packed.load_state_dict(table.state_dict())
        packed = packed.to("cpu")
        base = packed(tokens)
        for config in (veneer.LoraConfig(r=4, target_modules=["0"]), veneer.HiraConfig(r=4, target_modules=["0"])):
            model = veneer.get_peft_model(nn.Sequential(copy.deepcopy(packed)), config)
            assert torch.equal(model(tokens), base)
            move(model)
            y = model(tokens)
            assert not torch.equal(y, base)
            layer = model.get_base_model()[0]
            w = layer.frozen_weight()
            expected = layer.change("default").weight(w).T[tokens]
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
            y.sum().backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            model.merge_adapter()
            assert type(layer.base_layer) is nn.Embedding
            torch.testing.assert_close(model(tokens), y)
            model.unmerge_adapter()
            assert torch.equal(model(tokens), y)


@pytest.mark.parametrize("method", ["lora", "dora", "oft", "hira"])
def test_quantised_convolutions(method: str) -> None:
    from optimum import quanto as library

    configs: dict[str, Any] = {
        "lora": veneer.LoraConfig(r=4), "dora": veneer.LoraConfig(r=4, use_dora=True), "oft": veneer.OFTConfig(oft_block_size=4),
        "hira": veneer.HiraConfig(r=4),
    }  # fmt: skip
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3))
    library.quantize(net, weights=library.qint8)
    library.freeze(net)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    base = net(x)
    config = configs[method]
    config.target_modules = ["0", "2"]
    model = veneer.get_peft_model(net, config)
    torch.testing.assert_close(model(x), base, atol=1e-5, rtol=1e-4)
    move(model)
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    model.merge_adapter(store="quantised")
    assert type(model.get_base_model()[0].base_layer).__name__ == "QConv2d"
    torch.testing.assert_close(model(x), y, atol=0.2, rtol=0)


def test_a_packed_module_with_hooks_runs_as_a_whole() -> None:
    model = adapted(NF4)
    x = torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    y, calls = model(x), []
    grad, x.grad = x.grad, None
    layers_of(model)[0].base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(x), y)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, grad)
    assert calls
    first = layers_of(model)[0]
    torch.testing.assert_close(first(input=x), first(x))


# ---------------------------------------------------------------- bad input


def test_what_a_storage_cannot_carry_is_refused_before_training() -> None:
    from optimum import quanto as library

    lora = veneer.LoraConfig(r=4, target_modules=["0"])
    for weights, activations, freeze, message in (
        (library.qint8, library.qint8, True, r"'0'.*activations.*weights alone"),
        (library.qint8, None, False, r"'0'.*freeze\(model\)"),
    ):
        net = nn.Sequential(nn.Linear(64, 64))
        library.quantize(net, weights=weights, activations=activations)
        if freeze:
            library.freeze(net)
        with pytest.raises(ConfigError, match=message):
            veneer.get_peft_model(net, copy.deepcopy(lora))
    unknown = nn.Sequential(nn.Linear(64, 64))
    unknown[0].weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"int8.*does not know.*bnb 4bit.*hqq"):
        veneer.get_peft_model(unknown, copy.deepcopy(lora))


def test_a_packed_module_is_not_trained_as_a_whole() -> None:
    """LN tuning takes modules of any kind, and would train a copy of packed bytes."""
    with pytest.raises(ConfigError, match=r"layers\.0\.site.*module layer stored as"):
        veneer.get_peft_model(Stack(NF4), veneer.LNTuningConfig(target_modules=["site"]))


def test_options_that_a_packed_weight_cannot_serve_name_what_can() -> None:
    with pytest.raises(ConfigError, match="replace_lora_weights_loftq"):
        veneer.get_peft_model(
            Stack(NF4), veneer.LoraConfig(r=4, target_modules=["0.site"], init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
        )
    with pytest.raises(ConfigError, match="target_modules"):
        veneer.get_peft_model(Stack(NF4), veneer.LoraConfig(r=4, target_modules=[], target_parameters=["0.site.weight"]))
    with pytest.raises(ConfigError, match=r"layers\.1.*quantised.*llm_int8_skip_modules"):
        veneer.get_peft_model(Stack(NF4), veneer.LoraConfig(r=4, target_modules=["0.site"], modules_to_save=["layers.1"]))


# ---------------------------------------------------------------- LoftQ


@pytest.mark.parametrize("storage", ["nf4", "hqq", "quanto"])
def test_loftq_brings_a_quantised_model_nearer_to_the_original(storage: str, tmp_path: Path) -> None:
    full = Stack()
    save_file({n: p.detach() for n, p in full.named_parameters()}, tmp_path / "model.safetensors")
    x = torch.randn(16, 64)
    model = veneer.get_peft_model(Stack(STORAGES[storage]), veneer.LoraConfig(r=16, target_modules=["site"]))
    before = (model(x) - full(x)).norm()
    veneer.replace_lora_weights_loftq(model, str(tmp_path))
    assert (model(x) - full(x)).norm() < 0.75 * before


# ---------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder: Path, storage: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import AutoModelForCausalLM

    from veneer.training.quantise import storage as config

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config(storage, dtype, False))


@pytest.mark.parametrize("storage", ["nf4", "int8", "torchao-int8", "torchao-int4", "torchao-float8", "quanto-int8", "quanto-int4"])
def test_a_model_loaded_with_quantization_config(storage: str, llama: Path, tmp_path: Path) -> None:
    """All linear layers but the head are found, trained, saved, loaded and merged; the status names the storage."""
    base = load(llama, storage)
    ids = torch.arange(12).view(2, 6)
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    status = model.get_model_status()
    assert status.num_adapter_layers == 14
    assert status.quantization_backend == {"nf4": "bnb 4bit", "int8": "bnb 8bit"}.get(storage, storage.partition("-")[0])
    model.train()
    for step in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if not step:
            first = float(loss.detach())
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p -= 0.5 * p.grad
                    p.grad = None
    model.eval()
    logits = model(input_ids=ids).logits.detach()
    assert float(loss.detach()) < first
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(load(llama, storage), tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, logits)
    merged = again.merge_and_unload()
    near = 0.1 if storage == "int8" else 0.03
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, atol=near * float(logits.abs().max()), rtol=0)


def test_a_dense_merged_model_is_saved_as_what_it_is(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(6).view(1, 6)
    for targets, quantised in (("all-linear", False), (["q_proj"], True)):
        model = veneer.get_peft_model(load(llama, "nf4"), veneer.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
        merged = model.merge_and_unload()
        logits = merged(input_ids=ids).logits.detach()
        merged.save_pretrained(tmp_path / str(quantised))
        told = json.loads((tmp_path / str(quantised) / "config.json").read_text(encoding="utf-8"))
        assert ("quantization_config" in told) is quantised
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(quantised), dtype=torch.bfloat16).eval()
        torch.testing.assert_close(again(input_ids=ids).logits, logits, atol=0.02 * float(logits.abs().max()), rtol=0)
        assert codec_for(again.model.layers[0].self_attn.q_proj).plain
        assert codec_for(again.model.layers[0].mlp.up_proj).plain is not quantised


@pytest.mark.parametrize("storage", ["nf4", "int8", "torchao-int8", "quanto-int8"])
def test_save_merged_writes_packed_weights_dense(storage: str, llama: Path, tmp_path: Path) -> None:
    """Those without an adapter too, and a config that says so; a plain model reads it."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(6).view(1, 6)
    model = veneer.get_peft_model(load(llama, storage), veneer.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    logits = model(input_ids=ids).logits.detach()
    save_merged(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(codec_for(m).plain for m in again.modules())
    near = 0.1 if storage == "int8" else 0.03
    torch.testing.assert_close(again(input_ids=ids).logits.to(logits), logits, atol=near * float(logits.abs().max()), rtol=0)


def test_prepare_model_for_kbit_training(llama: Path) -> None:
    model = veneer.prepare_model_for_kbit_training(load(llama, "nf4"))
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n or "embed" in n} == {torch.float32}
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert model.is_gradient_checkpointing
    peft = veneer.get_peft_model(model, veneer.LoraConfig(r=4, target_modules="all-linear")).train()
    ids = torch.arange(6).view(1, 6)
    peft(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in peft.parameters() if p.requires_grad)
    kept = veneer.prepare_model_for_kbit_training(load(llama, "torchao-int8"), use_gradient_checkpointing=False)
    assert {p.dtype for n, p in kept.named_parameters() if "norm" in n} == {torch.bfloat16} and not kept.is_gradient_checkpointing
    with pytest.warns(PeftWarning, match="no quantised layers"):
        veneer.prepare_model_for_kbit_training(nn.Linear(2, 2))


def test_memory_counts_what_is_stored(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    full = stored_bytes(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16))
    assert full == 2 * sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).parameters())
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    assert full - 2 * linear + linear / 2 <= stored_bytes(load(llama, "nf4")) < full - 2 * linear + linear
    scales = 4 * 2 * (4 * 64 + 2 * 96 + 64)
    assert stored_bytes(load(llama, "int8")) == full - linear + scales
