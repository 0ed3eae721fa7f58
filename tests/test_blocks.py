"""Whole modules: LN tuning, the adaption prompt and ShadowPEFT, against computations that can be read."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import veneer
from veneer import AdaptionPromptConfig, LNTuningConfig, ShadowConfig, get_peft_model
from veneer.errors import ConfigError, LoadError, MergeError, NoMatchingPeftModuleError, PeftWarning, RouteError

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def llama(kind: str = "LlamaForCausalLM", **more: Any) -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**SIZES, **more})
    config._attn_implementation = more.get("attn", "sdpa")
    return getattr(transformers, kind)(config).eval()


def gpt2() -> Any:
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=None)
    ).eval()


def ids(rows: int = 3, length: int = 7) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(5))


def move(model: nn.Module, size: float = 0.3, seed: int = 7) -> None:
    """Add noise to what trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * size)


def stepwise(model: Any, x: Tensor, n: int = 5) -> Tensor:
    """Greedy decoding with a cache, one forward a token."""
    with torch.no_grad():
        out = model(input_ids=x, use_cache=True)
        for _ in range(n):
            token = out.logits[:, -1:].argmax(-1)
            x = torch.cat([x, token], 1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return x


def whole(model: Any, x: Tensor, n: int = 5) -> Tensor:
    """The same without a cache."""
    with torch.no_grad():
        for _ in range(n):
            x = torch.cat([x, model(input_ids=x, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return x


def rows_are_as_alone(model: Any, names: list[str], x: Tensor) -> None:
    with torch.no_grad():
        got = model(input_ids=x, adapter_names=names).logits
        for i, name in enumerate(names):
            with model.disable_adapter() if name == "__base__" else model.using(name):
                torch.testing.assert_close(got[i], model(input_ids=x[i : i + 1]).logits[0], atol=1e-6, rtol=0)


def threads_do_not_meet(model: Any, x: Tensor) -> None:
    """Two threads with different adapters, over and over."""
    with torch.no_grad():
        expected = {}
        for name in ("default", "b"):
            with model.using(name):
                expected[name] = model(input_ids=x).logits
    wrong: list[str] = []

    def run(name: str) -> None:
        with torch.no_grad(), model.using(name):
            for _ in range(15):
                if not torch.equal(model(input_ids=x).logits, expected[name]):
                    wrong.append(name)

    workers = [threading.Thread(target=run, args=(name,)) for name in ("default", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def gradients(model: Any, x: Tensor, **kwargs: Any) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(input_ids=x, labels=x, **kwargs).loss.backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


# -------------------------------------------------------------------- LN tuning


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inward, self.bn = nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 5)
        nn.init.normal_(self.bn.running_mean)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.bn(self.inward(x)).relu().mean(-1)))  # type: ignore[no-any-return]


TARGETS = ["bn", "inward", "block"]


def normed(**fields: Any) -> Any:
    return get_peft_model(Normed().eval(), LNTuningConfig(target_modules=TARGETS, **fields))


def test_ln_tuning_is_the_module_with_the_tensors_of_the_file(tmp_path: Path) -> None:
    model = normed()
    move(model)
    model.save_pretrained(tmp_path)
    plain, x = Normed().eval(), torch.randn(3, 4, 9)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    state = {
        k.removeprefix("base_model.model.").replace("ln_tuning_layers.default.", "").replace("ln_tuning_layers.", ""): v
        for k, v in tensors.items()
    }
    assert set(state) == {k for k in plain.state_dict() if not k.startswith("head")}
    plain.load_state_dict(state, strict=False)
    torch.testing.assert_close(model(x), plain(x), atol=0, rtol=0)
    assert "base_model.model.block.ln_tuning_layers.default.0.weight" in tensors  # as PEFT writes modules in modules
    again = veneer.PeftModel.from_pretrained(Normed().eval(), tmp_path, adapter_name="other")
    assert torch.equal(again(x), model(x))


def test_running_statistics_are_the_copys_own() -> None:
    model = normed()
    base = {k: v.clone() for k, v in model.state_dict().items() if "base_layer" in k}
    x = torch.randn(6, 4, 9)
    plain = Normed().train()
    plain(x)
    model.train()
    model(x)
    stats = model.get_base_model().bn.ln_tuning_layers.default
    assert torch.equal(stats.running_mean, plain.bn.running_mean) and stats.num_batches_tracked == 1
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items())
    model.eval()
    adapted = model(x)
    model.merge_adapter()
    assert torch.equal(model.get_base_model().bn.base_layer.running_mean, plain.bn.running_mean) and torch.equal(model(x), adapted)
    with model.disable_adapter():
        assert torch.equal(model(x), Normed().eval()(x))
    model.unmerge_adapter()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items())
    assert torch.equal(normed().merge_and_unload()(x), Normed().eval()(x))


@pytest.mark.parametrize("trainable", [False, True])
def test_the_modules_dtype_stays_whatever_the_file_has(trainable: bool, tmp_path: Path) -> None:
    normed(modules_to_save=["head"]).save_pretrained(tmp_path)  # in float32
    low = Normed().eval().to(torch.bfloat16)
    model = veneer.PeftModel.from_pretrained(low, tmp_path, is_trainable=trainable).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    y = model(torch.randn(2, 4, 9).to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    fresh = get_peft_model(Normed().to(torch.bfloat16), LNTuningConfig(target_modules=["bn"]))
    assert {p.dtype for p in fresh.parameters() if p.requires_grad} == {torch.bfloat16}


def test_one_whole_copy_acts_at_a_time_and_nothing_inside_it_is_adapted() -> None:
    model = normed()
    model.add_adapter("b", LNTuningConfig(target_modules=["bn"]))
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(RouteError, match="one can at a time"):
        model(torch.randn(2, 4, 9))
    with pytest.raises(RouteError, match="one can at a time"):
        model.merge_adapter()
    for first, second in (("block", "block.0"), ("block.0", "block")):
        inner = get_peft_model(Normed(), LNTuningConfig(target_modules=[first]))
        before = inner.state_dict().keys()
        with pytest.raises(ConfigError, match=r"'block' is trained as a whole, so 'block\."):
            inner.add_adapter("b", LNTuningConfig(target_modules=[second]))
        assert inner.state_dict().keys() == before
    with pytest.raises(ConfigError, match="trained as a whole"):
        get_peft_model(Normed(), LNTuningConfig(target_modules=["block", "block.1"]))
    with pytest.raises(ConfigError, match="ReLU"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), LNTuningConfig(target_modules=["1"]))


def test_ln_tuning_has_its_targets_by_model_type() -> None:
    model = get_peft_model(llama(), LNTuningConfig(task_type="CAUSAL_LM"))
    names = [s.name for s in model.get_layer_status()]
    assert names == [f"model.model.layers.{i}.{n}" for i in range(3) for n in ("input_layernorm", "post_attention_layernorm")] + [
        "model.model.norm"
    ]
    assert model.get_layer_status()[0].module_type == "ln_tuning.LlamaRMSNorm"
    move(model)
    assert torch.equal(model.generate(input_ids=ids(), **GREEDY), whole(model, ids()))
    grads = gradients(model, ids())
    assert grads and all(g is not None and bool(g.any()) for g in grads.values())
    bare = veneer.inject_adapter_in_model(LNTuningConfig(target_modules=["norm"]), llama())
    assert list(veneer.get_peft_model_state_dict(bare)) == ["model.norm.ln_tuning_layers.weight"]


def test_modules_with_a_cache_are_not_split_into_rows() -> None:
    """Two rows with two adapters would have written one after the other into the same cache, and seen each other."""
    model = get_peft_model(llama(), LNTuningConfig(target_modules=["self_attn"]))
    model.add_adapter("b", LNTuningConfig(target_modules=["self_attn"]))
    with torch.no_grad():
        with pytest.raises(RouteError, match="writes into a cache"):
            model(input_ids=ids(2), adapter_names=["default", "b"])
        got = model(input_ids=ids(2), adapter_names=["default", "b"], use_cache=False).logits
        torch.testing.assert_close(got, llama()(input_ids=ids(2)).logits, atol=1e-6, rtol=0)


# -------------------------------------------------------------------- adaption prompt


def prompted(base: Any = None, layers: int = 2, **more: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(base or llama(), AdaptionPromptConfig(adapter_len=4, adapter_layers=layers, task_type="CAUSAL_LM", **more))
    move(model)
    return model.eval()


def two_prompted() -> Any:
    model = prompted()
    model.add_adapter("b", AdaptionPromptConfig(adapter_len=2, adapter_layers=3))
    model.set_adapter("b")
    move(model, seed=8)
    model.set_adapter("default")
    return model


def turned(x: Tensor) -> Tensor:
    """Llama's rotation of (batch, heads, tokens, size): pairs of half the size apart are complex numbers."""
    half, t = x.shape[-1] // 2, x.shape[-2]
    angles = torch.arange(t)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_adaption_prompt_adds_attention_to_its_tokens(attn: str) -> None:
    model = prompted(llama(attn=attn))
    layer = model.get_base_model().model.layers[2].self_attn
    seen: dict[str, Tensor] = {}
    layer.base_layer.register_forward_pre_hook(lambda m, a, k: seen.update(x=k["hidden_states"]), with_kwargs=True)
    layer.base_layer.register_forward_hook(lambda m, a, y: seen.update(base=y[0]))
    layer.register_forward_hook(lambda m, a, y: seen.update(adapted=y[0]))
    with torch.no_grad():
        model(input_ids=ids())
        p, g, a = layer.adaption_prompt["default"][0], layer.adaption_gate["default"], layer.base_layer
        q = turned(a.q_proj(seen["x"]).unflatten(-1, (4, 8)).transpose(1, 2))
        expected = torch.zeros_like(seen["base"])
        for head in range(4):
            group = slice(head // 2 * 8, head // 2 * 8 + 8)  # two query heads on one key head
            k, v = a.k_proj(p)[:, group], a.v_proj(p)[:, group]
            z = torch.zeros(*seen["x"].shape[:2], 32)
            z[..., head * 8 : head * 8 + 8] = g * torch.softmax(q[:, head] @ k.T / 8**0.5, -1) @ v
            expected += a.o_proj(z)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(seen["adapted"] - seen["base"], expected, atol=1e-6, rtol=0)


def test_behind_a_fused_projection_it_is_added_as_it_is() -> None:
    model = prompted(gpt2())
    layer = model.get_base_model().transformer.h[2].attn
    assert layer.site.fused
    seen: dict[str, Tensor] = {}
    layer.base_layer.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    layer.base_layer.register_forward_hook(lambda m, a, y: seen.update(base=y[0]))
    layer.register_forward_hook(lambda m, a, y: seen.update(adapted=y[0]))
    with torch.no_grad():
        model(input_ids=ids())
        p, g = layer.adaption_prompt["default"][0], layer.adaption_gate["default"]
        q, (_, k, v) = layer.base_layer.c_attn(seen["x"]).chunk(3, -1)[0], layer.base_layer.c_attn(p).chunk(3, -1)
        heads = [slice(8 * i, 8 * i + 8) for i in range(4)]
        expected = torch.cat([g * torch.softmax(q[..., h] @ k[:, h].T / 8**0.5, -1) @ v[:, h] for h in heads], -1)
    torch.testing.assert_close(seen["adapted"] - seen["base"], expected, atol=1e-6, rtol=0)


def test_an_untrained_prompt_changes_nothing_although_o_has_a_bias() -> None:
    base = llama(attention_bias=True)
    for attention in (layer.self_attn for layer in base.model.layers):
        nn.init.normal_(attention.o_proj.bias)
    y = base(input_ids=ids()).logits
    model = get_peft_model(base, AdaptionPromptConfig(adapter_len=4, adapter_layers=3))
    torch.testing.assert_close(model(input_ids=ids()).logits, y, atol=1e-6, rtol=0)


def test_every_operation_of_adaption_prompts() -> None:
    x = ids()
    model = two_prompted()
    config = model.peft_config["default"]
    assert (config.target_modules, config.is_adaption_prompt, type(model.base_model).__name__) == ("self_attn", True, "AdaptionPromptModel")
    assert [s.name for s in model.get_layer_status()] == [f"model.model.layers.{i}.self_attn" for i in range(3)]
    with torch.no_grad():
        base, first = llama()(input_ids=x).logits, model(input_ids=x).logits
        model.set_adapter("b")
        second = model(input_ids=x).logits
        assert not torch.equal(first, second)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            f"base_model.model.model.layers.{i}.self_attn.{leaf}.b" for i in range(3) for leaf in ("adaption_prompt", "adaption_gate")
        }
        with model.using("default"):
            assert torch.equal(model(input_ids=x).logits, first)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=x).logits, base)
        model.base_model.set_adapter(["default", "b"])  # each adds its own
        assert not torch.equal(model(input_ids=x).logits, second)
        model.set_adapter("default")
        rows_are_as_alone(model, ["b", "default", "__base__"], x)
        for name in ("merge_adapter", "merge_and_unload"):
            with pytest.raises(MergeError, match="depends on the input"):
                getattr(model, name)()
        assert not model.supports_lora_conversion()
        with pytest.warns(PeftWarning, match="Setting active adapter to b"):
            model.delete_adapter("default")
        assert torch.equal(model(input_ids=x).logits, second)
        assert torch.equal(model.unload()(input_ids=x).logits, base)


