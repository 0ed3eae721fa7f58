"""X-LoRA: a classifier on the base's hidden states gates LoRA adapters, token by token."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer as V
from veneer.errors import ConfigError, LoadError, RouteError, SaveError
from veneer.testing.laws import move

from .golden.bases import CASES, build, call, rebuild
from .test_routes import greedy, llama, prompts

NAMES = ("math", "law.eu", "0")  # any names: with dots, and those of classifier layers


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three experts, of ranks 2, 3, 2; the second stands on the embedding too, and not on v_proj."""
    root = tmp_path_factory.mktemp("experts")
    out = {}
    for i, name in enumerate(NAMES):
        targets = ["q_proj", "embed_tokens"] if i == 1 else ["q_proj", "v_proj"]
        model = V.get_peft_model(llama(), V.LoraConfig(r=2 + i % 2, lora_alpha=4 + i, target_modules=targets, task_type="CAUSAL_LM"))
        move(model, seed=i, size=0.4)
        model.save_pretrained(root / name, save_embedding_layers=False)
        out[name] = str(root / name)
    return out


def xlora(folders: dict[str, str], **fields: Any) -> Any:
    options = {"xlora_depth": 2, "xlora_size": 6, "xlora_dropout_p": 0.0, "adapters": dict(folders), "task_type": "CAUSAL_LM", **fields}
    torch.manual_seed(4)
    model = V.get_peft_model(llama(), V.XLoraConfig(**options))
    move(model, seed=6, size=0.5)
    return model.eval()


