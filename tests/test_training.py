"""`veneer train`: data, loss, a run with its record, exact resuming, and what bad input gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

from veneer.cli.train import method_fields, run  # noqa: E402
from veneer.errors import ConfigError  # noqa: E402
from veneer.training.attention import attend_as_before, attend_by_rows, rows_of  # noqa: E402
from veneer.training.data import (  # noqa: E402
    Example,
    check_columns,
    classification_examples,
    collate,
    end_to_end,
    language_examples,
    pack,
    read_rows,
    whole,
)
from veneer.training.loss import HeadlessLoss, chunked_cross_entropy, keeps_rows_apart  # noqa: E402
from veneer.training.prepare import prepare  # noqa: E402
from veneer.training.recipe import Recipe  # noqa: E402

from .words import WORDS, save_word_llama, word_tokenizer  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}{{ m['content'] }}{{ ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_word_llama(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    lines = ["the cat sat on the mat", "the dog ran on a rug", "hello how are you", "fine the cat ran"] * 12
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in lines), encoding="utf-8")
    return path


def _given(model_folder: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    base = {"model": str(model_folder), "data": str(data), "out": str(out), "steps": 6, "batch_size": 2, "length": 8, "learning_rate": 1e-2}
    return {**base, "method_fields": {"r": 4, "lora_dropout": 0.1}, "dtype": "float32", **more}


# ---------------------------------------------------------------- data


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": "a b", "label": "x"}, {"text": "c, d", "label": "y"}]
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "d.csv", index=False)
    frame.to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n", encoding="utf-8")
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    for ending in ("csv", "parquet", "jsonl", "json"):
        assert read_rows(str(tmp_path / f"d.{ending}")) == rows
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one.txt").write_text("plain text", encoding="utf-8")
    assert read_rows(str(tmp_path / "sub")) == [{"text": "plain text"}]
    assert len(read_rows(str(tmp_path))) == 9  # a folder is all of its files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "is empty"),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "line 2"),
        ("latin.txt", b"\xff\xfe\xfa", "cannot be read"),
        ("empty.csv", "", "is empty"),
        ("list.jsonl", '{"text": "a"}\n[1, 2]\n', "row 2 has to be a table"),
        ("broken.parquet", "PAR1", "cannot be read as .parquet"),
    ],
)
def test_data_that_cannot_be_read_say_why(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("lines.jsonl", '{"text": "a\u2028b\u0085c"}\r\n{"text": "d"}\n', ["a\u2028b\u0085c", "d"]),
        ("mark.jsonl", '\ufeff{"text": "a"}', ["a"]),
        ("mark.txt", "\ufeffa", ["a"]),
        ("numbers.csv", "text\n007\nNone\n1.50\n", ["007", "None", "1.50"]),
        ("lines.ndjson", '{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ("LINES.JSONL", '{"text": "a"}\n', ["a"]),
        ("tabs.tsv", "text\tlabel\na, b\tx\n", ["a, b"]),
    ],
)
def test_texts_are_read_as_they_stand(tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert [r["text"] for r in read_rows(str(tmp_path / name))] == texts


def test_parquet_gives_chats_and_whole_numbers(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine yes"}]
    pandas.DataFrame({"messages": [turns, turns], "label": pandas.array([1, None], dtype="Int64")}).to_parquet(tmp_path / "chat.parquet")
    rows = read_rows(str(tmp_path / "chat.parquet"))
    assert rows == [{"messages": turns, "label": 1}, {"messages": turns, "label": None}]
    assert language_examples(rows, tokenizer, "chat") == language_examples([{"messages": turns}] * 2, tokenizer, "chat")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": 5}, "messages are a list of turns"),
        ({"text": "the \ud83d cat"}, r"data: row 2: '\\ud83d' in 'the '… is half a character"),
        ({"text": "the \ud83d cat", "label": "a"}, "half a character"),
        ({"text": " ", "label": "a"}, "row 2 has no tokens"),
    ],
)
def test_rows_that_no_tokenizer_takes_are_named(row: dict[str, Any], message: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE if "messages" in row else None)
    good = {"text": "the cat", "label": "a", "messages": [{"role": "user", "content": "a"}]}
    rows = [{k: good[k] for k in row}, row]
    with pytest.raises(ConfigError, match=message):
        if "label" in row:
            classification_examples(rows, tokenizer, 8, ["a"], "data")
        else:
            language_examples(rows, tokenizer, "data")


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"train\.jsonl"):
        read_rows(str(tmp_path / "trian.jsonl"))


def test_columns_are_checked_before_anything_else() -> None:
    with pytest.raises(ConfigError, match="'txt'"):
        check_columns([{"txt": "a"}], [["text"]], "data")
    with pytest.raises(ConfigError, match="row 2 has nothing in the column 'text'"):
        check_columns([{"text": "a"}, {"text": None}], [["text"]], "data")


def test_packing_loses_no_token() -> None:
    examples = [Example([1, 2, 3], [True, True, True]), Example([4, 5], [False, True]), Example([6, 7, 8, 9], [True] * 4)]
    blocks = pack(examples, 4, pad=0)
    assert [b["input_ids"] for b in blocks] == [[1, 2, 3, 4], [5, 6, 7, 8]]  # the last, lone token predicts nothing
    assert [b["labels"] for b in blocks] == [[1, 2, 3, -100], [5, 6, 7, 8]]
    (block,) = pack(examples[:1], 5, pad=0)
    assert block == {"input_ids": [1, 2, 3, 0, 0], "labels": [1, 2, 3, -100, -100], "attention_mask": [1, 1, 1, 0, 0]}


def test_only_what_the_assistant_says_counts(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    try:
        chat = [
            {"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes you"},
            {"role": "user", "content": "how are you"}, {"role": "assistant", "content": "fine"},
        ]  # fmt: skip
        (example,) = language_examples([{"messages": chat}], tokenizer, "data")
        said = [WORDS[i] for i, c in zip(example.ids, example.counts, strict=True) if c]
        assert said == ["yes", "you", "<eos>", "fine", "<eos>"]
        (pair,) = language_examples([{"prompt": "hello", "completion": "yes"}], tokenizer, "data")
        assert [WORDS[i] for i, c in zip(pair.ids, pair.counts, strict=True) if c] == ["yes", "<eos>"]
    finally:
        tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        language_examples([{"messages": chat}], tokenizer, "data")
    (pair,) = language_examples([{"prompt": "hello how", "completion": "yes"}], tokenizer, "data")
    assert pair.counts == [False, False, True, True]


def test_answers_of_a_template_that_writes_earlier_turns_otherwise(tokenizer: Any) -> None:
    """Like Qwen3's, which writes thoughts into the last turn alone; and like others, which refuse messages without a user."""
    refuse = "{% if messages[-1]['role'] == 'system' %}{{ raise_exception('no user') }}{% endif %}"
    tokenizer.chat_template = refuse + TEMPLATE.replace(
        "{{ m['content'] }}", "{{ 'on ' if loop.last and m['role'] != 'user' }}{{ m['content'] }}"
    )
    turns = [("system", "no"), ("user", "hello"), ("assistant", "yes you"), ("user", "how are you"), ("assistant", "fine")]
    chat = [{"role": r, "content": c} for r, c in turns]
    try:
        found = language_examples([{"messages": chat}], tokenizer, "data")
        said = [[WORDS[i] for i, c in zip(e.ids, e.counts, strict=True) if c] for e in found]
        assert said == [["on", "yes", "you", "<eos>"], ["on", "fine", "<eos>"]]
        with pytest.raises(ConfigError, match=r"data: row 1: .*no user"):
            language_examples([{"messages": [chat[0], chat[2]]}], tokenizer, "data")
        with pytest.raises(ConfigError, match=r"row 1: messages are a list of turns"):
            language_examples([{"messages": [{"content": "x"}]}], tokenizer, "data")
    finally:
        tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"row 1 has no text in the column 'text', but 3"):
        language_examples([{"text": 3}], tokenizer, "data")


