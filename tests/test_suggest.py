"""Suggestions: ranks that go where the gradients are, budgets that are kept, memory that is not exceeded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.engine.layer import adapted_layers
from veneer.errors import ConfigError
from veneer.planning.spectra import allot, layer_spectra
from veneer.planning.suggest import _bytes, suggest

transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))


def _llama(**more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, **more,
    })  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _data(rows: int = 2, length: int = 16) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 128, (rows, length), generator=g)} for _ in range(3)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 12)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.second(self.first(x).tanh())
        return {"loss": nn.functional.mse_loss(y, labels), "y": y} if labels is not None else y


def test_gradient_spectra_are_the_singular_values_of_the_weights_gradients() -> None:
    net = Net()
    batches = [{"x": torch.randn(30, 24), "labels": torch.randn(30, 12)} for _ in range(2)]
    layers = {"first": net.first, "second": net.second}
    found, tokens = layer_spectra(net, layers, batches, 4, "gradient")
    assert tokens == 2 * 30 * 24 or tokens == 60
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    whole: dict[str, list[Tensor]] = {n: [] for n in layers}
    for b in batches:
        net.zero_grad()
        net(**b)["loss"].backward()
        for n, m in layers.items():
            whole[n].append(torch.linalg.svdvals(m.weight.grad)[:4])  # type: ignore[arg-type]
    for n, s in whole.items():
        torch.testing.assert_close(torch.tensor(found[n]), torch.stack(s).mean(0), rtol=2e-2, atol=1e-6)


def test_eva_spectra_are_shares_of_the_variance() -> None:
    net = Net()
    x = torch.randn(50, 3) @ torch.randn(3, 24)
    found, _ = layer_spectra(net, {"first": net.first}, [{"x": x}], 5, "eva")
    s = torch.linalg.svdvals(x - x.mean(0)).square()
    torch.testing.assert_close(torch.tensor(found["first"][:3]), (s / s.sum())[:3], rtol=1e-3, atol=1e-5)
    assert sum(found["first"]) == pytest.approx(1, abs=1e-3)  # three directions are all there is


def test_padding_does_not_count() -> None:
    model = _llama()
    ids = _data()[0]["input_ids"]
    layer = {"k": model.model.layers[0].self_attn.k_proj}
    padded = torch.cat([ids, torch.full((2, 9), 7)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 9, dtype=torch.long)], 1)
    a, _ = layer_spectra(model, layer, [{"input_ids": ids}], 4, "eva")
    b, _ = layer_spectra(model, layer, [{"input_ids": padded, "attention_mask": mask}], 4, "eva")
    assert a["k"] == pytest.approx(b["k"], rel=1e-4)


def test_ranks_go_to_what_they_are_worth_within_the_budget() -> None:
    gains = {"a": [9.0, 5.0, 1.0], "b": [8.0, 0.5], "c": [4.0, 4.0, 4.0]}
    costs = {"a": 10, "b": 10, "c": 2}
    assert allot(gains, costs, 36, per_cost=False) == {"a": 2, "b": 1, "c": 3}
    assert allot(gains, costs, 16, per_cost=True) == {"a": 1, "b": 0, "c": 3}
    assert allot(gains, costs, 1, per_cost=True) == {"a": 0, "b": 0, "c": 0}


@pytest.mark.parametrize("search", ["gradient", "eva"])
@pytest.mark.parametrize("share", [0.3, 1.0, 5.0])
def test_a_suggestion_keeps_its_budget_and_trains(search: Any, share: float) -> None:
    model = _llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    one = sum(sum(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    budget = int(share * one)
    found = suggest(model, _data(), "1GB", parameters=budget, search=search)
    assert all(torch.equal(p, before[n]) and p.requires_grad and p.grad is None for n, p in model.named_parameters())
    assert 0.8 * budget < found.plan.trainable_parameters <= budget
    assert found.plan.ok and {n: h.rank for n, h in found.plan.hits.items()} == found.ranks
    assert {h.parameters / h.rank for h in found.plan.hits.values() if h.rank} <= {64.0, 48.0, 96.0}
    adapted = veneer.get_peft_model(model, found.config)
    scalings = {m.scaling["default"] for _, m in adapted_layers(adapted)}
    assert scalings == {2.0}
    assert adapted.get_nb_trainable_parameters()[0] == found.plan.trainable_parameters
    assert [r.partition(":")[0] for r in found.reasons] == ["Targets", "Ranks", "Learning rate", "Method", "Batch", "Time"]
    assert found.seconds_per_step is not None and found.seconds_per_step > 0


@pytest.mark.parametrize("name", ["Albert", "Bert", "Llama"])
@pytest.mark.parametrize("search", ["gradient", "eva", None])
def test_classifiers_and_layers_that_run_again(name: str, search: Any) -> None:
    """The head trains whole, so it gets no rank; ALBERT's one layer runs three times."""
    more = {"embedding_size": 8} if name == "Albert" else {}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, pad_token_id=0, **more
    )
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    batch = {"input_ids": torch.randint(1, 32, (4, 8)), "labels": torch.tensor([0, 1, 1, 0])}
    for parameters in (None, 900):
        found = suggest(model, [batch] if search else None, "1GB", search=search or "gradient", parameters=parameters)
        assert found.plan.ok and {n: h.rank for n, h in found.plan.hits.items()} == found.ranks
        assert not {"classifier", "score"} & {n.rpartition(".")[2] for n in found.ranks}
    adapted = veneer.get_peft_model(model, found.config)
    assert {n for n, p in adapted.named_parameters() if p.requires_grad and "modules_to_save" in n}