def layer_of(model: Any, name: str = "model.layers.0.self_attn.q_proj") -> Any:
    return model.get_base_model().get_submodule(name)


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"softmax_temperature": 0.4, "global_scaling_weight": 1.7},
        {"layerwise_scalings": True, "top_k_lora": 2},
        {"layerwise_scalings": True, "top_k_lora": 2, "enable_softmax_topk": True, "enable_softmax": False},
        {"enable_softmax": False, "xlora_depth": 3, "xlora_dropout_p": 0.3},
        {"xlora_depth": 1, "top_k_lora": 9},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_gates_are_the_classifier_s(folders: dict[str, str], fields: dict[str, Any]) -> None:
    model, ids = xlora(folders, **fields), prompts()
    inputs: dict[str, Tensor] = {}
    layers = {n: m for n, m in model.get_base_model().named_modules() if getattr(m, "attached", None)}
    handles = [m.register_forward_pre_hook(lambda _, a, n=n: inputs.update({n: a[0]})) for n, m in layers.items()]
    outputs: dict[str, Tensor] = {}
    handles += [m.register_forward_hook(lambda _, a, y, n=n: outputs.update({n: y})) for n, m in layers.items()]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    with model.disable_adapter():
        h = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    config = model.peft_config["default"]
    state = {n.partition("layers.")[2]: p for n, p in model.named_parameters() if "classifier" in n}
    keys = sorted({int(n.split(".")[0]) for n in state})
    assert keys == [i * (3 if config.xlora_dropout_p else 2) for i in range(config.xlora_depth)]
    for i, k in enumerate(keys):
        h = (torch.relu(h) if i else h) @ state[f"{k}.weight"].T + state[f"{k}.bias"]
    scalings = h.view(4, 9, -1, 3).expand(4, 9, len(layers), 3)
    if config.enable_softmax:
        scalings = (scalings / config.softmax_temperature).softmax(-1)
    torch.testing.assert_close(model.base_model.get_latest_scalings(), scalings, atol=1e-5, rtol=0)
    for i, (name, layer) in enumerate(layers.items()):
        gates = scalings[:, :, i].clone()
        if config.top_k_lora is not None and config.top_k_lora < 3:
            gates[gates < gates.topk(config.top_k_lora, -1).values[..., -1:]] = 0
        if config.enable_softmax_topk:
            gates = gates.masked_fill(gates == 0, -torch.inf).softmax(-1)
        x = inputs[name]
        expected = layer.base_layer(x)
        for e, expert in enumerate(NAMES):
            if expert in layer.attached:
                d = layer.get_delta_weight(expert)
                y = d[x] if name.endswith("embed_tokens") else x @ d.T
                expected = expected + config.global_scaling_weight * gates[..., e : e + 1] * y
        torch.testing.assert_close(outputs[name], expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_the_first_pass_may_have_experts(folders: dict[str, str]) -> None:
    model, ids = xlora(folders), prompts()
    plain = model(input_ids=ids).logits
    model.base_model.set_scaling_pass_value(None)
    assert model.peft_config["default"].scaling_pass_value == pytest.approx(1 / 3)
    assert not torch.allclose(model(input_ids=ids).logits, plain, atol=1e-3)
    scalings = model.base_model.get_latest_scalings()
    uniform = xlora(folders, enable_softmax=True, softmax_temperature=1e9)  # gates of a third everywhere: what the first pass runs
    hidden = uniform(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    place = layer_of(model).attached["default"].place
    config = model.peft_config["default"]
    torch.testing.assert_close(config._scalings(place, hidden, None).expand_as(scalings), scalings, atol=1e-4, rtol=0)


@torch.no_grad()
def test_golden_scalings() -> None:
    folder, io = CASES / "xlora", load_file(CASES / "xlora" / "io.safetensors")
    with pytest.warns(V.PeftWarning, match="PEFT does not save"):
        model = V.PeftModel.from_pretrained(rebuild(folder), folder / "adapter")
    for name, p in model.named_parameters():
        key = f"weights.internal_xlora_classifier{name.partition('internal_xlora_classifier')[2]}"
        if key in io:
            p.copy_(io[key])
    model(input_ids=io["input.input_ids"], attention_mask=io["input.attention_mask"])
    torch.testing.assert_close(model.base_model.get_latest_scalings(), io["output.scalings"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_alone_in_a_batch_and_mixed(folders: dict[str, str]) -> None:
    model, ids = xlora(folders), prompts()
    whole = model(input_ids=ids).logits
    torch.testing.assert_close(torch.cat([model(input_ids=ids[i : i + 1]).logits for i in range(4)]), whole, atol=1e-5, rtol=0)
    names = ["default", "math", "__base__", "default"]
    mixed = model(input_ids=ids, adapter_names=names).logits
    for i, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else model.using(name):
            torch.testing.assert_close(mixed[i : i + 1], model(input_ids=ids[i : i + 1]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fields", [{}, {"layerwise_scalings": True, "scaling_pass_value": 0.3}], ids=str)
@torch.no_grad()
def test_generate(folders: dict[str, str], fields: dict[str, Any]) -> None:
    """With caches, without, with beams, with tokens taken back: the same as whole forwards of one row."""
    model, ids = xlora(folders, **fields), prompts()
    expected = torch.cat([greedy(model, ids[i : i + 1], 5) for i in range(4)])
    fixed: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        assert torch.equal(model.generate(input_ids=ids, **fixed, **options), expected), options
    padded = torch.nn.functional.pad(ids, (3, 0))
    assert torch.equal(model.generate(input_ids=padded, attention_mask=(padded > 0).long(), **fixed)[:, 3:], expected)
    assert torch.equal(model.generate(input_ids=ids[1:2], prompt_lookup_num_tokens=2, **fixed), expected[1:2])
    beams = model.generate(input_ids=ids, num_beams=3, **fixed)
    for i in range(4):
        assert torch.equal(beams[i : i + 1], model.generate(input_ids=ids[i : i + 1], num_beams=3, **fixed))
    assert not torch.equal(beams, expected)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(RouteError, match="9 tokens of a cache"):
        model(input_ids=ids[:, :1], past_key_values=cache)


# ---------------------------------------------------------------- training


def test_the_classifier_trains_and_the_experts_if_asked(folders: dict[str, str]) -> None:
    model = xlora(folders)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("internal_xlora_classifier.layers" in n for n in trained)
    model.set_adapter("default")
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    both = xlora(folders, use_trainable_adapters=True)
    trained = {n for n, p in both.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2] for n in trained if "lora_A" in n} == {"math", "eu", "0"}
    both.set_adapter("math")
    assert {n for n, p in both.named_parameters() if p.requires_grad} == {n for n in trained if ".math" in n}
    both.set_adapter("default")
    assert trained == {n for n, p in both.named_parameters() if p.requires_grad}
    both.train()
    both(input_ids=prompts(), labels=prompts()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in both.named_parameters() if n in trained)
    assert not [n for n, p in both.named_parameters() if p.grad is not None and n not in trained]


@pytest.mark.parametrize("fields", [{}, {"layerwise_scalings": True, "xlora_dropout_p": 0.5, "use_trainable_adapters": True}], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of the pass without gradients
def test_gradients_under_gradient_checkpointing(folders: dict[str, str], fields: dict[str, Any], reentrant: bool) -> None:
    """Of the classifier too, whose graph stands outside of what is recomputed; its dropout drops the same again."""

    def grads(on: bool) -> dict[str, Tensor]:
        model = xlora(folders, **fields).train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(9)
        loss = model(input_ids=prompts(), labels=prompts(), use_cache=False).loss
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=prompts())
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, again = grads(False), grads(True)
    assert plain.keys() == again.keys() and all(g.any() for g in plain.values())
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], atol=1e-6, rtol=1e-4)


def test_dropout_of_the_classifier_is_drawn_anew_in_training_only(folders: dict[str, str]) -> None:
    model, ids = xlora(folders, xlora_dropout_p=0.5), prompts()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        model.train()
        draws = [(model(input_ids=ids), model.base_model.get_latest_scalings())[1] for _ in range(2)]
        assert not torch.equal(*draws)
        torch.manual_seed(1)
        a = model(input_ids=ids).logits
        torch.manual_seed(1)
        assert torch.equal(model(input_ids=ids).logits, a)


# ---------------------------------------------------------------- files


def test_the_file_is_whole_and_brings_its_experts(folders: dict[str, str], tmp_path: Path) -> None:
    mine = dict(zip(("0", "2", "a"), folders.values(), strict=True))
    model, ids = xlora(mine), prompts()
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == {f"base_model.internal_xlora_classifier.layers.{k}.{n}" for k in (0, 2) for n in ("weight", "bias")}
    with torch.no_grad():
        layer_of(model).lora_A["a"].weight.add_(1)
    model.save_pretrained(tmp_path)  # the experts as they are now, and not those of the first paths
    again: Any = V.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits) and again.active_adapters == ["default"]
    assert sorted(again.peft_config) == ["0", "2", "a", "default"]
    assert not [n for n, p in again.named_parameters() if p.requires_grad]
    given: Any = V.PeftModel.from_pretrained(llama(), tmp_path, adapters=mine)
    assert not torch.equal(given(input_ids=ids).logits, model(input_ids=ids).logits)  # the paths that were given
    alone = tmp_path / "apart" / "alone"
    model.save_pretrained(alone, selected_adapters=["default"])
    assert sorted(p.name for p in alone.iterdir() if p.is_dir()) == []
    assert not torch.equal(V.PeftModel.from_pretrained(llama(), alone)(input_ids=ids).logits, model(input_ids=ids).logits)


def test_relative_paths_of_experts_mean_the_folder_too(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / "experts" / name)
    monkeypatch.chdir(tmp_path)
    model = xlora({n: f"experts/{n}" for n in NAMES})
    model.save_pretrained(tmp_path / "router", selected_adapters=["default"])
    config = V.XLoraConfig.from_pretrained(tmp_path / "router")
    config.adapters = {n: f"../experts/{n}" for n in NAMES}
    config.save_pretrained(tmp_path / "router")
    monkeypatch.chdir("/")
    again = V.PeftModel.from_pretrained(llama(), tmp_path / "router")
    assert torch.equal(again(input_ids=prompts()).logits, model(input_ids=prompts()).logits)


def test_a_file_of_peft_s_that_lacks_layers_runs_once_they_are_filled_in(folders: dict[str, str], tmp_path: Path) -> None:
    """PEFT loses classifier layers whose number is an expert's name."""
    model, ids = xlora({**folders, "2": folders["math"]}), prompts()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if ".layers.0." not in k}, file)
    with pytest.warns(V.PeftWarning, match=r"layers\.0\.weight, .*layers\.0\.bias"):
        again: Any = V.PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(LoadError, match=r"layers\.0\.weight"):
        again(input_ids=ids)
    with pytest.raises(SaveError, match=r"layers\.0\.weight"):
        again.save_pretrained(tmp_path / "no")
    mine = {n: p for n, p in again.named_parameters() if n.endswith(("layers.0.weight", "layers.0.bias")) and "classifier" in n}
    with torch.no_grad():
        mine[next(n for n in mine if n.endswith("weight"))].copy_(whole["base_model.internal_xlora_classifier.layers.0.weight"])
    with pytest.raises(LoadError, match=r"classifier: internal_xlora_classifier\.layers\.0\.bias\."):
        again(input_ids=ids)
    with torch.no_grad():
        mine[next(n for n in mine if n.endswith("bias"))].copy_(whole["base_model.internal_xlora_classifier.layers.0.bias"])
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    again.save_pretrained(tmp_path / "yes")
    save_file({k: v for k, v in whole.items() if ".layers.2." not in k or "bias" in k}, file)
    with pytest.warns(V.PeftWarning, match=r"layers\.2\.weight"):
        V.PeftModel.from_pretrained(llama(), tmp_path)
    other = xlora(folders)  # no expert is called 2, so PEFT cannot have lost it
    other.save_pretrained(tmp_path)
    save_file({k: v for k, v in load_file(file).items() if ".layers.2." not in k}, file)
    with pytest.raises(LoadError, match=r"layers\.2"):
        V.PeftModel.from_pretrained(llama(), tmp_path)