def test_batches_are_padded_where_they_have_to_be() -> None:
    batch = collate(9)([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100]]  # nothing predicts the first
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("rows", [1, 128, 300])
def test_the_loss_in_chunks_is_the_loss(rows: int) -> None:
    torch.manual_seed(0)
    w, b = torch.randn(50, 16), torch.randn(50)
    labels = torch.randint(0, 50, (rows,))
    labels[::7] = -100
    grads: list[Tensor] = []
    for chunked in (True, False):
        h = torch.randn(rows, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if chunked:
            total, count = chunked_cross_entropy(h, w, b, labels)
            assert count == int((labels != -100).sum())
        else:
            reference = nn.functional.cross_entropy(h @ w.T + b, labels, reduction="sum", ignore_index=-100)
            torch.testing.assert_close(total, reference)
            total = reference
        (total * 0.5).backward()
        assert h.grad is not None
        grads.append(h.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)


def test_the_headless_loss_is_the_models_own_or_is_not_used(model_folder: Path) -> None:
    import veneer

    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules="all-linear"))
    headless = HeadlessLoss.of(model)
    assert headless is not None
    ids = torch.randint(0, len(WORDS), (2, 7))
    total, count = headless(model, {"input_ids": ids, "labels": ids})
    torch.testing.assert_close(total / count, model(input_ids=ids, labels=ids).loss)
    model(input_ids=ids)  # the head is back in its place
    trained = veneer.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(model_folder), veneer.LoraConfig(r=2, target_modules=["lm_head"])
    )
    assert HeadlessLoss.of(trained) is None  # a head that trains has to be run
    shadowed = veneer.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(model_folder),
        veneer.ShadowConfig(auxiliary_loss_weight=1e-3, task_type="CAUSAL_LM"),  # type: ignore[arg-type]
    )
    assert HeadlessLoss.of(shadowed) is None  # whose loss has a part of the shadow's


@pytest.mark.parametrize(
    ("name", "options", "fields"),
    [
        ("Phi", {}, {"bias": "all"}),  # the head's bias trains
        ("Gemma2", {"head_dim": 8, "initializer_range": 0.3}, {}),  # the logits are capped
        ("Mixtral", {"num_local_experts": 4, "output_router_logits": True}, {}),  # a loss that balances experts
        ("Granite", {"logits_scaling": 8.0}, None),  # scaling is the same before the head
    ],
)
def test_a_loss_that_is_more_than_heads_is_the_models(name: str, options: dict[str, Any], fields: dict[str, Any] | None) -> None:
    import veneer

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, **options
    )
    adapter = veneer.LoraConfig(r=2, target_modules=["q_proj"], **(fields or {}))
    model = veneer.get_peft_model(getattr(transformers, f"{name}ForCausalLM")(config), adapter)
    assert (HeadlessLoss.of(model) is None) is (fields is not None)


