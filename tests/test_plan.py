"""Plans: what is hit and missed and why, all problems at once, and predictions against what is then measured."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.errors import ConfigError
from veneer.planning.footprint import LiveBytes, hollow, without_numbers
from veneer.testing.memory import allocated_peak, state_bytes

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))


def _llama(layers: int = 3, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, dtype=dtype, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def _bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
    return transformers.BertForSequenceClassification(config)


# ---------------------------------------------------------------- what is hit


def test_a_plan_says_of_each_module_whether_it_is_hit_and_why_not() -> None:
    config = veneer.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2], rank_pattern={"layers.2.self_attn.q_proj": 7},
        exclude_modules=["layers.0.self_attn.v_proj"],
    )  # fmt: skip
    model = _llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    plan = veneer.plan(model, config, batch_size=2, length=8)
    assert plan.ok and not plan.problems
    assert set(plan.hits) == {"model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.v_proj"}
    assert plan.hits["model.layers.2.self_attn.q_proj"].rank == 7
    assert plan.hits["model.layers.2.self_attn.q_proj"].parameters == 7 * 128
    assert "excluded" in plan.missed["model.layers.0.self_attn.v_proj"]
    assert "layers_to_transform" in plan.missed["model.layers.1.self_attn.q_proj"]
    assert "cannot adapt a LlamaRMSNorm" in plan.missed["model.norm"]
    real = {n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    assert real == set(plan.hits) | set(plan.missed)
    assert all(torch.equal(p, before[n]) and not p.is_meta for n, p in model.named_parameters())  # the model is as it was
    assert config.rank_pattern == {"layers.2.self_attn.q_proj": 7}
    adapted = veneer.get_peft_model(model, config)
    assert (plan.trainable_parameters, plan.all_parameters) == adapted.get_nb_trainable_parameters()
    again = veneer.plan(adapted, batch_size=2, length=8)
    assert again.hits == plan.hits and again.memory == plan.memory and again.flops == plan.flops


def test_weights_on_the_meta_device_give_the_same_plan() -> None:
    config = veneer.LoraConfig(r=4, target_modules="all-linear")
    model = _llama()
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(model.config)
    empty.tie_weights()
    a, b = veneer.plan(model, config, batch_size=2, length=16), veneer.plan(empty, config, batch_size=2, length=16)
    assert a.memory == b.memory and a.flops == b.flops and a.hits == b.hits


@pytest.mark.parametrize(
    "name", ["LoraConfig", "LoHaConfig", "OFTConfig", "VeraConfig", "IA3Config", "PromptTuningConfig", "LNTuningConfig"]
)
def test_every_kind_of_method_has_a_plan(name: str) -> None:
    fields: dict[str, Any] = {
        "OFTConfig": {"r": 0, "oft_block_size": 4}, "PromptTuningConfig": {"num_virtual_tokens": 5}, "VeraConfig": {"r": 4},
    }.get(name, {})  # fmt: skip
    config = getattr(veneer, name)(**fields, task_type="CAUSAL_LM")
    plan = veneer.plan(_llama(), config, batch_size=2, length=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = veneer.get_peft_model(_llama(), config)
    assert plan.ok and not plan.notes
    assert (plan.trainable_parameters, plan.all_parameters) == adapted.get_nb_trainable_parameters()
    assert plan.memory["peak"] > plan.memory["weights"] and plan.flops["step"] > 0


# ---------------------------------------------------------------- what it costs


def _loss(model: Any, ids: Tensor, labels: Tensor) -> Any:
    return lambda: model(input_ids=ids, labels=labels).loss.backward()


def _against(model: Any, config: Any, rows: int, length: int, checkpointing: bool = False) -> dict[str, float]:
    """Prediction / measurement of each part."""
    base = model.base_model if hasattr(model, "classifier") else model
    plan = veneer.plan(model, config, batch_size=rows, length=length, gradient_checkpointing=checkpointing)
    adapted = veneer.get_peft_model(model, config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted.prepare_model_for_gradient_checkpointing(model)
    ids = torch.randint(0, 300, (rows, length))
    step = _loss(adapted, ids, ids if base is model else torch.zeros(rows, dtype=torch.long))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])
    step()
    optimizer.step()
    optimizer.zero_grad()
    peak = allocated_peak(step)
    gradients = sum(p.grad.nbytes for p in adapted.parameters() if p.grad is not None)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*adapted.parameters(), *adapted.buffers())}
    weights, optimizer_bytes, m = sum(storages.values()), state_bytes(optimizer), plan.memory
    return {
        "weights": m["weights"] / weights, "gradients": m["gradients"] / gradients, "optimizer": m["optimizer"] / optimizer_bytes,
        "activations": m["activations"] / (peak - gradients), "peak": m["peak"] / (weights + optimizer_bytes + peak),
    }  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_as_predicted(dtype: torch.dtype, checkpointing: bool) -> None:
    config = veneer.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    ratios = _against(_llama(dtype=dtype), config, 2, 64, checkpointing)
    assert all(0.9 < r < 1.1 for r in ratios.values()), ratios


def test_memory_of_an_encoder_is_as_predicted() -> None:
    ratios = _against(_bert(), veneer.LoraConfig(r=4, target_modules=["query", "dense"], task_type="SEQ_CLS"), 4, 32)
    assert all(0.85 < r < 1.15 for r in ratios.values()), ratios


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_memory_of_real_models_is_within_fifteen_percent(name: str, dtype: torch.dtype) -> None:
    import assets

    auto = transformers.AutoModelForCausalLM if name == "smollm2" else transformers.AutoModelForSequenceClassification
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_pretrained(getattr(assets, name)(), dtype=dtype)
    task = "CAUSAL_LM" if name == "smollm2" else "SEQ_CLS"
    ratios = _against(model, veneer.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.1, task_type=task), 2, 128)
    print(name, dtype, ratios)
    assert all(0.85 < r < 1.15 for r in ratios.values()), ratios


def test_flops_are_those_of_the_products() -> None:
    """Two for each multiplication: forward x Wᵀ of each layer and both thin ones; backward the input's gradient, and the factors' two."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    rows, r = 5, 3
    plan = veneer.plan(
        model, veneer.LoraConfig(r=r, target_modules=["2"]), loss=lambda m: m(torch.zeros(rows, 16)).sum()
    )  # fmt: skip
    thin = 2 * rows * r * (32 + 8)
    assert plan.flops["forward"] == 2 * rows * (16 * 32 + 32 * 8) + thin
    assert plan.flops["backward"] == thin + 2 * rows * r * 8  # nothing below needs a gradient; y's goes through B once more