def test_adaption_prompts_are_saved_without_their_name(tmp_path: Path) -> None:
    model = two_prompted()
    model.save_pretrained(tmp_path)
    keys = {f"base_model.model.model.layers.{i}.self_attn.{leaf}" for i in (1, 2) for leaf in ("adaption_prompt", "adaption_gate")}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == keys
    again = veneer.PeftModel.from_pretrained(llama(), tmp_path / "b", adapter_name="x")
    again.load_adapter(tmp_path, "y")
    for mine, theirs in (("x", "b"), ("y", "default")):
        with torch.no_grad(), again.using(mine), model.using(theirs):
            assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)
    bare = veneer.inject_adapter_in_model(AdaptionPromptConfig(adapter_len=4, adapter_layers=2), llama())
    veneer.set_peft_model_state_dict(bare, load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(bare(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_gradients_reach_the_prompts_alone_and_are_the_same_under_checkpointing() -> None:
    fresh = get_peft_model(llama(), AdaptionPromptConfig(adapter_len=4, adapter_layers=2))
    for name, g in gradients(fresh, ids()).items():
        assert g is not None and bool(g.any()) == name.endswith("gate.default"), name  # the gate is zero: the prompt waits for it
    plain = gradients(prompted().train(), ids())
    assert len(plain) == 4 and all(g is not None and bool(g.any()) for g in plain.values())
    for reentrant in (False, True):
        model = prompted().train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for name, g in gradients(model, ids()).items():
            torch.testing.assert_close(g, plain[name], atol=1e-7, rtol=0)


@pytest.mark.parametrize("base", [llama, gpt2])
def test_prompted_generation(base: Any) -> None:
    model, x = prompted(base()), ids()
    expected = whole(model, x)
    assert torch.equal(model.generate(input_ids=x, **GREEDY), expected) and torch.equal(stepwise(model, x), expected)
    model.add_adapter("b", AdaptionPromptConfig(adapter_len=2, adapter_layers=1))
    model.set_adapter("b")
    move(model, seed=8)
    got = model.generate(input_ids=x, adapter_names=["default", "b", "__base__"], num_beams=2, **GREEDY)
    for i, name in enumerate(["default", "b"]):
        with model.using(name):
            assert torch.equal(got[i], model.generate(input_ids=x[i : i + 1], num_beams=2, **GREEDY)[0])


def test_adaption_prompts_in_threads() -> None:
    threads_do_not_meet(two_prompted(), ids())


def test_adaption_prompt_in_bfloat16() -> None:
    model = get_peft_model(llama().to(torch.bfloat16), AdaptionPromptConfig(adapter_len=4, adapter_layers=2))
    move(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    y = model(input_ids=ids()).logits
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), prompted_like(model)(input_ids=ids()).logits, atol=0.1, rtol=0)


def prompted_like(low: Any) -> Any:
    """The same adapter on the base model in float32."""
    model = get_peft_model(llama(), AdaptionPromptConfig(adapter_len=4, adapter_layers=2))
    model.load_state_dict({k: v.float() for k, v in low.state_dict().items()})
    return model


def _modern(name: str, **more: Any) -> Any:
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**{**SIZES, **more})).eval()