def test_experts_keep_their_order_through_a_file(tmp_path: Path) -> None:
    """They are known to the classifier by their place; PEFT sorts them as texts, so that numbers are put back in order."""
    for given, then in ((("b", "a", "c"), ("b", "a", "c")), (("0", "1", "10", "2"), ("0", "1", "2", "10"))):
        V.XLoraConfig(adapters=dict.fromkeys(given, "x"), hidden_size=4).save_pretrained(tmp_path)
        assert tuple(V.PeftConfig.from_pretrained(tmp_path).adapters) == then
    V.LoraConfig(rank_pattern={"z": 1, "a": 2}).save_pretrained(tmp_path)
    assert list(V.PeftConfig.from_pretrained(tmp_path).rank_pattern) == ["z", "a"]  # the first pattern that fits counts


# ---------------------------------------------------------------- what the model offers


@torch.no_grad()
def test_logs_and_setters(folders: dict[str, str]) -> None:
    model, ids = xlora(folders), prompts()
    tuner = model.base_model
    assert isinstance(tuner, V.XLoraModel) and tuner.get_latest_scalings() is None
    tuner.enable_scalings_logging()
    model(input_ids=ids)
    model(input_ids=ids[:, :4])
    tuner.disable_scalings_logging()
    model(input_ids=ids[:1])
    log = tuner.get_scalings_log()
    assert [tuple(t.shape) for t in log] == [(4, 9, 5, 3), (4, 4, 5, 3)]
    assert tuner.get_latest_scalings().shape == (1, 9, 5, 3)
    log.clear()
    buckets = tuner.get_bucketed_scalings_log()
    assert {n: places for n, (places, _) in buckets.items()} == {9: [0], 4: [1]} and len(tuner.get_scalings_log()) == 2
    tuner.clear_scalings_log()
    assert tuner.get_scalings_log() == []
    all_three = model(input_ids=ids).logits
    tuner.set_topk_lora(1)
    assert not torch.allclose(model(input_ids=ids).logits, all_three, atol=1e-4) and model.peft_config["default"].top_k_lora == 1
    tuner.set_topk_lora(None)
    tuner.set_global_scaling_weight(0.0)
    assert tuner.get_global_scaling_weight() == 0.0
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, base)