@pytest.mark.parametrize("by_rows", [False, True])
def test_rows_end_to_end_are_each_as_if_alone(model_folder: Path, by_rows: bool) -> None:
    """Losses and gradients; and laid end to end without positions they would see each other."""
    import veneer

    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    assert not by_rows or attend_by_rows(base)
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()
    headless = HeadlessLoss.of(model)
    assert headless is not None and keeps_rows_apart(model, headless)
    examples = [Example([5, 6, 8, 10, 5, 12], [False, False] + [True] * 4), Example([7, 9, 11], [True] * 3), Example([4], [True])]
    rows = whole(examples, 5)
    assert [r["input_ids"] for r in rows] == [[5, 6, 8, 10, 5], [7, 9, 11]]  # cut, and a lone token predicts nothing
    batch = end_to_end(rows)
    assert batch["labels"].tolist() == [[-100, -100, 8, 10, 5, -100, 9, 11]]

    def gradients(total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad]))

    alone = [headless(model, {"input_ids": torch.tensor([r["input_ids"]]), "labels": torch.tensor([r["labels"]])}) for r in rows]
    h = headless.hidden(model, {k: v for k, v in batch.items() if k != "labels"})
    pieces = [(h[:, :5], batch["labels"][:, :5]), (h[:, 5:], batch["labels"][:, 5:])]
    for (piece, labels), (expected, count) in zip(pieces, alone, strict=True):
        got, n = chunked_cross_entropy(piece[0, :-1], headless.head.weight, None, labels[0, 1:])
        assert n == count and abs((got - expected).item()) < 1e-5
    total, count = headless(model, batch)
    assert count == sum(n for _, n in alone)
    for got, expected in zip(gradients(total), gradients(alone[0][0] + alone[1][0]), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    seen, _ = headless(model, {k: v for k, v in batch.items() if k != "position_ids"})
    assert abs((seen - total).item()) > 1e-4


def test_rows_kept_apart_by_a_mask_are_attended_to_one_by_one(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    base.model.layers[0].self_attn.q_proj.weight.data.mul_(3)
    batch = end_to_end(whole([Example([5, 6, 8, 10, 5], [True] * 5), Example([7, 9, 11], [True] * 3)], 5))
    given = {k: v for k, v in batch.items() if k != "labels"} | {"use_cache": False}
    plain = {"input_ids": torch.tensor([[5, 6, 8], [7, 9, 1]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    expected = [base(**x).logits for x in (given, plain)], base.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)

    seen: list[tuple[int, bool]] = []
    own = torch.nn.functional.scaled_dot_product_attention

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((q.shape[2], kwargs.get("attn_mask") is None and kwargs.get("is_causal")))
        return own(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    assert attend_by_rows(base) and not attend_by_rows(base)
    torch.testing.assert_close(base(**given).logits, expected[0][0], atol=1e-5, rtol=1e-5)
    assert seen == [(5, True), (3, True)] * len(base.model.layers)
    torch.testing.assert_close(base(**plain).logits, expected[0][1])
    assert torch.equal(base.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False), expected[1])
    attend_as_before(base)
    seen.clear()
    base(**given)
    assert seen == [(8, False)] * len(base.model.layers)


def test_a_mask_that_says_more_than_rows_stays_a_mask() -> None:
    def mask(*lengths: int) -> Tensor:
        return torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool().view(1, 1, sum(lengths), -1)

    assert rows_of(mask(4, 1, 3)) == [4, 1, 3]
    assert rows_of(mask(6)) is None
    both = mask(4, 3)
    windowed, padded, forward = both.clone(), both.clone(), both.clone()
    windowed[0, 0, 3, 0] = False
    padded[0, 0, :, 6] = False
    forward[0, 0, 0, 1] = True
    for other in (windowed, padded, forward, both.float(), both.expand(2, 1, 7, 7), both[:, :, :, :6]):
        assert rows_of(other) is None


def test_methods_that_look_at_rows_are_padded(model_folder: Path) -> None:
    import veneer

    for config in (
        veneer.PolyConfig(r=2, n_skills=2, target_modules="all-linear"),
        veneer.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        veneer.LoraConfig(r=2, target_modules="all-linear", alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
    ):
        model = veneer.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(model_folder), config)
        headless = HeadlessLoss.of(model)
        assert headless is None or not keeps_rows_apart(model, headless)


# ---------------------------------------------------------------- runs


def test_packing_rows_learns_what_padded_rows_do(model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"packing": "rows", "steps": 8, "method_fields": {"r": 4}, "batch_size": 3}
    flat = run(None, _given(model_folder, data, tmp_path / "flat", **given))
    monkeypatch.setattr("veneer.training.trainer.keeps_rows_apart", lambda *_: False)
    padded = run(None, _given(model_folder, data, tmp_path / "padded", **given))
    assert flat["after"]["loss"] == pytest.approx(padded["after"]["loss"], abs=1e-4)
    assert [x["loss"] for x in flat["losses"]] == pytest.approx([x["loss"] for x in padded["losses"]], abs=1e-4)
    assert flat["plan"]["train_rows"] + flat["plan"]["held_out_rows"] == 48  # a row each
    with pytest.raises(ConfigError, match=r"Unknown packing 'row'.*Did you mean 'rows'"):
        run(None, _given(model_folder, data, tmp_path / "no", packing="row"))


def test_a_run_learns_and_leaves_everything_behind(model_folder: Path, data: Path, tmp_path: Path) -> None:
    import veneer

    out = tmp_path / "out"
    record = run(None, _given(model_folder, data, out, steps=60))
    assert record["after"]["perplexity"] < 0.8 * record["before"]["perplexity"]
    assert json.loads((out / "run.json").read_text()) == json.loads(json.dumps(record))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(record["losses"]) == 60
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    model = veneer.PeftModel.from_pretrained(base, out)
    ids = torch.tensor([[5, 6, 8, 10, 5, 12]])
    tuned = model(input_ids=ids, labels=ids).loss
    with model.disable_adapter():
        assert tuned < model(input_ids=ids, labels=ids).loss
    with pytest.raises(ConfigError, match="holds an adapter already"):
        run(None, _given(model_folder, data, out))


@pytest.mark.parametrize("method", ["lora", "adalora", "pvera", "p_tuning", "prefix_tuning"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(method: str, model_folder: Path, data: Path, tmp_path: Path) -> None:
    """AdaLoRA is stopped after its first cut of ranks, which files lack, and before its last; PVeRA draws from generators of its own; files of
    prompts that a network makes lack the network."""
    from safetensors.torch import load_file

    fields = {
        "lora": {"r": 4},
        "adalora": {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 6},
        "pvera": {"r": 4, "generator_seed": 3, "d_initial": 1.0},
        "p_tuning": {"num_virtual_tokens": 2},
        "prefix_tuning": {"num_virtual_tokens": 2, "prefix_projection": True},
    }
    given = {"steps": 6, "save_every": 3, "method": method, "method_fields": fields[method]}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    full = run(None, _given(model_folder, data, whole, **given))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "checkpoint-6")
    for name in ("adapter_model.safetensors", "adapter_config.json", "run.json"):
        (cut / name).unlink()
    resumed = run(None, _given(model_folder, data, cut, **given, resume=True))
    assert (resumed["losses"], resumed["resumed_at"]) == (full["losses"], 3)
    assert (cut / "adapter_config.json").read_text() == (whole / "adapter_config.json").read_text()  # AdaLoRA's ranks
    a, b = load_file(whole / "adapter_model.safetensors"), load_file(cut / "adapter_model.safetensors")
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_accumulated_batches_count_by_their_labels_whatever_the_model_takes(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3 says of itself that its forward takes no count of labels."""
    shape: dict[str, Any] = {"packing": "rows", "method_fields": {"r": 4}}
    whole = run(None, _given(model_folder, data, tmp_path / "whole", **shape, batch_size=4))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    parts = run(None, _given(model_folder, data, tmp_path / "parts", **shape, batch_size=2, accumulate=2))
    assert [x["loss"] for x in parts["losses"]] == pytest.approx([x["loss"] for x in whole["losses"]], rel=1e-5)


def test_a_run_whose_loss_is_no_number_ends_there(model_folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"Step 3 had a loss of nan.*lower --learning-rate"):
        run(None, _given(model_folder, data, out, steps=30, learning_rate=1e30, save_every=1))
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"checkpoint-1", "checkpoint-2"}


def test_rows_that_are_left_out_are_said(model_folder: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    data.write_text("".join(json.dumps({"prompt": "the cat " * n, "completion": "sat on"}) + "\n" for n in (1, 2, 20) * 4))
    for packing, left in (("rows", 4), ("stream", 0)):
        plan = run(None, _given(model_folder, data, tmp_path / packing, packing=packing, steps=1))["plan"]
        assert plan["left_out_rows"] == left
        assert ("4 rows are left out" in capsys.readouterr().err) is bool(left)
    assert plan["train_rows"]


def test_epochs_are_whole_passes_over_the_data(model_folder: Path, data: Path, tmp_path: Path) -> None:
    rows = data.read_text().splitlines(keepends=True)[:9]
    data.write_text("".join(rows))
    shape: dict[str, Any] = {"steps": None, "packing": "rows", "eval_fraction": 0.0}
    assert run(None, _given(model_folder, data, tmp_path / "a", **shape, epochs=3, batch_size=8))["plan"]["steps"] == 6
    assert run(None, _given(model_folder, data, tmp_path / "b", **shape, epochs=2, batch_size=2, accumulate=2))["plan"]["steps"] == 6
    assert run(None, _given(model_folder, data, tmp_path / "c", **shape, epochs=0.2))["plan"]["steps"] == 1


def test_a_run_goes_on_from_the_last_whole_checkpoint(model_folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = _given(model_folder, data, out, save_every=3)
    full = run(None, given)
    with pytest.raises(ConfigError, match="6 steps on, and the recipe asks for 6"):
        run(None, {**given, "resume": True})
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (out / name).unlink()
    with pytest.raises(ConfigError, match="holds checkpoint-6 of a run that did not come to its end"):
        run(None, given)
    last = run(None, {**given, "resume": True})  # all that lacks is the end
    assert (last["losses"], last["after"]) == (full["losses"], full["after"])
    (out / "adapter_config.json").unlink()
    state = out / "checkpoints" / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:40])  # killed while it was written
    going_on = run(None, {**given, "resume": True})
    assert ([x["step"] for x in going_on["losses"]], going_on["resumed_at"]) == ([1, 2, 3, 4, 5, 6], 3)
    other = {**given, "resume": True, "steps": 9, "method_fields": {"r": 4, "lora_dropout": 0.1, "lora_alpha": 64}}
    with pytest.raises(ConfigError, match="lora_alpha was None and is 64"):
        run(None, other)
    with pytest.raises(ValueError, match="lora_alpha is 64"):
        run(None, {**other, "resume_anyway": True})


def test_an_interrupted_run_ends_with_its_step_and_goes_on_as_it_was(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """In the midst of a step dropout has drawn, and gradients of some batches are there: a checkpoint of that would go on otherwise."""
    import os
    import signal

    full = run(None, _given(model_folder, data, tmp_path / "whole", accumulate=2))
    given, called = _given(model_folder, data, tmp_path / "cut", accumulate=2, save_every=2), [0, 0]
    loss = HeadlessLoss.__call__

    def interrupting(self: HeadlessLoss, model: Any, batch: dict[str, Tensor]) -> Any:
        out = loss(self, model, batch)
        called[0] += model.training
        if model.training and called[1] <= called[0] <= 6:  # of the third step's two batches
            os.kill(os.getpid(), signal.SIGINT)
        return out

    monkeypatch.setattr(HeadlessLoss, "__call__", interrupting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what they start in the background ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    for first, step in ((5, 2), (6, 3)):  # twice, it ends at once
        called[:] = [0, first]
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        with pytest.raises(KeyboardInterrupt):
            run(None, given)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        found = Recipe(model="", data="", out=given["out"]).checkpoint()
        assert found is not None and found[1] == step
        called[0] = -100
        assert run(None, {**given, "resume": True})["losses"] == full["losses"]


def test_a_run_that_went_on_and_lacks_its_end_is_brought_to_it(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """Killed after its last checkpoint, or between the adapter and the record: what an earlier run left is not its end."""
    from safetensors.torch import load_file

    out, kept, names = tmp_path / "out", tmp_path / "kept", ("adapter_model.safetensors", "adapter_config.json", "run.json")
    given = _given(model_folder, data, out, save_every=3)
    run(None, {**given, "steps": 3})
    shutil.copytree(out, kept)
    full = run(None, {**given, "resume": True})
    want = {k: v.clone() for k, v in load_file(out / names[0]).items()}  # out of the file, which is written over
    for left in (names, names[2:]):
        for name in left:
            shutil.copy(kept / name, out / name)
        last = run(None, {**given, "resume": True})
        assert (last["losses"], last["after"], last["resumed_at"]) == (full["losses"], full["after"], 6)
        found = load_file(out / names[0])
        assert all(torch.equal(v, found[k]) for k, v in want.items())


def test_a_run_that_was_started_otherwise_goes_on_only_where_that_is_meant(model_folder: Path, data: Path, tmp_path: Path) -> None:
    given = _given(model_folder, data, tmp_path / "out", save_every=3)
    run(None, given)
    more = {**given, "resume": True, "steps": 7}
    moved = tmp_path / "moved.jsonl"
    moved.write_text(data.read_text().replace("hello", "yes"))
    for change, words in {
        "seed": ({"seed": 1}, "seed was 0 and is 1; the training rows"),
        "batch": ({"batch_size": 4}, "batch_size was 2 and is 4"),
        "data": ({"data": str(moved)}, r"the training rows were as many \(\d+\), with other contents"),
        "length": ({"length": 4}, r"length was 8 and is 4; the training rows were \d+ and are \d+"),
    }.values():
        with pytest.raises(ConfigError, match=words):
            run(None, {**more, **change})
    assert [x["step"] for x in run(None, {**more, "batch_size": 4, "resume_anyway": True})["losses"]] == [1, 2, 3, 4, 5, 6, 7]
    moved.write_text(data.read_text())
    assert run(None, {**more, "data": str(moved), "steps": 9, "batch_size": 4})["resumed_at"] == 7  # the same data elsewhere
    last = tmp_path / "out" / "checkpoints" / "checkpoint-9"
    for name, text in (("started.json", "[]"), ("started.json", "{}")):
        (last / name).write_text(text)
    (last / "optimizer.pt").write_bytes(b"x" * 50)
    for words in ("optimizer's state in .* cannot be read", "has no optimizer.pt, without which"):
        with pytest.raises(ConfigError, match=words):
            run(None, {**more, "data": str(moved), "steps": 11, "batch_size": 4})
        (last / "optimizer.pt").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="Give --resume too"):
        run(None, {**given, "out": str(tmp_path / "new"), "resume_anyway": True})


def test_gpt2_counts_the_labels_it_predicts_and_knows_its_positions(tokenizer: Any, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    config = transformers.GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fields = {"r": 4}
    record = run(
        None, _given(folder, data, tmp_path / "out", method_fields=fields, eval_data=str(data), batch_size=100, steps=1, learning_rate=1e-9)
    )
    assert record["losses"][0]["loss"] == pytest.approx(record["before"]["loss"], rel=0.02)  # dropout of the model
    with pytest.raises(ConfigError, match="rows of 9 tokens, and the model has 8 positions"):
        run(None, _given(folder, data, tmp_path / "more", method_fields=fields, length=9))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_sees_both_ways_is_no_causal_one(dtype: str, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    for kind, options, causal in [
        ("bert", {}, False),
        ("roberta", {"max_position_embeddings": 34, "pad_token_id": 0}, False),
        *[("xlnet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}, False)]
        * (dtype == "float32"),  # no such switch, and runs in this alone
        ("bert", {"is_decoder": True}, True),
        ("mamba", {"state_size": 4}, True),
    ]:
        folder = tmp_path / f"{kind}-{causal}"
        shape = {"vocab_size": len(WORDS)} if kind == "xlnet" else sizes
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **shape, **options)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        recipe = Recipe(model=str(folder), data=str(data), out=str(tmp_path / "out"), length=8, dtype=dtype)
        if causal:
            prepare(recipe)
        else:
            with pytest.raises(ConfigError, match="sees tokens that come later"):
                prepare(recipe)


def test_a_decoder_classifies_without_a_padding_token(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    texts = ["the cat sat", "hello how are you"] * 8
    data.write_text("".join(json.dumps({"text": t, "label": len(t)}) + "\n" for t in texts), encoding="utf-8")
    given = _given(model_folder, data, tmp_path / "out", task="sequence-classification", eval_data=str(data), steps=30)
    assert run(None, given)["after"]["accuracy"] == 1.0


def test_a_shadow_classifier_trains_its_head(model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    data, found = tmp_path / "data.jsonl", []
    data.write_text(
        "".join(json.dumps({"text": t, "label": len(t)}) + "\n" for t in ["the cat sat", "hello how are you"] * 8), encoding="utf-8"
    )
    for steps in (1, 4):
        out = tmp_path / str(steps)
        given = _given(
            model_folder, data, out, task="sequence-classification", steps=steps, method="shadow", method_fields={}, accumulate=2
        )
        run(None, given)
        found.append({k: v for k, v in load_file(out / "adapter_model.safetensors").items() if "shadow_head" in k})
    assert found[0] and any(not torch.equal(v, found[1][k]) for k, v in found[0].items())


def test_classification_trains_a_head_that_is_saved(tokenizer: Any, tmp_path: Path) -> None:
    folder, data = tmp_path / "bert", tmp_path / "data.csv"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = "".join(f"the {a} {b},{a}\n" for b in ("sat", "ran", "yes", "no", "fine") * 4 for a in ("cat", "dog"))
    data.write_text("text,label\n" + rows, encoding="utf-8")
    out = tmp_path / "out"
    record = run(
        None,
        _given(folder, data, out, task="sequence-classification", eval_data=str(data), steps=80, batch_size=8, method_fields={"r": 4}),
    )
    assert record["after"]["accuracy"] == 1.0
    assert json.loads((out / "run.json").read_text())["labels"] == ["cat", "dog"]  # what the head's numbers mean
    from safetensors import safe_open

    with safe_open(out / "adapter_model.safetensors", "pt") as f:
        assert any("classifier" in k for k in f.keys())  # noqa: SIM118  no mapping
    data.write_text("text,label\nthe cat,a\nthe dog,b\nthe mat,c\n")
    with pytest.raises(ConfigError, match="another number of labels than the 3 of the data"):
        run(None, _given(folder, data, tmp_path / "other", task="sequence-classification"))


@pytest.mark.parametrize("storage", ["nf4", "torchao-int8", "quanto-int8"])
def test_a_quantised_run_learns_and_says_what_it_holds(storage: str, model_folder: Path, data: Path, tmp_path: Path) -> None:
    import veneer
    from veneer.training.quantise import STORAGES

    pytest.importorskip(STORAGES[storage][0])
    out = tmp_path / "out"
    record = run(None, _given(model_folder, data, out, steps=60, quantize=storage, gradient_checkpointing=storage == "nf4"))
    assert record["after"]["perplexity"] < 0.8 * record["before"]["perplexity"]
    held, plain = (record["plan"]["memory"]["weights"], run(None, _given(model_folder, data, tmp_path / "plain", steps=1))["plan"])
    assert held < plain["memory"]["weights"] or storage == "nf4"  # its tables are more than a model so small
    assert record["plan"]["all_parameters"] == plain["all_parameters"]
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)  # an adapter learned on the packed weights loads on the others
    ids = torch.tensor([[5, 6, 8, 10, 5, 12]])
    model = veneer.PeftModel.from_pretrained(base, out)
    tuned = model(input_ids=ids, labels=ids).loss
    with model.disable_adapter():
        assert tuned < model(input_ids=ids, labels=ids).loss


def test_the_head_of_a_quantised_classifier_trains_whole(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder, data = tmp_path / "bert", tmp_path / "data.csv"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data.write_text("text,label\n" + "".join(f"the {a} sat,{a}\n" for a in ("cat", "dog") * 8), encoding="utf-8")
    given = _given(folder, data, tmp_path / "out", task="sequence-classification", eval_data=str(data), steps=60, quantize="nf4")
    given["learning_rate"] = 5e-2
    record = run(None, {**given, "batch_size": 8, "method_fields": {"r": 4}})
    assert record["after"]["accuracy"] == 1.0 and record["plan"]["trained_whole"] == ["classifier", "score"]


def test_quantising_needs_a_known_storage_and_its_library(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'nf4'"):
        run(None, _given(model_folder, data, tmp_path / "out", quantize="nf3"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*pip install 'veneer\[quant\]'"):
        run(None, _given(model_folder, data, tmp_path / "out", quantize="nf4"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "fields", "where"),
    [
        ("lora", {}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("ln_tuning", {}, {"input_layernorm", "post_attention_layernorm", "norm"}),
        ("trainable_tokens", {"token_indices": [1, 2]}, {"embed_tokens", "lm_head"}),
        ("adaption_prompt", {"adapter_len": 2, "adapter_layers": 1}, {"self_attn"}),
        ("shadow", {}, {"0", "1"}),
    ],
)
def test_methods_act_in_their_own_place(
    method: str, fields: dict[str, Any], where: set[str], model_folder: Path, data: Path, tmp_path: Path
) -> None:
    given = _given(model_folder, data, tmp_path / "out", method=method, method_fields=fields, steps=1)
    assert set(run(None, given)["plan"]["modules"]) == where


def test_the_recipe_file_and_the_command_line_together(model_folder: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model_folder}\ndata: {data}\nsteps: 2\nbatch_size: 2\nlength: 8\nmethod: ia3\n", encoding="utf-8")
    record = run(str(recipe), {"out": str(tmp_path / "out"), "steps": 3})
    assert record["recipe"]["method"] == "ia3"
    assert record["recipe"]["steps"] == 3  # the command line wins
    recipe.write_text("modle: x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"modle.*model"):
        run(str(recipe), {})


def test_fields_of_the_method_come_as_options() -> None:
    words = ["--r", "16", "--use-dora", "--target-modules", "q_proj,v_proj", "--lora-alpha=32", "--init-lora-weights", "pissa"]
    assert method_fields(words) == {
        "r": 16, "use_dora": True, "target_modules": "q_proj,v_proj", "lora_alpha": 32, "init_lora_weights": "pissa",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="stray"):
        method_fields(["stray"])
    assert method_fields(["--target-modules", r"[qv]_proj", "--a", "*x"]) == {"target_modules": "[qv]_proj", "a": "*x"}
    assert Recipe(method_fields=method_fields(["--lora-dropout", "1e-1"])).config().lora_dropout == 0.1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "--model is missing"),
        ({"model": "./nowhere"}, "no model folder './nowhere'"),
        ({"task": "causal-ml"}, "causal-lm"),
        ({"method": "lorra"}, "lora"),
        ({"method_fields": {"rank": 3}}, "has no field 'rank'"),
        ({"method_fields": {"leanring_rate": 3}}, "Did you mean 'learning_rate'"),
        ({"method_fields": {"lora_dropout": "high"}}, "lora_dropout"),
        ({"method_fields": {"target_modules": ["q_prj"]}}, "q_prj"),
        ({"batch_size": 0}, "batch_size has to be positive"),
        ({"eval_fraction": 1.5}, "eval_fraction"),
        ({"dtype": "float8"}, "float8"),
        ({"resume": True}, "no checkpoint"),
        ({"epochs": 0}, "epochs has to be positive"),
        ({"warmup": 5}, "share of the steps"),
        ({"weight_decay": -1}, "weight_decay is 0 or more"),
        ({"seed": -1}, "seed lies in"),
        ({"schedule": "linaer"}, "Did you mean 'linear'"),
        ({"steps": 2.5}, "steps has to be a whole number"),
        ({"batch_size": True}, "batch_size has to be a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate has to be a number"),
        ({"gradient_checkpointing": "no"}, "true or false"),
        ({"method": 3}, "Put it in quotes"),
        ({"method_fields": {"inference_mode": True}}, "nothing trains"),
        ({"method_fields": {"init_lora_weights": "eva"}}, "initialize_lora_eva_weights"),
        ({"rates": 3}, "rates has to be keys and values"),
        ({"method": "trainable_tokens", "method_fields": {}}, "token_indices is empty"),
        ({"out": "DATA/run"}, "data.jsonl' is a file"),
        ({"out": "MODEL"}, "is the model's own folder"),
        ({"out": "OTHER"}, "holds a model, whose tokenizer"),
        ({"eval_data": "EMPTY"}, "gives nothing to evaluate on"),
    ],
)
def test_bad_input_is_one_error_and_writes_nothing(
    model_folder: Path, data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    shutil.copytree(model_folder, tmp_path / "other")
    places = {"OTHER": str(tmp_path / "other"), "DATA": str(data), "MODEL": str(model_folder), "EMPTY": str(tmp_path / "empty.jsonl")}
    for word, place in places.items():
        change = {k: v.replace(word, place) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        run(None, {**_given(model_folder, data, out), **change})
    assert not out.exists()


@pytest.mark.parametrize("words", [["--r", "16", "--use-dora"], ["RECIPE", "--r", "16", "--use-dora"], ["--r=16", "--use-dora"]])
def test_fields_of_the_method_come_through_the_command_line(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a recipe and without: what typer does not know it takes for the recipe."""
    from veneer.cli import main, train

    seen: list[Any] = []
    monkeypatch.setattr(train, "run", lambda path, given: seen.append((path, given["method_fields"], given["steps"])))
    recipe = str(tmp_path / "recipe.yaml")
    monkeypatch.setattr("sys.argv", ["veneer", "train", *(recipe if w == "RECIPE" else w for w in words), "--steps", "3"])
    with pytest.raises(SystemExit) as done:
        main.main()
    assert not done.value.code
    assert seen == [(recipe if "RECIPE" in words else None, {"r": 16, "use_dora": True}, 3)]


def test_the_command_exits_with_two_and_says_why(data: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "veneer", "train", "--model", str(tmp_path), "--data", str(data), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "config.json" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_messages_keep_what_stands_in_brackets(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from veneer.cli import main

    monkeypatch.setattr("sys.argv", ["veneer", "train", "--model", "./[bold]x[/y]", "--data", str(data), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert "./[bold]x[/y]" in capsys.readouterr().err


# ---------------------------------------------------------------- control


def _controlled(model_folder: Path, data: Path, out: Path, text: str) -> str:
    path = out.parent / "recipe.yaml"
    head = f"model: {model_folder}\ndata: {data}\nout: {out}\nsteps: 6\nbatch_size: 2\nlength: 8\ndtype: float32\nmethod_fields: {{r: 4}}\n"
    path.write_text(head + text, encoding="utf-8")
    return str(path)


def test_a_recipe_controls_rates_clipping_freezing_and_statistics(model_folder: Path, data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    text = (
        "learning_rate: 0.01\nschedule: constant\nwarmup: 0\nrates: {decay: 0.5, patterns: {v_proj: 0}}\n"
        "clipping: {norm: 0.01, by: module}\nfreezing: {every: 3}\nstatistics: {every: 1}\naccumulate: 2\n"
    )
    out = tmp_path / "out"
    run(_controlled(model_folder, data, out, text), {})
    lines = [json.loads(line) for line in (out / "statistics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == [1, 2, 3, 4, 5, 6]
    for r in lines:
        for name, m in r["layers"].items():
            early = "layers.0." in name and r["step"] <= 3
            assert (m["gradient"] is None) is early
            assert (m["update"] == 0) is (early or "v_proj" in name)
            assert m["gradient"] is None or m["gradient"] <= 0.0101
    assert (out / "statistics.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "schedule.png").read_bytes().startswith(b"\x89PNG")
    saved = load_file(out / "adapter_model.safetensors")
    moved = {k: bool(v.any()) for k, v in saved.items() if "lora_B" in k}
    assert all(on is ("v_proj" not in k) for k, on in moved.items()) and moved


def test_gradients_in_float16_are_those_in_float32(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """Of a mean over many labels they are too small for float16, those of a head with small weights above all."""
    folder, found = tmp_path / "small", []
    shutil.copytree(model_folder, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    model.model.embed_tokens.weight.data *= 0.02
    model.save_pretrained(folder)
    for dtype in ("float32", "float16"):
        text = f"dtype: {dtype}\nclipping: 1000\nstatistics: 1\naccumulate: 4\nbatch_size: 8\nsteps: 1\n"
        run(_controlled(folder, data, tmp_path / dtype, text), {})
        (line,) = [json.loads(line) for line in (tmp_path / dtype / "statistics.jsonl").read_text().splitlines()]
        loss = json.loads((tmp_path / dtype / "run.json").read_text())["losses"][0]["loss"]
        found.append([loss, *(m["gradient"] for m in line["layers"].values())])
    assert found[1] == pytest.approx(found[0], rel=5e-3)


def test_layers_are_clipped_in_the_place_of_all_gradients(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """A layer's norm of 1 or more would never be reached after the clipping of all to 1."""
    norms = {}
    for norm in (0.5, 1e3):
        out = tmp_path / str(norm)
        text = f"method_fields: {{init_lora_weights: false, lora_alpha: 400}}\nclipping: {norm}\nstatistics: 1\n"
        run(_controlled(model_folder, data, out, text), {})
        lines = [json.loads(line) for line in (out / "statistics.jsonl").read_text().splitlines()]
        norms[norm] = max(m["gradient"] for m in lines[0]["layers"].values())
    assert norms[0.5] == pytest.approx(0.5, rel=1e-3) and norms[1e3] > 1.5


@pytest.mark.parametrize("optimizer", ["loraplus", "lorafa", "riemannian"])
def test_a_recipe_names_pefts_optimizers(optimizer: str, model_folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = run(_controlled(model_folder, data, out, f"optimizer: {optimizer}\nlearning_rate: 0.02\n"), {"steps": 30})
    assert record["after"]["loss"] < record["before"]["loss"] - 0.1


def test_controls_go_on_where_a_run_was_cut(model_folder: Path, data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    text = "rates: {decay: 0.5}\nfreezing: [{step: 0, layers: '-1:'}, {step: 4}]\nstatistics: 1\nsave_every: 3\nseed: 1\n"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(_controlled(model_folder, data, whole, text), {})
    run(_controlled(model_folder, data, cut, text), {})
    shutil.rmtree(cut / "checkpoints" / "checkpoint-6")
    for name in ("adapter_model.safetensors", "adapter_config.json", "run.json"):
        (cut / name).unlink()
    with (cut / "statistics.jsonl").open("a") as f:
        f.write('{"step": 7, "layers": {"mod')  # killed there
    run(_controlled(model_folder, data, cut, text), {"resume": True})
    lines = [[json.loads(line) for line in (out / "statistics.jsonl").read_text().splitlines()] for out in (whole, cut)]
    assert lines[0] == lines[1] and [x["step"] for x in lines[1]] == [1, 2, 3, 4, 5, 6]
    a, b = load_file(whole / "adapter_model.safetensors"), load_file(cut / "adapter_model.safetensors")
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_of_several_processes_one_writes_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import veneer
    from veneer.training.controls import controls_of

    model = veneer.get_peft_model(nn.Sequential(nn.Linear(4, 4)), veneer.LoraConfig(target_modules=["0"]))
    for rank, wanted in (("0", tmp_path / "statistics.jsonl"), ("1", None)):
        monkeypatch.setenv("RANK", rank)
        (statistics,) = controls_of(Recipe(out=str(tmp_path), statistics=1), model)
        assert statistics.json_path == wanted  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: lorapuls", "Did you mean 'loraplus'"),
        ("optimizer: loraplus\noptimizer_fields: {lr_ratio: 4}", "Did you mean 'loraplus_lr_ratio'"),
        ("optimizer: loraplus\nrates: {decay: 0.9}", "patterns: {lora_B: 16}"),
        ("optimizer: lorafa\nmethod: ia3\nmethod_fields: {}", "lorafa works on method: lora"),
        ("rates: {decy: 0.9}", "Did you mean 'decay'"),
        ("rates: {patterns: {q_prj: 2}}", "Did you mean 'q_proj'"),
        ("clipping: {by: module}", "`norm` is missing"),
        ("clipping: -1", "positive norm"),
        ("freezing: {evry: 3}", "Did you mean 'every'"),
        ("freezing: [{step: 0, layers: [7]}]", r"layers \[7\]"),
        ("statistics: {every: 0}", "1 or more"),
        ("optimizer_fields: {betas: [2, 3]}", "Invalid beta"),
        ("rates: {bands: 3}", "bands are factors"),
        ("rates: {patterns: [lora_B]}", "patterns is a table"),
        ("clipping: {norm: 1, patterns: 3}", "patterns is a table"),
        ("freezing: {every: a}", "whole numbers"),
        ("freezing: [{step: x}]", "whole number as its step"),
        ("freezing: [{only: lora_B}]", r"such as \[lora_B\]"),
    ],
)
def test_wrong_controls_are_one_error_and_write_nothing(text: str, message: str, model_folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=message):
        run(_controlled(model_folder, data, out, text.replace("\nmethod_fields: {}", "")), {})
    assert not out.exists()