@pytest.mark.parametrize("name", ["Mistral", "Qwen3", "Gemma2", "Olmo2"])
def test_attention_is_known_by_its_shape(name: str) -> None:
    """Norms of heads and of all heads together, other scales: the prompt that is a copy of a token's own place is seen as such."""
    model = get_peft_model(_modern(name, head_dim=8), AdaptionPromptConfig(adapter_len=3, adapter_layers=2))
    with torch.no_grad():
        base = _modern(name, head_dim=8)(input_ids=ids()).logits
        torch.testing.assert_close(model(input_ids=ids()).logits, base, atol=1e-6, rtol=0)
        move(model)
        assert torch.equal(model.generate(input_ids=ids(), **GREEDY), whole(model, ids()))


def test_what_is_no_such_attention_is_refused() -> None:
    neo = transformers.GPTNeoConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
    with pytest.raises(ConfigError, match="does not compute softmax"):  # no scale, which nothing in its shape tells
        get_peft_model(
            transformers.GPTNeoForCausalLM(neo), AdaptionPromptConfig(target_modules="attention", adapter_len=2, adapter_layers=1)
        )
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(ConfigError, match="no attention of a known shape"):
        get_peft_model(bert, AdaptionPromptConfig(adapter_len=2, adapter_layers=1))
    with pytest.raises(ConfigError, match="BertSelfAttention"):
        get_peft_model(bert, AdaptionPromptConfig(target_modules="self", adapter_len=2, adapter_layers=1))
    base = llama()
    keys = base.state_dict().keys()
    for fields, text in (
        ({"adapter_len": 2, "adapter_layers": 4}, "more adapter layers '4' than the model has '3'"),
        ({"adapter_len": 2}, "needs adapter_layers"),
        ({"adapter_len": 2, "adapter_layers": 1, "target_modules": "self_atn"}, "Did you mean 'self_attn'"),
    ):
        with pytest.raises(ConfigError, match=text):
            get_peft_model(base, AdaptionPromptConfig(**fields))  # type: ignore[arg-type]
    assert base.state_dict().keys() == keys and all(p.requires_grad for p in base.parameters())
    for fields in ({"adapter_len": 0}, {"adapter_layers": 1.5}, {"target_modules": ["self_attn"]}):
        with pytest.raises(ConfigError):
            AdaptionPromptConfig(**fields)  # type: ignore[arg-type]


