"""Prompt learning. The oracle is the base model itself: given the prompt's embeddings by hand, or the text that the prompt was made of."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import veneer as V

VOCABULARY, WIDTH, N = 48, 32, 3
IDS = torch.tensor([[7, 9, 11, 13, 15], [21, 20, 19, 18, 17]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # padding on the left
TEXT = torch.tensor([31, 5, 28])  # what a prompt may say
TASKS = torch.tensor([1, 0])


def llama(cls: Any = LlamaForCausalLM) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=3,
    )  # fmt: skip
    return _made(cls, config)


def gpt2() -> Any:
    return _made(
        GPT2LMHeadModel,
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    )


def t5() -> Any:
    return _made(T5ForConditionalGeneration, T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_ff=40, d_kv=6, num_heads=4, num_layers=3, decoder_start_token_id=0,
    ))  # fmt: skip


def bart() -> Any:
    return _made(BartForConditionalGeneration, BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=2,
        encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64, forced_eos_token_id=None,
    ))  # fmt: skip


def bert(cls: Any = BertForSequenceClassification, **more: Any) -> Any:
    return _made(
        cls, BertConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, **more)
    )


def _made(cls: Any, config: Any) -> Any:
    torch.manual_seed(1)
    config.initializer_range = 0.3  # outputs that depend on the input, and generation that does not stand still
    return cls(config).eval()


def build(name: str, task: str | None = "CAUSAL_LM", n: int = N, **more: Any) -> Any:
    """A config by a short name."""
    common: dict[str, Any] = {"task_type": task, "num_virtual_tokens": n, **more}
    return {
        "prompt": lambda: V.PromptTuningConfig(**common),
        "mlp": lambda: V.PromptEncoderConfig(encoder_hidden_size=10, **common),
        "lstm": lambda: V.PromptEncoderConfig(
            encoder_hidden_size=10, encoder_reparameterization_type="LSTM", encoder_dropout=0.5, **common
        ),
        "multitask": lambda: V.MultitaskPromptTuningConfig(num_tasks=2, num_ranks=2, **common),
        "cpt": lambda: V.CPTConfig(task_type=task, cpt_token_ids=TEXT.tolist(), cpt_tokens_type_mask=[1, 2, 4], **more),
        "prefix": lambda: V.PrefixTuningConfig(**common),
        "projected": lambda: V.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=9, **common),
        "cartridge": lambda: V.CartridgeConfig(**common),
    }[name]()


TOKENS = ("prompt", "mlp", "lstm", "multitask", "cpt")
CACHES = ("prefix", "projected", "cartridge")


def model(base: Any, name: str, task: str | None = "CAUSAL_LM", **more: Any) -> Any:
    out = V.get_peft_model(base, build(name, task, **more))
    with torch.no_grad():
        for p in out.prompt_encoder.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    return out.eval()


def extra(name: str) -> dict[str, Tensor]:
    return {"task_ids": TASKS} if name == "multitask" else {}


def before(prompt: Tensor, base: Any, ids: Tensor) -> Tensor:
    return torch.cat([prompt, base.get_input_embeddings()(ids)], 1)


def ones(mask: Tensor, n: int = N) -> Tensor:
    return torch.cat([mask.new_ones(len(mask), n), mask], 1)


def speaks(pm: Any, base: Any, text: Tensor = TEXT, adapter: str = "default") -> None:
    """Let the prompt be the embeddings of a text."""
    with torch.no_grad():
        pm.prompt_encoder[adapter].embedding.weight[: len(text)] = base.get_input_embeddings()(text)


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("name", TOKENS)
def test_a_prompt_is_embeddings_before_the_input(make: Callable[[], Any], name: str) -> None:
    base = make()
    pm = model(base, name)
    prompt = pm.get_prompt(2, **extra(name))
    assert prompt.shape == (2, N, WIDTH)
    by_hand = base(inputs_embeds=before(prompt, base, IDS), attention_mask=ones(MASK), position_ids=torch.arange(N + 5)[None])
    out = pm(input_ids=IDS, attention_mask=MASK, **extra(name))
    torch.testing.assert_close(out.logits, by_hand.logits)
    embeds = base.get_input_embeddings()(IDS)
    torch.testing.assert_close(pm(inputs_embeds=embeds, attention_mask=MASK, **extra(name)).logits, by_hand.logits)
    positions = (MASK.cumsum(1) - 1).clamp_min(0)
    moved = torch.cat([torch.arange(N).expand(2, -1), positions + N], 1)
    by_hand = base(inputs_embeds=before(prompt, base, IDS), attention_mask=ones(MASK), position_ids=moved)
    out = pm(IDS, MASK, position_ids=positions, **extra(name))
    torch.testing.assert_close(out.logits, by_hand.logits)
    with pm.disable_adapter():
        torch.testing.assert_close(
            pm(input_ids=IDS, attention_mask=MASK, **extra(name)).logits, base(input_ids=IDS, attention_mask=MASK).logits
        )


def test_labels_do_not_count_on_the_prompt() -> None:
    pm = model(llama(), "prompt")
    labels = IDS.masked_fill(MASK == 0, -100)
    out = pm(input_ids=IDS, attention_mask=MASK, labels=labels)
    # the prompt's last position predicts the first token
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, N - 1 : -1].flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_every_task_of_an_encoder(name: str) -> None:
    seq = model(bert(), name, "SEQ_CLS")
    assert type(seq) is V.PeftModelForSequenceClassification
    types, shift = torch.ones_like(IDS), N if name == "prompt" else 0
    base = seq.get_base_model()
    classes = torch.tensor([1, 0])
    out = seq(input_ids=IDS, attention_mask=MASK, token_type_ids=types, labels=classes)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, classes))
    if name == "prompt":
        by_hand = base(
            inputs_embeds=before(seq.get_prompt(2), base, IDS),
            attention_mask=ones(MASK),
            token_type_ids=torch.cat([types * 0, types], 1)[:, 5 - N :],
        )
        torch.testing.assert_close(out.logits, by_hand.logits)

    tok = model(bert(BertForTokenClassification, num_labels=3), name, "TOKEN_CLS")
    tags = torch.tensor([[-100, -100, 0, 1, 2], [2, 1, 0, 1, 2]])
    out = tok(input_ids=IDS, attention_mask=MASK, labels=tags)
    assert out.logits.shape == (2, 5 + shift, 3)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, shift:].flatten(0, 1), tags.flatten()))

    qa = model(bert(BertForQuestionAnswering), name, "QUESTION_ANS")
    start, end = torch.tensor([2, 0]), torch.tensor([3, 4])
    out = qa(input_ids=IDS, attention_mask=MASK, start_positions=start, end_positions=end)
    want = (F.cross_entropy(out.start_logits, start + shift) + F.cross_entropy(out.end_logits, end + shift)) / 2
    torch.testing.assert_close(out.loss, want)

    feature = model(bert(BertModel), name, "FEATURE_EXTRACTION")
    assert feature(input_ids=IDS, attention_mask=MASK).last_hidden_state.shape == (2, 5 + shift, WIDTH)


def test_a_prefix_of_an_encoder_is_its_cache() -> None:
    """Hidden states of the first layer attend to given keys and values: with the keys of real tokens, BERT's first layer sees those."""
    pm = model(bert(BertModel), "prefix", "FEATURE_EXTRACTION")
    plain = pm.get_base_model()(IDS, MASK).last_hidden_state
    got = pm(input_ids=IDS, attention_mask=MASK)
    by_hand = pm.get_base_model()(IDS, ones(MASK), past_key_values=pm.get_prompt(2)).last_hidden_state
    torch.testing.assert_close(got.last_hidden_state, by_hand)
    assert not torch.allclose(got.last_hidden_state, plain, atol=1e-3)


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("name", ["prompt", "mlp", "multitask"])
def test_encoder_decoder(make: Callable[[], Any], name: str) -> None:
    base = make()
    pm = model(base, name, "SEQ_2_SEQ_LM")
    assert pm.peft_config["default"].num_transformer_submodules == 2
    labels = torch.tensor([[4, 6, 8, 2], [5, 2, -100, -100]])
    prompt = pm.get_prompt(2, **extra(name))
    assert prompt.shape == (2, 2 * N, WIDTH)
    encoder = {"inputs_embeds": before(prompt[:, :N], base, IDS), "attention_mask": ones(MASK)}
    if name != "multitask":
        by_hand = base(**encoder, labels=labels)
    else:  # the second half stands before the decoder's input
        fed = base.prepare_decoder_input_ids_from_labels(labels=labels)
        table = base.get_decoder().get_input_embeddings()
        by_hand = base(
            **encoder,
            decoder_inputs_embeds=torch.cat([prompt[:, N:], table(fed)], 1),
            labels=torch.cat([labels[:, :3] * 0 - 100, labels], 1),
        )
        same = pm(input_ids=IDS, attention_mask=MASK, decoder_input_ids=fed, **extra(name))  # PEFT fails without labels
        torch.testing.assert_close(same.logits, by_hand.logits)
    out = pm(input_ids=IDS, attention_mask=MASK, labels=labels, **extra(name))
    torch.testing.assert_close(out.logits, by_hand.logits)
    torch.testing.assert_close(out.loss, by_hand.loss)