def test_a_model_that_has_run_with_gradients_can_be_copied(folders: dict[str, str]) -> None:
    model, ids = xlora(folders), prompts()
    model.base_model.enable_scalings_logging()
    y = model(input_ids=ids).logits
    assert y.requires_grad
    other = copy.deepcopy(model)
    assert torch.equal(other(input_ids=ids).logits, y)
    assert len(other.base_model.get_scalings_log()) == 1 and len(model.base_model.get_scalings_log()) == 1


@torch.no_grad()
def test_threads(folders: dict[str, str]) -> None:
    model, ids = xlora(folders), prompts()
    batches = [ids[:2], ids[2:, :6]]
    expected = [model(input_ids=b).logits for b in batches]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                wrong.extend([i] * (not torch.equal(model(input_ids=batches[i]).logits, expected[i])))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"adapters": None}, "names none"),
        ({"xlora_depth": 0}, "xlora_depth"),
        ({"top_k_lora": 0}, "top_k_lora"),
        ({"softmax_temperature": 0.0}, "softmax_temperature"),
        ({"adapters": {"default": "x"}}, "another name"),
        ({"adapters": {"a": "/no/such/folder"}}, "/no/such/folder"),
    ],
    ids=str,
)
def test_wrong_options(folders: dict[str, str], fields: dict[str, Any], said: str) -> None:
    base = llama()
    with pytest.raises((ConfigError, LoadError, ValueError), match=said):
        V.get_peft_model(base, V.XLoraConfig(**{"adapters": dict(folders), **fields}))
    assert not [m for m in base.modules() if hasattr(m, "base_layer")]