def test_a_head_that_nothing_trains_is_told() -> None:
    with pytest.warns(PeftWarning, match="head stays frozen"):
        get_peft_model(llama("LlamaForSequenceClassification"), AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="SEQ_CLS"))


# -------------------------------------------------------------------- shadow


def shadowed(base: Any = None, **fields: Any) -> Any:
    torch.manual_seed(0)
    fields = {"task_type": "CAUSAL_LM", "r": 4, "shadow_alpha": 0.7, "shadow_dropout": 0.0, **fields}
    model = get_peft_model(base or llama(), ShadowConfig(**fields))
    move(model)
    return model.eval()


def two_shadowed() -> Any:
    model = shadowed()
    model.add_adapter("b", ShadowConfig(task_type="CAUSAL_LM", r=3, shadow_hidden_size=16, shadow_num_attention_heads=2))
    model.set_adapter("b")
    move(model, seed=8)
    model.set_adapter("default")
    return model


@torch.no_grad()
def by_hand(model: Any, base: Any, x: Tensor, adapter: str = "default", blocks: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    """Logits of a Llama with a shadow, block by block, from the tensors of a file's names."""
    t = {k: v for k, v in model.state_dict().items() if f".{adapter}." in k}
    shadow = model.base_model.shadow_backbone[adapter]
    h = base.model.embed_tokens(x)
    own = "embed_tokens" in shadow._modules
    s = (shadow(input_ids=x) if own else shadow(inputs_embeds=h)).last_hidden_state
    p = t.get(f"base_model.shadow_projection.{adapter}.weight")
    s = s if p is None else s @ p.T
    turn = base.model.rotary_emb(h, torch.arange(x.shape[1])[None])
    for i, block in enumerate(base.model.layers):

        def leaf(name: str, i: int = i) -> Tensor:
            return t[f"base_model.model.model.layers.{i}.shadow_{name}"]

        if i in blocks:
            h = h + model.peft_config[adapter].shadow_alpha * (h - s) @ leaf(f"down.{adapter}.weight").T @ leaf(f"up.{adapter}.weight").T
        h = block(h, position_embeddings=turn)
        if i in blocks:
            two = [
                F.linear(F.gelu(F.linear(h, leaf(f"{n}.0.weight"), leaf(f"{n}.0.bias"))), leaf(f"{n}.2.weight"), leaf(f"{n}.2.bias"))
                for n in (f"update_transform.{adapter}", f"update_gate.{adapter}")
            ]
            g = torch.sigmoid(two[1])
            s = (1 - g) * s + g * two[0]
    logits: Tensor = base.lm_head(base.model.norm(h))
    return logits


@pytest.mark.parametrize(
    ("fields", "blocks"),
    [
        ({}, (0, 1, 2)),
        ({"share_embeddings": False, "update_hidden_size": 6}, (0, 1, 2)),
        (
            {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_num_hidden_layers": 2, "shadow_intermediate_size": 20},
            (0, 1, 2),
        ),
        ({"target_modules": r".*layers\.[12]"}, (1, 2)),
        ({"layers_to_transform": [0, 1]}, (0, 1)),
        ({"target_modules": ["0", "1"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}, (0, 1)),
    ],
)
def test_the_shadow_goes_from_block_to_block(fields: dict[str, Any], blocks: tuple[int, ...]) -> None:
    model, base, x = shadowed(**fields), llama(), ids()
    expected = by_hand(model, base, x, blocks=blocks)
    out = model(input_ids=x, output_hidden_states=True)
    assert float((expected - base(input_ids=x).logits).detach().abs().max()) > 1e-2
    torch.testing.assert_close(out.logits, expected, atol=2e-6, rtol=0)
    assert all(isinstance(h, Tensor) for h in out.hidden_states)


def test_a_fresh_shadow_changes_nothing_and_the_last_update_that_nobody_reads_does_not_train() -> None:
    model = get_peft_model(llama(), ShadowConfig(task_type="CAUSAL_LM"))
    torch.testing.assert_close(model.eval()(input_ids=ids()).logits, llama()(input_ids=ids()).logits, atol=1e-6, rtol=0)
    trained = {n for n, p in shadowed().named_parameters() if p.requires_grad}
    assert not any("layers.2.shadow_update" in n for n in trained) and any("layers.1.shadow_update" in n for n in trained)
    for base in (llama(), gpt2()):
        grads = gradients(shadowed(base).train(), ids())
        assert all(g is not None and bool(g.any()) for g in grads.values()), [n for n, g in grads.items() if g is None]


def test_the_loss_has_that_of_the_shadow_alone_in_it() -> None:
    model, x = shadowed(auxiliary_loss_weight=0.5), ids()
    labels = x.masked_fill(x % 3 == 0, -100)
    logits = model(input_ids=x).logits
    out = model(input_ids=x, labels=labels)
    assert torch.equal(model.base_model.last_shadow_loss, out.shadow_loss) and not out.shadow_loss.requires_grad
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    alone = model.unload_shadow()(input_ids=x, labels=labels).loss
    torch.testing.assert_close(out.shadow_loss, alone)
    torch.testing.assert_close(out.loss, plain + 0.5 * alone)
    as_tuple = model(input_ids=x, labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], out.loss)
    # gradients accumulated over parts of a batch: each part's share of all that counts
    items = int((labels[:, 1:] != -100).sum())
    parts = [model(input_ids=x[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items) for i in range(3)]
    torch.testing.assert_close(sum(p.shadow_loss for p in parts), alone)
    torch.testing.assert_close(sum(p.loss for p in parts), out.loss)
    off = shadowed(auxiliary_loss_weight=0.0)
    out = off(input_ids=x, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(off(input_ids=x).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    with off.disable_adapter():
        assert not hasattr(off(input_ids=x, labels=labels), "shadow_loss")


def test_losses_of_a_mixed_batch() -> None:
    model, x = two_shadowed(), ids()
    names = ["default", "b", "default"]
    total = 0.0
    for i, name in enumerate(names):
        with model.using(name):
            total = total + model(input_ids=x[i : i + 1], labels=x[i : i + 1]).loss / 3
    torch.testing.assert_close(model(input_ids=x, labels=x, adapter_names=names).loss, total)


@pytest.mark.parametrize("fields", [{}, {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2}, {"modules_to_save": ["lm_head"]}])
def test_the_shadow_alone_is_a_model_of_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    model, x = shadowed(**fields), ids()
    small = model.unload_shadow()
    assert type(small) is type(model.get_base_model()) and small.config.num_hidden_layers == 1
    assert torch.equal(small.generate(input_ids=x, **GREEDY), whole(small, x))
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=x).logits, small(input_ids=x).logits, atol=1e-6, rtol=0)
    keys = model.state_dict().keys()
    apart = model.unload_shadow(copy=True)
    with torch.no_grad():
        for p in apart.parameters():
            p.zero_()
    torch.testing.assert_close(model.unload_shadow("default")(input_ids=x).logits, again(input_ids=x).logits, atol=1e-6, rtol=0)
    assert model.state_dict().keys() == keys
    with pytest.raises(RouteError, match="no adapter 'x'"):
        model.unload_shadow("x")


def test_every_operation_of_shadows(tmp_path: Path) -> None:
    x = ids()
    model = two_shadowed()
    assert type(model.base_model).__name__ == "ShadowModel" and len(model.get_layer_status()) == 3
    with torch.no_grad():
        base, first = llama()(input_ids=x).logits, model(input_ids=x).logits
        model.set_adapter("b")
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all(".b." in n or n.endswith(".b") for n in trained) and any("shadow_backbone" in n for n in trained)
        second = model(input_ids=x).logits
        torch.testing.assert_close(second, by_hand(model, llama(), x, "b"), atol=2e-6, rtol=0)
        with model.using("default"):
            assert torch.equal(model(input_ids=x).logits, first)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=x).logits, base)
        model.save_pretrained(tmp_path)
        again = veneer.PeftModel.from_pretrained(llama(), tmp_path / "b", adapter_name="c", low_cpu_mem_usage=True)
        again.load_adapter(tmp_path, "d")
        assert torch.equal(again(input_ids=x).logits, second) and not any(p.requires_grad for p in again.parameters())
        again.set_adapter("d")
        assert torch.equal(again(input_ids=x).logits, first)
        assert all(p.requires_grad for n, p in again.named_parameters() if "shadow_backbone.d" in n)
        model.base_model.set_adapter(["default", "b"])
        with pytest.raises(RouteError, match="exactly one active adapter"):
            model(input_ids=x)
        model.set_adapter("default")
        for name in ("merge_adapter", "merge_and_unload"):
            with pytest.raises(MergeError, match="unload_shadow"):
                getattr(model, name)()
        model.delete_adapter("b")
        assert not any(".b." in n for n in model.state_dict()) and list(model.base_model.parts) == ["default"]
        assert torch.equal(model(input_ids=x).logits, first)
        assert torch.equal(model.unload()(input_ids=x).logits, base)


def test_files_say_default_whatever_the_adapters_name(tmp_path: Path) -> None:
    model = two_shadowed()
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "b"):
        keys = load_file(folder / "adapter_model.safetensors").keys()
        assert all(".default." in k for k in keys) and any(k.startswith("base_model.shadow_backbone.default.layers.0.") for k in keys)
    assert "base_model.shadow_projection.default.weight" in keys
    with pytest.raises(LoadError, match="nothing was loaded"):
        part = {k: v for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "shadow_backbone" not in k}
        save_file(part, tmp_path / "adapter_model.safetensors")
        veneer.PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("base", [llama, gpt2])