# ---------------------------------------------------------------- a prompt that says a text is that text


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_cartridge_of_a_text_is_the_text(make: Callable[[], Any]) -> None:
    base = make()
    whole = torch.cat([TEXT.expand(2, -1), IDS], 1)
    want, kinds = base(input_ids=whole, attention_mask=ones(MASK)).logits[:, N:], {}
    for name in ("cartridge", "prefix"):
        pm = model(make(), name)
        cache = pm.get_base_model()(TEXT[None], use_cache=True).past_key_values
        kinds[name] = V.initialize_kv_prefix_from_past_key_values(pm, past_key_values=cache)
        out = pm(input_ids=IDS, attention_mask=MASK)
        torch.testing.assert_close(out.logits, want, atol=1e-5, rtol=1e-4)
    assert torch.equal(kinds["cartridge"], kinds["prefix"])


def test_the_prefix_of_a_decoder_is_in_its_self_attention() -> None:
    base = t5()
    pm = model(t5(), "cartridge", "SEQ_2_SEQ_LM", num_transformer_submodules=1)
    assert (pm.peft_config["default"].num_layers, pm.peft_config["default"].token_dim) == (3, 24)  # the decoder's, and its keys'
    one, mask = IDS[:1], MASK[:1]
    whole = torch.cat([TEXT, torch.tensor([3, 4])])[None]
    cache = base(input_ids=one, attention_mask=mask, decoder_input_ids=TEXT[None], use_cache=True).past_key_values
    V.initialize_kv_prefix_from_past_key_values(pm, past_key_values=cache)
    want = base(input_ids=one, attention_mask=mask, decoder_input_ids=whole).logits[:, N:]
    got = pm(input_ids=one, attention_mask=mask, decoder_input_ids=whole[:, N:]).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 6, "do_sample": False},
    "beams": {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "sampled": {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2},
    "penalised": {"max_new_tokens": 6, "do_sample": False, "repetition_penalty": 1.0, "use_cache": False},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["prompt", "cartridge"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_generate_goes_on_from_the_prompt(make: Callable[[], Any], name: str, mode: str) -> None:
    base, pm = make(), model(make(), name)
    if name == "prompt":
        speaks(pm, base)
    else:
        V.initialize_kv_prefix_from_past_key_values(pm, past_key_values=base(TEXT[None], use_cache=True).past_key_values)
    whole = torch.cat([TEXT.expand(2, -1), IDS], 1)
    options: dict[str, Any] = {**MODES[mode], "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(3)
    want = base.generate(whole, attention_mask=ones(MASK), **options)[:, N:]
    torch.manual_seed(3)
    assert torch.equal(pm.generate(input_ids=IDS, attention_mask=MASK, **options), want)
    torch.manual_seed(3)
    assert torch.equal(pm.generate(IDS, attention_mask=MASK, **options), want)


@pytest.mark.parametrize("name", ["prompt", "multitask", "cartridge"])
@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("make", [t5, bart])
def test_generate_equals_the_loop_of_forwards(make: Callable[[], Any], mode: str, name: str) -> None:
    pm = model(make(), name, "SEQ_2_SEQ_LM")
    options: dict[str, Any] = {**MODES[mode], "eos_token_id": None, "pad_token_id": 0}
    got = pm.generate(input_ids=IDS, attention_mask=MASK, **options, **extra(name))
    assert len(got) == 2 * options.get("num_return_sequences", 1)
    start = pm.get_base_model().config.decoder_start_token_id
    for i, best in enumerate(got[:: options.get("num_return_sequences", 1)]):
        one = {"input_ids": IDS[i : i + 1], "attention_mask": MASK[i : i + 1], **{k: v[i : i + 1] for k, v in extra(name).items()}}

        def score(tokens: Tensor, one: dict[str, Tensor] = one) -> float:
            fed = tokens[None, :-1]
            logits = pm(**one, decoder_input_ids=fed).logits[:, -fed.shape[1] :]
            return float(logits.detach().log_softmax(-1).gather(2, tokens[None, 1:, None]).sum())

        greedy = torch.tensor([start])
        for _ in range(6):
            greedy = torch.cat([greedy, pm(**one, decoder_input_ids=greedy[None]).logits[0, -1:].argmax(-1)])
        if mode == "greedy":
            assert torch.equal(best, greedy)
        else:
            assert score(best) >= score(greedy) - 1e-4


def test_lengths_count_the_input_and_the_new_tokens() -> None:
    for name in ("prompt", "prefix"):
        pm = model(llama(), name)
        assert pm.generate(input_ids=IDS, max_length=9, eos_token_id=None).shape == (2, 9)
        config = copy.deepcopy(pm.get_base_model().generation_config)
        config.max_new_tokens, config.eos_token_id = 2, None
        assert pm.generate(IDS, config).shape == (2, 7)
        with pytest.raises(ValueError, match="max_length"):
            pm.generate(input_ids=IDS, max_length=4)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_step_by_step_with_a_cache(name: str) -> None:
    pm = model(llama(), name)
    want = pm(input_ids=IDS, attention_mask=MASK).logits[:, -1]
    first = pm(input_ids=IDS[:, :3], attention_mask=MASK[:, :3], use_cache=True)
    got = pm(input_ids=IDS[:, 3:], attention_mask=MASK, past_key_values=first.past_key_values).logits[:, -1]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_classifier_of_the_last_token_does_not_read_padding(name: str, padding: str) -> None:
    pm = model(llama(LlamaForSequenceClassification), name, "SEQ_CLS")
    alone = [pm(input_ids=IDS[:1, :3]).logits, pm(input_ids=IDS[1:]).logits]
    ids = torch.tensor([[7, 9, 11, 0, 0], IDS[1].tolist()])
    ids, mask = (ids, (ids != 0).long())
    positions = None
    if padding == "left":
        ids[0], mask[0] = ids[0].roll(2), mask[0].roll(2)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
    got = pm(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_a_classifier_of_every_token_keeps_their_places() -> None:
    pm = model(llama(LlamaForTokenClassification), "prompt", "TOKEN_CLS")
    alone = pm(input_ids=IDS[:1, :3]).logits
    got = pm(input_ids=IDS, attention_mask=MASK.flip(1)).logits  # padding on the right
    torch.testing.assert_close(got[:1, : N + 3], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_what_a_prompt_cannot_stand_before_is_an_error(name: str) -> None:
    pm = model(llama(), name)
    with pytest.raises(V.RouteError, match="start anew"):
        pm(input_ids=IDS[:1], position_ids=torch.tensor([[0, 1, 2, 0, 1]]), use_cache=False)
    with pytest.raises(V.PeftError, match="for 8 tokens, and the input has 5"):
        pm(input_ids=IDS, attention_mask=torch.ones(2, N + 5))


def test_padding_takes_up_no_place_of_a_sliding_window_in_generate() -> None:
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=5,
    )  # fmt: skip
    pm = model(_made(MistralForCausalLM, config), "prompt")
    asked: dict[str, Any] = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    got = pm.generate(input_ids=IDS, attention_mask=MASK, **asked)
    alone = pm.generate(input_ids=IDS[:1, 2:], **asked)
    torch.testing.assert_close(got.logits[0][:1], alone.logits[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(got.sequences[:1, 2:], alone.sequences)


# ---------------------------------------------------------------- several prompts


def two(base: Any, name: str, task: str | None = "CAUSAL_LM") -> Any:
    pm = model(base, name, task)
    pm.add_adapter("b.2", build(name, task, n=N - 1))  # any name will do
    with torch.no_grad():
        for p in pm.prompt_encoder["b.2"].parameters():
            p.normal_()
    return pm.eval()


def test_switching() -> None:
    pm = two(llama(), "prompt")
    first = pm(input_ids=IDS).logits
    with pm.using("b.2"):
        assert pm(input_ids=IDS).logits.shape == (2, N - 1 + 5, VOCABULARY)
    torch.testing.assert_close(pm(input_ids=IDS).logits, first)
    pm.set_adapter("b.2")
    assert pm.active_adapter == "b.2" and pm.get_prompt(1).shape == (1, N - 1, WIDTH)
    assert [n for n, p in pm.named_parameters() if p.requires_grad] == ["prompt_encoder.b.2.embedding.weight"]
    with pytest.raises(V.RouteError, match="One prompt"):
        pm.set_adapter(["default", "b.2"])
    with pm.disable_adapter():
        assert pm(input_ids=IDS).logits.shape == (2, 5, VOCABULARY) and not pm.has_active_enabled_adapter
    with pytest.warns(V.PeftWarning, match="Setting active adapter to default"):
        pm.delete_adapter("b.2")
    torch.testing.assert_close(pm(input_ids=IDS).logits, first)
    with pytest.raises(ValueError, match="different peft types"):
        pm.add_adapter("c", build("prefix"))
    with pytest.raises(ValueError, match="not found"):
        pm.set_adapter("c")


@pytest.mark.parametrize("name", ["prompt", "prefix"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_mixed_batch(make: Callable[[], Any], name: str) -> None:
    pm = two(make(), name)
    ids, mask = IDS[[0, 1, 1, 0]], MASK[[1, 1, 1, 1]]
    rows = ["default", "b.2", "__base__", "b.2"]
    got = pm(input_ids=ids, attention_mask=mask, adapter_names=rows).logits[:, -5:]
    made = pm.generate(input_ids=ids, adapter_names=rows, max_new_tokens=4, num_beams=2, eos_token_id=None, do_sample=False)
    for i, row in enumerate(rows):
        with pm.disable_adapter() if row == "__base__" else pm.using(row):
            torch.testing.assert_close(got[i], pm(input_ids=ids[i : i + 1]).logits[0, -5:], atol=1e-5, rtol=1e-4)
            alone = pm.generate(input_ids=ids[i : i + 1], max_new_tokens=4, num_beams=2, eos_token_id=None, do_sample=False)
        assert torch.equal(made[i], alone[0])
    with pytest.raises(V.RouteError, match=r"no adapter 'b\.3'"):
        pm(input_ids=ids, adapter_names=["b.3"] * 4)
    with pytest.raises(V.RouteError, match="4 respectively"):
        pm(input_ids=ids, adapter_names=["b.2"])


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_mixed_batch_of_an_encoder(name: str) -> None:
    pm = two(bert(), name, "SEQ_CLS")  # it reads the first position; each row has a head of its own as well
    with torch.no_grad():
        pm.get_base_model().classifier.modules_to_save["b.2"].weight.normal_()
    rows = ["b.2", "default", "__base__"]
    got = pm(input_ids=IDS[[0, 1, 0]], adapter_names=rows).logits
    for i, row in enumerate(rows):
        with pm.disable_adapter() if row == "__base__" else pm.using(row):
            torch.testing.assert_close(got[i], pm(input_ids=IDS[[0, 1, 0]][i : i + 1]).logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [t5, bart])
def test_mixed_batch_of_an_encoder_decoder(make: Callable[[], Any]) -> None:
    pm = two(make(), "prompt", "SEQ_2_SEQ_LM")
    rows, decoded = ["b.2", "default"], torch.tensor([[0, 5, 6], [0, 7, 8]])
    got = pm(input_ids=IDS, decoder_input_ids=decoded, adapter_names=rows).logits
    made = pm.generate(input_ids=IDS, adapter_names=rows, max_new_tokens=4, num_beams=2, eos_token_id=None, do_sample=False)
    for i, row in enumerate(rows):
        with pm.using(row):
            one = IDS[i : i + 1]
            torch.testing.assert_close(got[i : i + 1], pm(input_ids=one, decoder_input_ids=decoded[i : i + 1]).logits, atol=1e-5, rtol=1e-4)
            assert torch.equal(made[i], pm.generate(input_ids=one, max_new_tokens=4, num_beams=2, eos_token_id=None, do_sample=False)[0])
    with pytest.raises(V.RouteError, match="one by one"):
        two(make(), "prefix", "SEQ_2_SEQ_LM")(input_ids=IDS, decoder_input_ids=decoded, adapter_names=rows)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", TOKENS + CACHES)
def test_training_moves_the_prompt_and_nothing_else(name: str) -> None:
    pm = model(llama(), name).train()
    before_ = {k: v.clone() for k, v in pm.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in pm.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = pm(input_ids=IDS, attention_mask=MASK, labels=IDS, **extra(name)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {k for k, v in pm.state_dict().items() if not torch.equal(v, before_[k])}
    fixed = {"cpt": {"embedding.weight"}, "cartridge": {"frozen_embedding"}}.get(name, set())
    assert moved == {k for k in before_ if k.startswith("prompt_encoder.") and k.removeprefix("prompt_encoder.default.") not in fixed}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [llama, t5])
def test_gradient_checkpointing(make: Callable[[], Any], reentrant: bool) -> None:
    task = "CAUSAL_LM" if make is llama else "SEQ_2_SEQ_LM"
    grads = []
    for checkpointed in (False, True):
        base = make()
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        pm = model(base, "prompt", task).train()
        for m in pm.modules():
            if isinstance(m, torch.nn.Dropout):
                m.p = 0.0
        torch.manual_seed(0)
        pm(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        grads.append(pm.prompt_encoder["default"].embedding.weight.grad)
    torch.testing.assert_close(grads[1], grads[0])
    if make is llama:
        assert grads[0].abs().sum(1).min() > 0


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_refused_where_checkpointing_would_drop_it(name: str) -> None:
    pm = model(llama(), name)
    pm.get_base_model().gradient_checkpointing_enable()
    pm(input_ids=IDS)  # nothing is checkpointed in eval mode
    with pytest.raises(V.ConfigError, match="gradient checkpointing"):
        pm.train()(input_ids=IDS)
    base = llama()
    base.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        V.get_peft_model(base, build(name))
    assert all(p.requires_grad for p in base.parameters())


def test_a_model_that_reads_no_cache_is_refused() -> None:
    class Deaf(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, past_key_values: Any = None, attention_mask: Any = None, **kw: Any) -> Any:
            return super().forward(input_ids, attention_mask[:, -input_ids.shape[1] :], **kw)

    with pytest.raises(V.ConfigError, match="no use of past_key_values"):
        model(llama(Deaf), "prefix")(input_ids=IDS)


def test_half_precision() -> None:
    for name in ("prompt", "prefix", "cpt"):
        pm = model(llama().to(torch.bfloat16), name).train()
        assert {p.dtype for p in pm.prompt_encoder.parameters()} == {torch.float32}
        out = pm(input_ids=IDS, labels=IDS)
        out.loss.backward()
        assert out.logits.dtype == torch.bfloat16
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in pm.parameters() if p.requires_grad)
        with torch.autocast("cpu", torch.bfloat16):
            model(llama(), name)(input_ids=IDS, labels=IDS).loss.backward()


# ---------------------------------------------------------------- files


BASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "CAUSAL_LM": (llama, {"input_ids": IDS, "attention_mask": MASK}),
    "SEQ_2_SEQ_LM": (t5, {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}),
    "SEQ_CLS": (bert, {"input_ids": IDS, "attention_mask": MASK}),
}


@pytest.mark.parametrize("task", BASES)
@pytest.mark.parametrize("name", TOKENS + CACHES)
def test_saved_and_loaded(name: str, task: str, tmp_path: Path) -> None:
    if name == "cpt" and task != "CAUSAL_LM":
        with pytest.raises(V.ConfigError, match="CAUSAL_LM"):
            build(name, task)
        return
    make, kw = BASES[task]
    pm = model(make(), name, task)
    pm.add_adapter("other", build(name, task))
    want = pm(**kw, **extra(name)).logits
    pm.train().save_pretrained(tmp_path, verify=True)  # dropout of the network must not get into the file
    pm.eval()
    file = load_file(tmp_path / "adapter_model.safetensors")
    keys = {"prompt_embeddings"} | ({"prefix_task_cols", "prefix_task_rows"} if name == "multitask" else set())
    heads = {"base_model.classifier.weight", "base_model.classifier.bias"} if task == "SEQ_CLS" else set()
    assert set(file) == keys | heads == set(V.get_peft_model_state_dict(pm))
    assert torch.equal(file["prompt_embeddings"], pm.get_prompt_embedding_to_save("default"))
    loaded = V.PeftModel.from_pretrained(make(), tmp_path)
    assert type(loaded) is type(pm) and not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded(**kw, **extra(name)).logits, want)
    loaded.load_adapter(tmp_path / "other", "other")
    loaded.set_adapter("other")
    pm.set_adapter("other")
    torch.testing.assert_close(loaded(**kw, **extra(name)).logits, pm(**kw, **extra(name)).logits)
    # into a prompt that is there, which then is what the file says, without its network
    fresh = model(make(), name, task)
    V.set_peft_model_state_dict(fresh, file)
    torch.testing.assert_close(fresh(**kw, **extra(name)).logits, want)
    with pytest.raises(V.LoadError):
        V.set_peft_model_state_dict(fresh, {"prompt_embeddings": file["prompt_embeddings"][:1]})
    if name in ("mlp", "lstm", "projected"):
        with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
            V.PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
        return
    more = V.PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    more.eval()
    torch.testing.assert_close(more(**kw, **extra(name)).logits, want)
    assert {n for n, p in more.named_parameters() if p.requires_grad} == {n for n, p in fresh.named_parameters() if p.requires_grad}


def test_auto_model_and_a_copy(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    config = V.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, base_model_name_or_path=str(tmp_path / "base"))
    pm = V.get_peft_model(base, config).eval()
    pm.save_pretrained(tmp_path / "adapter")
    auto = V.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    want = pm(input_ids=IDS).logits
    torch.testing.assert_close(auto(input_ids=IDS).logits, want)
    twin = copy.deepcopy(pm)
    with torch.no_grad():
        twin.prompt_encoder["default"].embedding.weight.zero_()
    twin.set_adapter("default", inference_mode=True)
    torch.testing.assert_close(pm(input_ids=IDS).logits, want)
    assert pm.prompt_encoder["default"].embedding.weight.requires_grad
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["prompt_tuning_init"] == "RANDOM" and written["token_dim"] == WIDTH and written["num_layers"] == 2
    assert V.PeftConfig.from_pretrained(tmp_path / "adapter").num_virtual_tokens == N


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model(bert(), "prompt", "SEQ_CLS").save_pretrained(tmp_path)
    narrow = _made(
        BertForSequenceClassification,
        BertConfig(vocab_size=48, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2),
    )
    names = list(narrow.state_dict())
    with pytest.raises(V.LoadError, match="prompt_embeddings"):
        V.PeftModel.from_pretrained(narrow, tmp_path, config=V.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=N))
    assert list(narrow.state_dict()) == names and all(p.requires_grad for p in narrow.parameters())


# ---------------------------------------------------------------- starts


@pytest.fixture
def words(tmp_path: Path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, **{w: i for i, w in enumerate(["", "one", "two", "three"]) if i}}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


def test_starts_from_text_and_from_the_vocabulary(words: str) -> None:
    base = llama()
    table = base.get_input_embeddings().weight.clone()
    said: dict[str, Any] = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "three one", "tokenizer_name_or_path": words}
    pm = V.get_peft_model(base, build("prompt", **said))
    assert torch.equal(pm.get_prompt(1)[0], table[[3, 1, 3]])
    assert torch.equal(V.get_peft_model(llama(), build("prompt", n=1, **said)).get_prompt(1)[0], table[[3]])
    multi = V.get_peft_model(t5(), build("multitask", "SEQ_2_SEQ_LM", **said))
    assert torch.equal(multi.prompt_encoder["default"].embedding.weight, t5().get_input_embeddings().weight[[3, 1, 3, 1, 3, 1]])
    drawn = V.get_peft_model(llama(), build("prompt", prompt_tuning_init="sample_vocab")).get_prompt(1)[0]
    assert all(any(torch.equal(row, entry) for entry in table) for row in drawn)
    for wrong, named in (
        ({"prompt_tuning_init": "TEXT"}, "tokenizer_name_or_path"),
        ({"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": words}, "prompt_tuning_init_text"),
        ({"tokenizer_kwargs": {"use_fast": True}}, "tokenizer_kwargs"),
        ({"prompt_tuning_init": "NOISE"}, "SAMPLE_VOCAB"),
    ):
        with pytest.raises(V.ConfigError, match=named):
            build("prompt", **wrong)


@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_multitask_goes_on_from_source_tasks(init: str, tmp_path: Path) -> None:
    source = model(llama(), "multitask")
    source.save_pretrained(tmp_path)
    path = str(tmp_path if init == "EXACT_SOURCE_TASK" else tmp_path / "adapter_model.safetensors")
    options: dict[str, Any] = {"prompt_tuning_init": init, "prompt_tuning_init_state_dict_path": path, "prompt_tuning_init_task": 1}
    config = V.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, num_tasks=3, num_ranks=2, **options)
    got, had = V.get_peft_model(llama(), config).prompt_encoder["default"], source.prompt_encoder["default"]
    assert torch.equal(got.embedding.weight, had.embedding.weight)
    for name in ("prefix_task_cols", "prefix_task_rows"):
        old, new = getattr(had, name), getattr(got, name)
        want = {"AVERAGE_SOURCE_TASKS": old.mean(0), "EXACT_SOURCE_TASK": old[1]}.get(init)
        assert want is None or all(torch.equal(new[t], want) for t in range(3))
        assert want is not None or new.abs().max() < 0.2
    config.prompt_tuning_init_state_dict_path = None
    with pytest.raises(V.ConfigError, match="prompt_tuning_init_state_dict_path"):
        V.get_peft_model(llama(), config)


def test_multitask_needs_the_task_of_each_row() -> None:
    pm = model(llama(), "multitask")
    holder = pm.prompt_encoder["default"]
    want = holder.embedding.weight * (holder.prefix_task_cols[1] @ holder.prefix_task_rows[1])
    torch.testing.assert_close(pm.get_prompt(2, task_ids=TASKS)[0], want)
    both = pm(input_ids=IDS, task_ids=TASKS).logits
    torch.testing.assert_close(both[1:], pm(input_ids=IDS[1:], task_ids=TASKS[1:]).logits, atol=1e-5, rtol=1e-4)
    for call in (lambda: pm(input_ids=IDS), lambda: pm(input_ids=IDS, task_ids=TASKS[:1]), lambda: pm.generate(input_ids=IDS)):
        with pytest.raises(ValueError, match="task_ids"):
            call()


# ---------------------------------------------------------------- CPT


def test_cpt_loss_counts_labels_and_fades_with_examples() -> None:
    types = [1, 2, 3, 4, 5, 6, 7, 8, 8]  # two examples, the second with two labels
    context = list(range(4, 13))
    for weighting, old in (("none", 1.0), ("decay", 0.8)):
        config = V.CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=context,
            cpt_tokens_type_mask=types,
            opt_weighted_loss_type=weighting,
            opt_loss_decay_factor=0.8,
        )
        pm = V.get_peft_model(llama(), config).eval()
        labels = IDS.masked_fill(MASK == 0, -100)
        out = pm(input_ids=IDS, labels=labels, input_type_mask=torch.tensor([[1, 2, 3, 4, 4], [1, 2, 3, 3, 4]]))
        lp = out.logits.detach().log_softmax(-1)

        def at(row: int, place: int, token: int, lp: Tensor = lp) -> float:
            return -float(lp[row, place - 1, token])

        whole = sum(old**2 * at(r, 3, 7) + old * (at(r, 7, 11) + at(r, 8, 12)) for r in (0, 1))
        whole += at(0, 12, 13) + at(0, 13, 15) + at(1, 13, 17)
        assert out.loss.item() == pytest.approx(whole / 9, rel=1e-5)
        assert out[0] is out.loss and pm(input_ids=IDS, labels=labels, return_dict=False)[0].ndim == 0


def test_cpt_stays_near_its_tokens() -> None:
    config = V.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[4, 5, 6, 7],
        cpt_tokens_type_mask=[1, 2, 3, 4],
        opt_projection_epsilon=0.2,
        opt_projection_format_epsilon=0.1,
    )
    pm = V.get_peft_model(llama(), config).train()
    table, holder = pm.get_base_model().get_input_embeddings().weight, pm.prompt_encoder["default"]
    assert torch.equal(pm.get_prompt(1)[0], table[4:8])
    optimizer = torch.optim.SGD([p for p in pm.parameters() if p.requires_grad], lr=10.0)
    pm(input_ids=IDS, labels=IDS).loss.backward()
    assert holder.delta_embedding.weight.grad[3].abs().max() == 0 < holder.delta_embedding.weight.grad[:3].abs().sum(1).min()
    optimizer.step()
    root = (WIDTH / 2048) ** 0.5
    for mode in (pm.eval(), pm.train()):
        lengths = (mode.get_prompt(1)[0] - table[4:8]).norm(dim=1)
        torch.testing.assert_close(lengths, torch.tensor([0.1, 0.2, 0.1, 0.0]) * root, atol=1e-6, rtol=1e-5)
    assert holder.delta_embedding.weight[:3].norm(dim=1).max() <= 0.2 * root * 1.001  # training goes on from there
    with pytest.raises(V.ConfigError, match="same length"):
        V.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1])