def test_the_layer_with_the_gradient_gets_the_ranks() -> None:
    net = Net()
    x = torch.randn(64, 24)
    with torch.no_grad():
        net.second.weight.mul_(1e-4)  # nothing comes back to the first layer
    found = suggest(net, [{"x": x, "labels": torch.randn(64, 12)}], "1GB", parameters=300)
    assert found.ranks == {"second": 5}
    with pytest.raises(ConfigError, match="needs a loss"):
        suggest(net, [{"x": x}], "1GB")


def test_less_memory_means_smaller_batches_then_checkpointing_then_packing_then_no() -> None:
    model = _llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=2, max_position_embeddings=512)
    sizes = {}
    for memory in ("4GB", "60MB", "14MB"):
        found = suggest(model, None, memory, length=256)
        assert found.plan.memory["peak"] <= 0.9 * _bytes(memory)
        assert found.batch_size * found.accumulate == 16
        sizes[memory] = (found.batch_size, found.gradient_checkpointing, found.quantize)
    assert sizes["4GB"] == (16, False, None)
    assert sizes["60MB"][0] < 16 and sizes["60MB"][2] is None
    assert sizes["14MB"][2] == "nf4"
    with pytest.raises(ConfigError, match="too little"):
        suggest(model, None, "5MB", length=256)
    with pytest.raises(ConfigError, match="'24 apples'"):
        suggest(model, None, "24 apples")


def test_sizes_are_read() -> None:
    assert [_bytes(m) for m in ("24GB", "1.5 GiB", "10MB", 7, "300")] == [24 * 10**9, 3 * 2**29, 10**7, 7, 300]


def test_the_command_writes_a_recipe_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("typer")
    from tokenizers import Tokenizer, models, pre_tokenizers

    from veneer.cli import main
    from veneer.cli.train import run

    words = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "rug"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    model, data, recipe = tmp_path / "model", tmp_path / "d.jsonl", tmp_path / "r.yaml"
    _llama().save_pretrained(model)
    tokenizer.save_pretrained(model)
    data.write_text(
        "".join(json.dumps({"text": f"the {a} {b} on a mat"}) + "\n" for a in ("cat", "dog") for b in ("sat", "ran")) * 6, encoding="utf-8"
    )
    words = [
        "suggest",
        "--model",
        str(model),
        "--data",
        str(data),
        "--memory",
        "1GB",
        "--length",
        "8",
        "--parameters",
        "900",
        "--out",
        str(recipe),
    ]
    monkeypatch.setattr("sys.argv", ["veneer", *words])
    capsys.readouterr()  # saving the model above may be the first to import DeepSpeed, which speaks on stdout; the command itself keeps that off it
    with pytest.raises(SystemExit) as done:
        main.main()
    assert not done.value.code
    told = capsys.readouterr()
    assert told.out == recipe.read_text() and "Learning rate" in told.err
    record = run(str(recipe), {"out": str(tmp_path / "out"), "steps": 2})
    assert 700 < record["plan"]["trainable_parameters"] <= 900
    for wrong in (["--memory", "lots"], ["--search", "gradients"], ["--out", str(tmp_path / "nowhere" / "r.yaml")], ["--out", str(recipe)]):
        monkeypatch.setattr("sys.argv", ["veneer", "suggest", "--model", str(model), *wrong])
        with pytest.raises(SystemExit) as done:
            main.main()
        assert done.value.code == 2
    assert recipe.read_text() == told.out


@pytest.mark.slow
def test_a_suggestion_beats_the_default_at_equal_parameters_on_the_demos_data() -> None:
    """SmolLM2 on Python's documentation: 16 steps of 4 x 64 tokens with the same rate, as many parameters; held-out loss."""
    from pydoc_data.topics import topics

    import assets

    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.smollm2())
    names = sorted(topics)
    held = names[::6][:12]
    ids = torch.tensor([i for n in names if n not in held for i in tokenizer(topics[n])["input_ids"]])
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    unseen = torch.tensor([i for n in held for i in tokenizer(topics[n])["input_ids"][:128]])[: 20 * 64].view(20, 64)

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.float32)

    model = load()
    budget = veneer.plan(model, veneer.LoraConfig(r=8), simulate=False).trainable_parameters
    found = suggest(model, [{"input_ids": rows[-8:-4]}, {"input_ids": rows[-4:]}], "8GB", parameters=budget)
    assert 0.99 * budget < found.plan.trainable_parameters <= budget

    def loss_after(config: Any) -> float:
        torch.manual_seed(0)
        model = veneer.get_peft_model(load(), config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=found.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 16)
        for i in range(16):
            optimizer.zero_grad()
            model(input_ids=rows[4 * i : 4 * i + 4], labels=rows[4 * i : 4 * i + 4]).loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            return float(model.eval()(input_ids=unseen, labels=unseen).loss)

    ours, default = loss_after(found.config), loss_after(veneer.LoraConfig(r=8, task_type="CAUSAL_LM"))
    print("suggested", ours, "default", default)
    assert ours < default - 0.05