def test_shadowed_generation(base: Any) -> None:
    model, x = shadowed(base()), ids()
    expected = whole(model, x)
    assert torch.equal(model.generate(input_ids=x, **GREEDY), expected) and torch.equal(stepwise(model, x), expected)
    assert torch.equal(model.generate(input_ids=x[:1], prompt_lookup_num_tokens=2, **GREEDY), expected[:1])  # rolls the cache back
    beams = model.generate(input_ids=x, num_beams=3, **GREEDY)  # reorders it
    assert torch.equal(beams, model.generate(input_ids=x, num_beams=3, use_cache=False, **GREEDY))
    if base is llama:
        assert torch.equal(model.generate(input_ids=x, cache_implementation="static", **GREEDY), expected)
    padded, mask = x.clone(), torch.ones_like(x)
    padded[0, :3], mask[0, :3] = 0, 0
    got = model.generate(input_ids=padded, attention_mask=mask, **GREEDY)
    assert torch.equal(got[0, 3:], model.generate(input_ids=x[:1, 3:], **GREEDY)[0])


def test_shadows_in_a_mixed_batch_and_in_threads() -> None:
    model, x = two_shadowed(), ids()
    rows_are_as_alone(model, ["b", "default", "__base__"], x)
    for beams in (1, 2):
        got = model.generate(input_ids=x, adapter_names=["b", "default", "__base__"], num_beams=beams, **GREEDY)
        for i, name in enumerate(["b", "default"]):
            with model.using(name):
                assert torch.equal(got[i], model.generate(input_ids=x[i : i + 1], num_beams=beams, **GREEDY)[0])
    threads_do_not_meet(model, x)