# ---------------------------------------------------------------- Cartridge


class Words:
    """A tokenizer for initialize_kv_prefix_from_text."""

    chat_template: str | None = "{{ messages }}"

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> Tensor:
        assert messages == [{"role": "system", "content": "a text"}]
        return torch.cat([torch.tensor([1]), TEXT])[None]

    def __call__(self, text: str, truncation: bool = False, max_length: int | None = None, **kwargs: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.cat([TEXT, TEXT])[None, : max_length if truncation else None]}


def test_cartridge_from_text() -> None:
    pm = model(llama(), "cartridge")
    base = llama()
    for options, said in (({}, torch.tensor([1, 31, 5])), ({"use_chat_template": False}, TEXT)):
        got = V.initialize_kv_prefix_from_text(pm, Words(), text="a text", **options)
        cache = base(said[None], use_cache=True).past_key_values
        torch.testing.assert_close(got[:, :16].T.reshape(2, 8, N).transpose(1, 2), cache.layers[0].keys[0])
        torch.testing.assert_close(pm.prompt_encoder["default"].weight, got)
    with pytest.raises(ValueError, match="Need at least 3 cached tokens, got 2"):
        V.initialize_kv_prefix_from_text(pm, Words(), text="a text", max_length=2)
    with pytest.raises(ValueError, match="shape"):
        V.initialize_kv_prefix_from_text(pm, Words(), text="a text", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prefix_projection"):
        V.initialize_kv_prefix_from_text(model(llama(), "projected"), Words(), text="a text")
    with pytest.raises(ValueError, match="must be a CARTRIDGE or PREFIX_TUNING"):
        V.initialize_kv_prefix_from_text(model(llama(), "prompt"), Words(), text="a text")
    for frozen in (-1, N + 1):
        with pytest.raises(V.ConfigError, match="num_frozen_tokens"):
            build("cartridge", num_frozen_tokens=frozen)


def test_composed_cartridges_stand_one_after_another(tmp_path: Path) -> None:
    parts = [model(llama(), "cartridge", n=n) for n in (2, 3)]
    for i, pm in enumerate(parts):
        pm.save_pretrained(tmp_path / str(i))
    V.compose_cartridge_adapters([tmp_path / "0", tmp_path / "1"], output_path=tmp_path / "both")
    both = V.PeftModel.from_pretrained(llama(), tmp_path / "both")
    assert both.peft_config["default"].num_virtual_tokens == 5
    torch.testing.assert_close(both.prompt_encoder["default"].weight, torch.cat([pm.prompt_encoder["default"].weight for pm in parts]))
    with pytest.raises(ValueError, match="at least 2"):
        V.compose_cartridge_adapters([tmp_path / "0"], output_path=tmp_path / "none")


# ---------------------------------------------------------------- the rest


def test_without_a_task_the_model_tells_what_it_is() -> None:
    pm = model(llama(), "prompt", None)
    by_hand = pm.get_base_model()(inputs_embeds=before(pm.get_prompt(2), pm.get_base_model(), IDS))
    torch.testing.assert_close(pm(IDS, labels=IDS).logits, by_hand.logits)
    assert type(pm) is V.PeftModel and model(t5(), "prompt", None).get_prompt(1).shape == (1, 2 * N, WIDTH)


def test_other_modules_train_too(tmp_path: Path) -> None:
    pm = model(llama(), "prompt", modules_to_save=["lm_head"])
    with torch.no_grad():
        pm.get_base_model().lm_head.modules_to_save["default"].weight.add_(1.0)
    pm.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings", "base_model.lm_head.weight"}
    again = V.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits, pm(input_ids=IDS).logits)
    with pm.disable_adapter():
        torch.testing.assert_close(pm(input_ids=IDS).logits, llama()(IDS).logits)