def test_experts_have_to_be_plain_and_where_gates_can_be(folders: dict[str, str], tmp_path: Path) -> None:
    def saved(name: str, model: nn.Module, config: Any) -> str:
        V.get_peft_model(model, config).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    def fresh() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(3, 4, 1), nn.Linear(6, 4))

    dora = saved("dora", fresh(), V.LoraConfig(target_modules=["1"], use_dora=True))
    conv = saved("conv", fresh(), V.LoraConfig(target_modules=["0", "1"]))
    ia3 = saved("ia3", fresh(), V.IA3Config(target_modules=["1"], feedforward_modules=[]))
    for folder, said in ((dora, "'a' does more on '1'"), (conv, r"'0' is a conv one"), (ia3, "IA3")):
        base = fresh()
        with pytest.raises(ConfigError, match=said):
            V.get_peft_model(base, V.XLoraConfig(adapters={"a": folder}, hidden_size=4))
        assert [type(m) for m in base] == [nn.Conv1d, nn.Linear]
    plain = saved("plain", fresh(), V.LoraConfig(target_modules=["1"]))
    with pytest.raises(ConfigError, match="hidden_size"):
        V.get_peft_model(fresh(), V.XLoraConfig(adapters={"a": plain}))
    model: Any = V.get_peft_model(fresh(), V.XLoraConfig(adapters={"a": plain}, hidden_size=5))
    with pytest.raises(RouteError, match="width 4, and `hidden_size` is 5"):
        model(torch.randn(2, 3, 6))
    t5 = {
        "vocab_size": 48,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 1,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    two = saved("two", build("t5_seq2seq_lm", **t5), V.LoraConfig(target_modules=["q"]))
    torch.manual_seed(0)
    model = V.get_peft_model(build("t5_seq2seq_lm", **t5), V.XLoraConfig(adapters={"a": two}))
    with pytest.raises(RouteError, match="encoder-decoder"):
        model(input_ids=prompts(), labels=prompts())


def test_an_expert_that_is_gone_is_missed(folders: dict[str, str]) -> None:
    model = xlora(folders)
    model.delete_adapter("law.eu")
    with pytest.raises(RouteError, match=r"mixes \['law.eu'\]"):
        model(input_ids=prompts())
    with pytest.raises(RouteError, match="Call the PeftModel itself"):
        model.get_base_model()(input_ids=prompts())
    with pytest.raises(ConfigError, match="get_peft_model loads them"):
        V.inject_adapter_in_model(V.XLoraConfig(adapters=dict(folders)), llama())


def test_golden_case_call() -> None:
    """Embeddings in the place of ids, and a task without a cache, run alike."""
    folder = CASES / "xlora"
    io = load_file(folder / "io.safetensors")
    with pytest.warns(V.PeftWarning):
        model = V.PeftModel.from_pretrained(rebuild(folder), folder / "adapter").eval()
    with pytest.raises(LoadError, match="Fill these"):
        call(model, {"call": {"keyword": ["input_ids"], "output": "logits"}}, io)