def test_a_cache_that_the_shadow_has_not_seen_is_refused() -> None:
    model, x = two_shadowed(), ids()
    with torch.no_grad():
        with model.using("b"):
            cache = model(input_ids=x, use_cache=True).past_key_values
        with pytest.raises(RouteError, match="7 tokens that the adapter 'default' has not seen"):
            model(input_ids=x[:, :1], past_key_values=cache, use_cache=True)
        with model.using("b"):
            model(input_ids=x[:, :1], past_key_values=copy.deepcopy(cache), use_cache=True)


def test_shadow_gradients_under_checkpointing() -> None:
    plain = gradients(shadowed().train(), ids())
    for reentrant in (False, True):
        model = shadowed().train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for name, g in gradients(model, ids()).items():
            torch.testing.assert_close(g, plain[name], atol=1e-6, rtol=0)
    model = shadowed().train()  # whole blocks run again, wrapper and all, as FSDP does it
    for layer in model.get_base_model().model.layers:
        forward = layer.forward
        layer.forward = lambda *a, forward=forward, **k: checkpoint(forward, *a, use_reentrant=False, **k)
    for name, g in gradients(model, ids(), use_cache=False).items():
        torch.testing.assert_close(g, plain[name], atol=1e-6, rtol=0)


def test_a_shadowed_model_is_copied_after_a_call_with_gradients() -> None:
    model = shadowed()
    loss = model(input_ids=ids(), labels=ids()).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(input_ids=ids(), labels=ids()).loss, loss)