def test_what_cannot_work_says_so() -> None:
    with pytest.raises(V.ConfigError, match="num_virtual_tokens"):
        V.get_peft_model(llama(), V.PromptTuningConfig(task_type="CAUSAL_LM"))
    with pytest.raises(V.ConfigError, match="no input embeddings"):
        V.get_peft_model(torch.nn.Linear(2, 2), V.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(V.ConfigError, match="does not support PromptTuningConfig"):
        V.inject_adapter_in_model(V.PromptTuningConfig(num_virtual_tokens=2), llama())
    pm = model(llama(), "prompt")
    with pytest.raises(V.PeftError, match=r"\(batch, tokens\)"):
        pm(input_ids=IDS, attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(V.PeftError, match="input_ids or inputs_embeds"):
        pm(attention_mask=MASK)
    with pytest.raises(TypeError, match="no layer"):
        V.get_layer_status(pm)
    with pytest.raises(AttributeError):
        pm.merge_and_unload()
    with pytest.raises(V.PeftError, match="no prompts"):
        V.get_peft_model(llama(), V.LoraConfig(task_type="CAUSAL_LM")).get_prompt(1)
    assert pm.get_nb_trainable_parameters()[0] == N * WIDTH and not pm.supports_lora_conversion()


def test_prefixes_of_models_that_hear_and_what_whispers_generate_has_no_place_for() -> None:
    t = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_target_positions": 30, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    speech = t.Speech2TextConfig(**sizes, input_feat_per_channel=8, conv_channels=8, max_source_positions=60)
    whisper = t.WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=20, suppress_tokens=None, begin_suppress_tokens=None)
    for base, x in (
        (t.Speech2TextForConditionalGeneration(speech), torch.randn(2, 40, 8)),
        (t.WhisperForConditionalGeneration(whisper), torch.randn(2, 8, 40)),
    ):
        for p in base.parameters():
            p.data.normal_(0, 0.3)
        shape = {"num_layers": 2, "token_dim": 16, "num_attention_heads": 2}
        model = V.get_peft_model(base, V.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM", **shape)).eval()
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_()
        if isinstance(base, t.WhisperForConditionalGeneration):
            with pytest.raises(V.PeftError, match="generate of WhisperForConditionalGeneration drops"):
                model.generate(input_features=x, max_new_tokens=4)
            continue
        ids = torch.full((2, 1), 2)
        with torch.no_grad():
            for _ in range(4):
                ids = torch.cat([ids, model(input_features=x, decoder_input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        options = {"max_new_tokens": 4, "min_new_tokens": 4}
        assert torch.equal(model.generate(input_features=x, **options), ids)
        assert torch.equal(model.generate(x, **options), ids)
        assert not torch.equal(base.generate(input_features=x, **options), ids)