def test_live_bytes_counts_storages_while_they_live() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100).T
        assert live.now == 4000
        c = a + 1
        del a
        assert live.now == 8000  # the view holds it
        del b
        assert live.now == 4000 and live.peak == 8000
        c.add_(1)
    del c
    assert live.now == 0


def test_a_hollow_model_holds_no_memory_and_keeps_what_is_tied() -> None:
    model = _llama()
    with without_numbers():
        shape: Any = hollow(model)
        assert shape.lm_head.weight is shape.model.embed_tokens.weight
    assert torch.isfinite(model.lm_head.weight).all()


# ---------------------------------------------------------------- what is wrong


def test_every_problem_of_a_config_comes_at_once() -> None:
    config = veneer.LoraConfig(
        target_modules=["q_prj", "v_proj", "norm"], modules_to_save=["lm_hed"], rank_pattern={"v_prooj": 3, "v_proj": 2},
        alpha_pattern={"o_proj": 3}, exclude_modules=["layer.9"],
    )  # fmt: skip
    plan = veneer.plan(_llama(), config, batch_size=1, length=4)
    found = [(p.field, p.text) for p in plan.problems]
    wanted = [
        ("target_modules", "Target module 'model.norm'"), ("target_modules", "Did you mean 'q_proj'"), ("modules_to_save", "Did you mean 'lm_head'"),
        ("exclude_modules", "excludes nothing"), ("rank_pattern", "Did you mean 'v_proj'"), ("alpha_pattern", "'o_proj' fits none"),
    ]  # fmt: skip
    assert len(found) == len(wanted)
    for (field, text), (wanted_field, part) in zip(found, wanted, strict=True):
        assert field == wanted_field and part in text
    assert not plan.ok
    assert set(plan.hits) == {f"model.layers.{i}.self_attn.v_proj" for i in range(3)}  # what is right is planned all the same
    assert plan.config.rank_pattern == {"v_proj": 2}