def test_shadow_in_bfloat16() -> None:
    model = get_peft_model(llama().to(torch.bfloat16), ShadowConfig(task_type="CAUSAL_LM", r=4, shadow_alpha=1.0))
    move(model, 0.1)
    assert {p.dtype for n, p in model.named_parameters() if "layers.0.shadow" in n and "backbone" not in n} == {torch.float32}
    assert {p.dtype for p in model.base_model.shadow_backbone.default.parameters()} == {torch.bfloat16}
    out = model(input_ids=ids(), labels=ids())
    out.loss.backward()
    wide = get_peft_model(llama(), ShadowConfig(task_type="CAUSAL_LM", r=4, shadow_alpha=1.0))
    wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    torch.testing.assert_close(model.eval()(input_ids=ids()).logits.float(), wide.eval()(input_ids=ids()).logits, atol=0.15, rtol=0)
    assert model.generate(input_ids=ids(), **GREEDY).shape == (3, 12)


def test_a_file_does_not_change_the_dtype_that_the_small_network_computes_in(tmp_path: Path) -> None:
    shadowed().save_pretrained(tmp_path)
    model = veneer.PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path)
    assert {p.dtype for p in model.base_model.shadow_backbone.default.parameters()} == {torch.bfloat16}
    assert model(input_ids=ids()).logits.dtype == torch.bfloat16


def test_dropout_acts_in_training_only() -> None:
    model = shadowed(shadow_dropout=0.9)
    assert torch.equal(model(input_ids=ids()).logits, shadowed()(input_ids=ids()).logits)
    model.train()
    assert not torch.equal(model(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_a_shadow_of_a_classifier() -> None:
    base = llama("LlamaForSequenceClassification", num_labels=3)
    model, x, labels = shadowed(base, task_type="SEQ_CLS", auxiliary_loss_weight=0.5), ids(), torch.tensor([0, 2, 1])
    out = model(input_ids=x, labels=labels)
    alone = model.unload_shadow()(input_ids=x, labels=labels)
    torch.testing.assert_close(out.shadow_loss, alone.loss)
    torch.testing.assert_close(out.loss, F.cross_entropy(model(input_ids=x).logits, labels) + 0.5 * alone.loss)
    padded, mask = torch.cat([x, x.new_zeros(3, 2)], 1), torch.cat([torch.ones_like(x), x.new_zeros(3, 2)], 1)
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask, labels=labels).shadow_loss, alone.loss)
    assert {n for n, _ in model.named_parameters() if "score" in n or "head" in n} == {
        "base_model.model.score.original_module.weight", "base_model.model.score.modules_to_save.default.weight",
        "base_model.shadow_head.default.weight",
    }  # fmt: skip
    model.add_adapter("b", ShadowConfig(task_type="SEQ_CLS", r=2))  # PEFT refuses a second one
    model.set_adapter("b")
    assert torch.isfinite(model(input_ids=x, labels=labels).loss)


