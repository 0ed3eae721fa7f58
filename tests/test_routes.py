"""Changes that depend on the call: what is known of it reaches the right rows, tokens, threads and recomputations."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import veneer as V
from veneer.engine.calls import Call
from veneer.engine.route import BASE, mixed
from veneer.errors import ConfigError, MergeError, RouteError
from veneer.testing.laws import move

from .golden.bases import build

INVOKE = [7, 9]
LLAMA = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def llama() -> nn.Module:
    torch.manual_seed(11)
    model = build("llama_causal_lm", **LLAMA)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) / p.shape[-1] ** 0.5)
    return model


def prompts() -> Tensor:
    """Four rows: the invocation early, twice, never, at the end."""
    torch.manual_seed(5)
    ids = torch.randint(10, 48, (4, 9))
    ids[0, 2:4] = ids[1, 1:3] = ids[1, 5:7] = ids[3, 7:9] = torch.tensor(INVOKE)
    return ids


STARTS = [2, 5, None, 7]  # where the last invocation of each row of `prompts` begins


def alora(**fields: Any) -> Any:
    config = V.LoraConfig(
        r=3, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=INVOKE, **fields
    )
    model = V.get_peft_model(llama(), config)
    move(model, seed=1, size=0.3)
    return model.eval()


def poly() -> Any:
    model = V.get_peft_model(
        llama(), V.PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    move(model, seed=1, size=0.3)
    return model.eval()


def one_by_one(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """The same, a row at a time."""
    rows = [{k: v[i : i + 1] for k, v in kwargs.items()} for i in range(len(ids))]
    return torch.cat([model(input_ids=ids[i : i + 1], **row).logits for i, row in enumerate(rows)])


# ---------------------------------------------------------------- aLoRA


@torch.no_grad()
def test_alora_is_lora_from_its_last_invocation_on() -> None:
    """One layer, so that the inputs of a token are the base's: LoRA's output behind the start, the base's before it."""
    config = V.LoraConfig(r=3, target_modules=["lm_head"], alora_invocation_tokens=INVOKE)
    model = V.get_peft_model(llama(), config)
    move(model, size=0.5)
    ids, got = prompts(), model(input_ids=prompts()).logits
    head = model.get_base_model().lm_head
    hidden = model.get_base_model().model(input_ids=ids).last_hidden_state
    base = head.base_layer(hidden)
    delta = hidden @ (head.lora_B["default"].weight @ head.lora_A["default"].weight).T * (8 / 3)
    for row, start in enumerate(STARTS):
        mask = torch.arange(9) >= (99 if start is None else start)
        torch.testing.assert_close(got[row], base[row] + delta[row] * mask[:, None], atol=1e-5, rtol=0)
    assert torch.equal(got[2], base[2])
    last = model(input_ids=ids, logits_to_keep=1).logits  # the head then sees the last token only
    torch.testing.assert_close(last, got[:, -1:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_alora_offsets_say_the_same() -> None:
    model, ids = alora(), prompts()
    offsets = [None if s is None else 9 - s for s in STARTS]
    expected = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, alora_offsets=offsets).logits, expected)
    assert torch.equal(model(input_ids=ids, alora_offsets=torch.tensor([o or 0 for o in offsets])).logits, expected)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, alora_offsets=offsets).logits, expected)
    whole = model(input_ids=ids, alora_offsets=[99] * 4).logits
    plain = V.get_peft_model(llama(), V.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"])).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(whole, plain(input_ids=ids).logits)


def test_alora_never_acts_nowhere_in_silence() -> None:
    model, ids = alora(), prompts()
    with pytest.raises(RouteError, match="alora_offsets"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(RouteError, match="4 rows"):
        model(input_ids=ids, alora_offsets=[1, 2, 3])
    with pytest.raises(RouteError, match="Call the PeftModel itself"):
        model.get_base_model()(input_ids=ids)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(RouteError, match="9 tokens of a cache"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    with pytest.raises(MergeError, match="invocation"):
        model.merge_adapter()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with pytest.raises(MergeError, match="invocation"):
        layer.get_delta_weight("default")
    assert not model.supports_lora_conversion()


@pytest.mark.parametrize("wrong", ["ab", [], [1.5], 7])
def test_alora_takes_token_ids(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="token ids"):
        V.LoraConfig(alora_invocation_tokens=wrong)


def test_alora_refuses_what_it_cannot_gate() -> None:
    with pytest.raises(ConfigError, match="lora_bias"):
        alora(lora_bias=True)
    bart = build(
        "t5_seq2seq_lm", vocab_size=48, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model = V.get_peft_model(bart, V.LoraConfig(target_modules=["q"], alora_invocation_tokens=INVOKE))
    with pytest.raises(RouteError, match="encoder-decoder"):
        model(input_ids=prompts(), labels=prompts())

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.lin = nn.Embedding(48, 8), nn.Linear(8, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.lin(self.table(input_ids)[:, ::2])

    pooled = V.get_peft_model(Pooled(), V.LoraConfig(target_modules=["lin"], alora_invocation_tokens=INVOKE))
    with pytest.raises(RouteError, match=r"'lin'.*\(4, 5\).*9 tokens"):
        pooled(input_ids=prompts())


@torch.no_grad()
def test_a_layer_that_sees_all_tokens_in_one_row_knows_them() -> None:
    """As in mixtures of experts, which flatten rows and tokens before their router."""

    class Flat(nn.Module):
        def __init__(self, flat: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.lin, self.flat = nn.Embedding(48, 8), nn.Linear(8, 8), flat

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.table(input_ids)
            return self.lin(x.flatten(0, 1)).view_as(x) if self.flat else self.lin(x)

    outs = []
    for flat in (True, False):
        model = V.get_peft_model(Flat(flat), V.LoraConfig(target_modules=["lin"], alora_invocation_tokens=INVOKE))
        move(model, size=0.5)
        outs.append(model(input_ids=prompts()))
    torch.testing.assert_close(*outs)


# ---------------------------------------------------------------- generate


def greedy(model: Any, ids: Tensor, new: int, **kwargs: Any) -> Tensor:
    """What `generate` should give, from whole forwards of one row: the invocation is the prompt's, whatever is generated."""
    for _ in range(new):
        given = {k: [None if o is None else o + ids.shape[1] - 9 for o in v] if k == "alora_offsets" else v for k, v in kwargs.items()}
        logits = model(input_ids=ids, **given).logits[:, -1]
        logits[:, LLAMA["eos_token_id"]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("kind", ["alora", "poly"])
@torch.no_grad()
def test_generate(kind: str) -> None:
    model = alora() if kind == "alora" else poly()
    ids, tasks = prompts(), torch.tensor([0, 2, 1, 2])
    given: dict[str, Any] = {} if kind == "alora" else {"task_ids": tasks}
    manual = [
        {"alora_offsets": [None if s is None else 9 - s]} if kind == "alora" else {"task_ids": tasks[i : i + 1]}
        for i, s in enumerate(STARTS)
    ]
    expected = torch.cat([greedy(model, ids[i : i + 1], 5, **manual[i]) for i in range(4)])
    fixed: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        assert torch.equal(model.generate(input_ids=ids, **given, **fixed, **options), expected), options
    assert torch.equal(model.generate(ids, **given, **fixed), expected)
    padded = torch.nn.functional.pad(ids, (3, 0))
    got = model.generate(input_ids=padded, attention_mask=(padded > 0).long(), **given, **fixed)
    assert torch.equal(got[:, 3:], expected)
    assert torch.equal(
        model.generate(input_ids=ids[1:2], prompt_lookup_num_tokens=2, **{k: v[1:2] for k, v in given.items()}, **fixed), expected[1:2]
    )


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "use_cache": False}], ids=str
)
@torch.no_grad()
def test_generate_with_beams_is_that_of_each_row(options: dict[str, Any]) -> None:
    model, ids = alora(), prompts()
    model.add_adapter(
        "other", V.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[int(ids[2, 4])])
    )
    model.set_adapter("other")
    move(model, seed=3, size=0.5)
    model.set_adapter("default")
    fixed = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **options}
    n = options.get("num_return_sequences", 1)
    got = model.generate(input_ids=ids, **fixed)
    mixed = model.generate(input_ids=ids, adapter_names=["default", "other", "other", "__base__"], **fixed)
    offsets = model.generate(input_ids=ids, alora_offsets=[None if s is None else 9 - s for s in STARTS], **fixed)
    assert torch.equal(offsets, got)
    for i, name in enumerate(["default", "other", "other", "__base__"]):
        assert torch.equal(got[i * n : i * n + n], model.generate(input_ids=ids[i : i + 1], **fixed))
        with model.disable_adapter() if name == "__base__" else model.using(name):
            assert torch.equal(mixed[i * n : i * n + n], model.generate(input_ids=ids[i : i + 1], **fixed))


@torch.no_grad()
def test_alora_goes_on_from_the_cache_of_the_base() -> None:
    """What comes before the invocation is the base's, so that its cache serves: the point of aLoRA."""
    import copy

    model, ids = alora(), prompts()[:1]
    with model.disable_adapter():
        cache = model(input_ids=ids[:, :2], use_cache=True).past_key_values
    fixed: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(input_ids=ids, past_key_values=copy.deepcopy(cache), **fixed), model.generate(input_ids=ids, **fixed))
    rest = model(input_ids=ids[:, 2:], past_key_values=cache, alora_offsets=[7]).logits
    torch.testing.assert_close(rest, model(input_ids=ids).logits[:, 2:], atol=1e-5, rtol=0)


# ---------------------------------------------------------------- rows


@torch.no_grad()
def test_mixed_batches_equal_one_by_one() -> None:
    model, ids = alora(), prompts()
    model.add_adapter("late", V.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[int(ids[2, 7])]))
    model.add_adapter("plain", V.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    for i, name in enumerate(("late", "plain")):
        model.set_adapter(name)
        move(model, seed=3 + i, size=0.5)
    names = ["default", "__base__", "late", "plain"]
    got = model(input_ids=ids, adapter_names=names).logits
    for i, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else model.using(name):
            torch.testing.assert_close(got[i : i + 1], model(input_ids=ids[i : i + 1]).logits, atol=1e-6, rtol=0)
    with pytest.raises(RouteError, match="'lat'"):
        model(input_ids=ids, adapter_names=["lat", *names[1:]])
    one = poly()
    one.add_adapter("other", V.PolyConfig(r=2, n_tasks=2, n_skills=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    one.set_adapter("other")
    move(one, seed=7, size=0.5)
    names, tasks = ["default", "other", "__base__", "other"], torch.tensor([2, 0, 1, 1])
    got = one(input_ids=ids, adapter_names=names, task_ids=tasks).logits
    for i, name in enumerate(names):
        with one.disable_adapter() if name == "__base__" else one.using(name):
            torch.testing.assert_close(got[i : i + 1], one(input_ids=ids[i : i + 1], task_ids=tasks[i : i + 1]).logits, atol=1e-6, rtol=0)


def test_threads_do_not_see_each_other() -> None:
    """Two threads, other tasks and offsets in each: no output is the other's."""
    model, other, ids = poly(), alora(), prompts()
    rows = [torch.tensor(t) for t in ([0, 1, 2, 0], [2, 2, 1, 1])]
    offsets = [[3, None, 1, 9], [None, 5, 2, 1]]
    with torch.no_grad():
        expected = [
            (model(input_ids=ids, task_ids=r).logits, other(input_ids=ids, alora_offsets=o).logits)
            for r, o in zip(rows, offsets, strict=True)
        ]
    wrong: list[int] = []
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(15):
                a, b = model(input_ids=ids, task_ids=rows[i]).logits, other(input_ids=ids, alora_offsets=offsets[i]).logits
                wrong.extend([i] * (not (torch.equal(a, expected[i][0]) and torch.equal(b, expected[i][1]))))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# ---------------------------------------------------------------- recomputation


class Blocks(nn.Module):
    """Two layers, recomputed in the backward or not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 6), reentrant

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def _grads(reentrant: bool | None, scene: str) -> list[Tensor]:
    if scene == "lora":
        model: Any = V.get_peft_model(Blocks(reentrant), V.LoraConfig(r=2, target_modules=["a", "b"]))
        model.add_adapter("other", V.LoraConfig(r=2, target_modules=["a", "b"]))
        model.base_model.set_adapter(["default", "other"])
    else:
        model = V.get_peft_model(Blocks(reentrant), V.PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=["a", "b"]))
    move(model, size=0.5)
    model.eval()
    torch.manual_seed(3)
    x, z = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    if scene == "lora":
        with model.using("default"):
            first = model(x)
        with torch.no_grad(), model.disable_adapter():  # the reference model of preference training
            model(x)
        with model.using("other"):
            second = model(z)
        model.base_model.set_adapter(["default", "other"])
    else:
        first = model(x, task_ids=torch.tensor([0, 1, 0, 1]))
        with torch.no_grad():
            model(z, task_ids=torch.tensor([1, 1, 1, 1]))
        second = model(z, task_ids=torch.tensor([2, 2, 1, 0]))
    if scene == "thread":  # as on accelerators, where autograd has threads of its own
        worker = threading.Thread(target=(first.square().sum() + second.square().sum()).backward)
        worker.start()
        worker.join()
    elif scene == "apart":  # the older graph last
        second.square().sum().backward()
        first.square().sum().backward()
    else:
        (first.square().sum() + second.square().sum()).backward()
    return [p.grad for p in [*model.parameters(), x, z] if p.grad is not None]


@pytest.mark.parametrize("scene", ["together", "apart", "thread", "lora"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_knows_its_own_forward(reentrant: bool, scene: str) -> None:
    """Several forwards before the backward, with other tasks, other adapters and none: each is recomputed as it was."""
    plain, again = _grads(None, scene), _grads(reentrant, scene)
    assert len(plain) == len(again)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


@pytest.mark.parametrize("kind", ["alora", "poly"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_gradient_checkpointing(reentrant: bool, kind: str) -> None:
    def grads(on: bool) -> dict[str, Tensor]:
        model = alora() if kind == "alora" else poly()
        model.enable_input_require_grads()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            for m in model.modules():  # recomputed without the draws of training
                m.training = hasattr(m, "gradient_checkpointing")
        ids = prompts()
        more: Any = {} if kind == "alora" else {"task_ids": torch.tensor([0, 2, 1, 2])}
        model(input_ids=ids, labels=ids, use_cache=False, **more).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, again = grads(False), grads(True)
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], atol=1e-6, rtol=1e-5)


def test_rows_without_an_invocation_train_nothing() -> None:
    model = alora()
    model(input_ids=prompts()[2:3]).logits.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    model(input_ids=prompts()[:1]).logits.square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------- the seam itself


def test_what_a_call_tells() -> None:
    call = Call(nn.Linear(2, 2), "a", None, {"inputs_embeds": torch.zeros(3, 5, 2), "attention_mask": torch.ones(3, 5)}, {})
    assert (call.rows, call.shape, call.before) == (3, (3, 5), 0)
    assert Call(nn.Linear(2, 2), "a", None, {"x": torch.zeros(3, 5)}, {}).shape == (3, 1)
    assert Call(nn.Linear(2, 2), "a", None, {"x": torch.zeros(3, 5).long()}, {}).rows is None
    with pytest.raises(RouteError, match="no tensor"):
        _ = Call(nn.Linear(2, 2), "a", None, {}, {}).shape


def test_facts_of_another_number_of_rows_are_an_error() -> None:
    with pytest.raises(RouteError, match="`task_ids` tells of 3 rows, and the batch has 4"):
        poly()(input_ids=prompts(), task_ids=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "square", "by row"])
def test_the_rows_of_an_attentions_masks_and_weights(mask: str, first: bool, whole: bool) -> None:
    """They come first whatever `batch_first` says, and a mask (tokens, tokens) has none, also where there are as many tokens as rows."""
    rows = ["a", BASE, "a"]
    n = len(rows)
    torch.manual_seed(0)
    config = V.LoraConfig(r=2, target_modules=["1"] if whole else ["0"], modules_to_save=["0"] if whole else None, init_lora_weights=False)
    net = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=first), nn.Linear(2, 2))
    model = V.get_peft_model(net, config, "a").eval()
    move(model)
    x = torch.randn(n, n, 8)
    causal = torch.ones(n, n, dtype=torch.bool).triu(1)
    given = {
        "none": {},
        "padding": {"key_padding_mask": torch.arange(n) >= torch.tensor([[3], [2], [1]])},
        "square": {"attn_mask": causal},
        "by row": {"attn_mask": (torch.arange(n) >= torch.tensor([3, 2, 1]).repeat_interleave(2).view(-1, 1, 1)).expand(-1, n, -1)},
    }[mask]
    attention, dim = net[0], 0 if first else 1
    with mixed(model, rows):
        y, w = attention(x, x, x, **given)
    with model.using("a"):
        ya, wa = attention(x, x, x, **given)
    with model.disable_adapter():
        yb, wb = attention(x, x, x, **given)
    for i, row in enumerate(rows):
        torch.testing.assert_close(y.select(dim, i), (ya if row == "a" else yb).select(dim, i))
        torch.testing.assert_close(w[i], (wa if row == "a" else wb)[i])