def test_problems_that_only_attaching_finds_are_problems_too() -> None:
    plan = veneer.plan(_llama(), veneer.LoraConfig(r=8, target_modules=["q_proj"], use_qalora=True, qalora_group_size=7), length=4)
    assert not plan.ok or plan.hits  # either refused in words or planned
    with pytest.raises(ConfigError, match="needs a config"):
        veneer.plan(_llama())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    _llama().save_pretrained(folder)
    (folder / "model.safetensors").unlink()  # the config is enough
    return folder


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    from veneer.cli import main

    monkeypatch.setattr("sys.argv", ["veneer", "plan", *words])
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as done:
        main.main()
    return int(done.value.code or 0)


def test_the_command_plans_without_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("method_fields: {r: 4}\nbatch_size: 2\nlength: 16\nrates: {decay: 0.9}\nfreezing: {every: 3}\n", encoding="utf-8")
    assert _run(monkeypatch, "--model", str(folder), "--config", str(recipe), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["trainable_parameters"] == sum(h["parameters"] for h in found["hits"].values()) > 0
    assert found["memory"]["weights"] > 0 and found["memory"]["peak"] > found["memory"]["activations"] > 0
    assert _run(monkeypatch, "--model", str(folder), "--method", "ia3") == 0
    shown = capsys.readouterr().out
    assert _run(monkeypatch, "--model", str(folder), "--method", "prompt-tuning", "--num-virtual-tokens", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["memory"]["peak"] > 0  # the step runs, with the loss that the prompt leaves
    same = ["--lr", "1e-3", "--steps", "5", "--packing", "rows", "--out", str(tmp_path / "out"), "--r", "4"]
    assert _run(monkeypatch, str(recipe), "--model", str(folder), *same) == 0  # what `veneer train` takes
    assert _run(monkeypatch, "--model", str(folder), "--warmup", "5") == 2
    assert "share of the steps" in capsys.readouterr().out
    assert "IA3: hit" in shown and "IA3Config cannot adapt a LlamaRMSNorm" in shown and "GFLOP" in shown


def test_the_command_tells_all_problems_of_a_recipe_and_exits_with_two(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    recipe, data = tmp_path / "r.yaml", tmp_path / "d.jsonl"
    data.write_text('{"txt": "a"}\n', encoding="utf-8")
    recipe.write_text(
        "method_fields: {r: 4, target_modules: [q_prj, v_proj], lora_dropout: 3, biass: all}\nbatch_size: 0\ndtype: bfloat\n"
        "optimizer: adamv\nrates: {decay: -1}\nclipping: {norm: 1, pattrns: {}}\nfreezing: [{step: 0, layers: [9]}]\n",
        encoding="utf-8",
    )
    assert _run(monkeypatch, "--model", str(folder), "--config", str(recipe), "--data", str(data), "--dtype", "float32") == 2
    shown = capsys.readouterr().out
    for part in (
        "batch_size has to be positive",
        "'adamw'",
        "decay has to be",
        "'patterns'",
        "layers [9]",
        "'q_proj'",
        "lora_dropout",
        "'bias'",
        "'txt'",
    ):
        assert part in shown, part
    assert _run(monkeypatch, "--model", str(folder), "--config", str(recipe)) == 2
    assert "Did you mean 'bfloat16'" in capsys.readouterr().out


def test_the_command_takes_an_adapters_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    veneer.get_peft_model(_llama(), veneer.LoraConfig(r=5, target_modules=["o_proj"], task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "a"
    )
    assert _run(monkeypatch, "--model", str(folder), "--config", str(tmp_path / "a"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {h["rank"] for h in found["hits"].values()} == {5} and len(found["hits"]) == 3
    assert _run(monkeypatch, "--model", str(folder), "--config", str(tmp_path / "none.json")) == 2
    assert "There is no config" in capsys.readouterr().err


def test_packed_weights_are_counted_packed(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = []
    for more in ([], ["--quantize", "nf4"]):
        assert _run(monkeypatch, "--model", str(folder), "--dtype", "bfloat16", "--json", *more) == 0
        sizes.append(json.loads(capsys.readouterr().out)["memory"]["weights"])
    linear = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert sizes[0] - sizes[1] == pytest.approx(linear * (16 - 4.127) / 8, rel=1e-3)