def test_a_pretrained_shadow(tmp_path: Path) -> None:
    torch.manual_seed(3)
    small = transformers.LlamaModel(transformers.LlamaConfig(**{**SIZES, "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 4}))
    small.save_pretrained(tmp_path / "plain")
    model = shadowed(shadow_model=str(tmp_path / "plain"), init_weights=True)
    held = model.base_model.shadow_backbone.default
    assert not held.embed_tokens.weight.requires_grad and held.layers[0].mlp.up_proj.weight.requires_grad
    assert torch.equal(held.embed_tokens.weight, small.embed_tokens.weight)
    torch.testing.assert_close(model(input_ids=ids()).logits, by_hand(model, llama(), ids()), atol=2e-6, rtol=0)
    # one that brings a projection with it
    folder = tmp_path / "projected"
    folder.mkdir()
    p = torch.randn(32, 16)
    tensors = {f"shadow_model.{k}": v.contiguous() for k, v in small.state_dict().items()}
    save_file({**tensors, "shadow_hidden_projection.weight": p}, folder / "model.safetensors")
    inner = {k: v for k, v in small.config.to_dict().items() if k != "dtype"}
    (folder / "config.json").write_text(json.dumps({"model_type": "causal_lm_with_hidden_projection", "shadow_model_config": inner}))
    fresh = get_peft_model(llama(), ShadowConfig(task_type="CAUSAL_LM", shadow_model=str(folder)))
    assert torch.equal(fresh.base_model.shadow_projection.default.weight, p)
    assert torch.equal(fresh.base_model.shadow_backbone.default.embed_tokens.weight, small.embed_tokens.weight)
    with pytest.raises(ConfigError, match="projection"):
        get_peft_model(llama(hidden_size=64), ShadowConfig(shadow_model=str(folder)))
    with pytest.raises(ConfigError, match="shadow_hidden_size"):
        ShadowConfig(shadow_model="somewhere/else", shadow_hidden_size=8)


def test_what_a_shadow_refuses() -> None:
    base = llama()
    keys = base.state_dict().keys()
    with pytest.raises(ConfigError, match="follow one another"):
        get_peft_model(base, ShadowConfig(target_modules=["layers.0", "layers.2"]))
    with pytest.raises(ConfigError, match=r"no layers \[7\]"):
        get_peft_model(base, ShadowConfig(layers_to_transform=[1, 7]))
    with pytest.raises(ConfigError, match="cannot be injected into a bare model"):
        veneer.inject_adapter_in_model(ShadowConfig(), base)
    with pytest.raises(ConfigError, match="sizes of the shadow"):
        get_peft_model(base, ShadowConfig(shadow_hidden_size=0))
    with pytest.raises(ConfigError, match="cannot be used when `target_modules` is a str"):
        ShadowConfig(target_modules=".*", layers_to_transform=[0])
    with pytest.raises(ConfigError, match="positive integer"):
        ShadowConfig(r=0)
    with pytest.raises((ConfigError, NoMatchingPeftModuleError)):
        get_peft_model(base, ShadowConfig(target_modules=["q_proj"]))
    assert base.state_dict().keys() == keys and all(p.requires_grad for p in base.parameters())
    t5 = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        get_peft_model(transformers.T5ForConditionalGeneration(t5), ShadowConfig())
    with pytest.raises(ConfigError, match="no stack of decoder blocks"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), ShadowConfig())
    model = shadowed()
    with pytest.raises(RouteError, match="Call the PeftModel itself"):
        model.get_base_model()(input_ids=ids())
    with pytest.raises(RouteError, match="give input_ids"):
        model()


# -------------------------------------------------------------------- the engine


def test_a_choice_made_inside_a_recomputation_holds_there() -> None:
    """A checkpointed function that chooses by itself chooses so again in the backward, whatever was chosen since."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), veneer.LoraConfig(target_modules=["0"], r=2))
    model.add_adapter("b", veneer.LoraConfig(target_modules=["0"], r=2))
    for name in ("default", "b"):
        model.set_adapter(name)
        move(model)
    model.base_model.set_requires_grad(["default", "b"])

    def run(x: Tensor) -> Tensor:
        with model.using("default"):
            y = model(x)
        with model.using("b"):
            return model(y)  # type: ignore[no-any-return]

    def grads(again: bool) -> list[Tensor]:
        model.zero_grad()
        x = torch.ones(2, 3)
        y = checkpoint(run, x, use_reentrant=False) if again else run(x)
        y.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for a, b in zip(grads(True), grads(False), strict=True):
        torch.testing.assert_close(a, b)
