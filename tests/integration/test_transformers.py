"""transformers' own ways with adapters: add, load, set, enable, disable, delete, save; AutoModel and pipelines; caches; checkpointing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import veneer
from veneer.method import load_methods

from .small import ids, llama, stir, tokenizer


def _logits(model: Any, x: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(ids() if x is None else x).logits


def _base(folder: Path) -> Path:
    llama().save_pretrained(folder / "base")
    return folder / "base"


def test_peft_is_veneer() -> None:
    assert peft.LoraConfig is veneer.LoraConfig and transformers.utils.is_peft_available()


def test_adapters_are_added_chosen_switched_and_deleted() -> None:
    model = llama()
    before = _logits(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "a")
    stir(model)
    with_a = _logits(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["k_proj"]), "b")
    stir(model)
    with_b = _logits(model)
    assert model.active_adapters() == ["b"]
    assert not torch.allclose(before, with_a, atol=1e-3) and not torch.allclose(with_a, with_b, atol=1e-3)
    model.set_adapter("a")
    assert torch.equal(_logits(model), with_a)
    assert model.model.layers[0].self_attn.q_proj.adapter_layer_names == ("lora_A", "lora_B")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"a"}
    model.disable_adapters()
    assert torch.equal(_logits(model), before)
    model.enable_adapters()
    assert torch.equal(_logits(model), with_a)
    model.set_adapter(["a", "b"])
    both = _logits(model)
    assert not torch.allclose(both, with_a, atol=1e-3) and not torch.allclose(both, with_b, atol=1e-3)
    model.set_adapter("b")
    model.delete_adapter("a")
    assert torch.equal(_logits(model), with_b) and list(model.peft_config) == ["b"]
    model.delete_adapter("b")
    assert torch.equal(_logits(model), before) and not any("lora" in n for n in model.state_dict())


def test_what_is_saved_opens_everywhere(tmp_path: Path) -> None:
    """One adapter, saved by transformers: opened by load_adapter, AutoModel*, AutoPeftModel and PeftModel, bit for bit."""
    base = _base(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    stir(model)
    want = _logits(model)
    model.save_pretrained(tmp_path / "adapter")
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files and "model.safetensors" not in files
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    info = plain.load_adapter(str(tmp_path / "adapter"))
    assert not info.missing_keys and not info.unexpected_keys
    assert torch.equal(_logits(plain), want)
    assert torch.equal(_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), want)
    assert torch.equal(_logits(peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))), want)
    wrapped = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(_logits(wrapped), want)
    # and the other way: what veneer saves, transformers loads
    wrapped.save_pretrained(tmp_path / "again")
    assert torch.equal(_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")), want)


def test_what_is_trained_whole_is_switched_with_the_rest() -> None:
    """transformers' enable_adapters passes modules_to_save by, so with PEFT the head stays off."""
    model = llama()
    before = _logits(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]))
    stir(model)
    adapted = _logits(model)
    model.disable_adapters()
    assert torch.equal(_logits(model), before)
    model.enable_adapters()
    assert torch.equal(_logits(model), adapted)
    model.lm_head.enable_adapters(False)  # alone
    without_head = _logits(model)
    assert not torch.equal(without_head, adapted) and not torch.equal(without_head, before)
    model.enable_adapters()
    assert torch.equal(_logits(model), without_head)


def test_a_loaded_adapter_can_be_trained(tmp_path: Path) -> None:
    base = _base(tmp_path)
    model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "a")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base)
    fresh.load_adapter(str(tmp_path / "a"), adapter_name="mine", is_trainable=True)
    fresh(ids(), labels=ids()).loss.backward()
    grads = [n for n, p in fresh.named_parameters() if p.grad is not None]
    assert grads and all(".mine." in n for n in grads)
    frozen = transformers.AutoModelForCausalLM.from_pretrained(base)
    frozen.load_adapter(str(tmp_path / "a"))
    assert not any(p.requires_grad for n, p in frozen.named_parameters() if "lora" in n)


def test_an_adapter_that_would_be_dead_is_an_error(tmp_path: Path) -> None:
    """With PEFT, transformers logs missing keys and goes on with an adapter that does nothing."""
    base = _base(tmp_path)
    model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "a")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k.replace("q_proj", "q_porj"): v for k, v in tensors.items()}, file, {"format": "pt"})
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = _logits(fresh)
    with pytest.raises(veneer.LoadError, match="lacks 4 of the 4"):
        fresh.load_adapter(str(tmp_path / "a"))
    assert torch.equal(_logits(fresh), before) and not any("lora" in n for n in fresh.state_dict())


def test_swapping_through_transformers_is_refused_and_ours_does_it(tmp_path: Path) -> None:
    """Its loader would keep the old adapter's scaling."""
    from peft.utils.hotswap import hotswap_adapter

    for name, alpha in (("one", 2), ("two", 8)):
        model = llama()
        model.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"]))
        stir(model, 0.1 * alpha)
        model.save_pretrained(tmp_path / name)
    want = _logits(model)
    model = llama()
    model.load_adapter(str(tmp_path / "one"))
    before = _logits(model)
    with pytest.raises(veneer.LoadError, match="hotswap_adapter"):
        model.load_adapter(str(tmp_path / "two"), adapter_name="default", hotswap=True)
    assert torch.equal(_logits(model), before)
    hotswap_adapter(model, str(tmp_path / "two"), "default")
    assert torch.equal(_logits(model), want)


@pytest.mark.parametrize("start", ["pissa", "olora", "lora_ga"])
def test_starts_go_through_transformers_or_are_refused(start: str, tmp_path: Path) -> None:
    more = {"lora_ga_config": peft.LoraGAConfig()} if start == "lora_ga" else {}
    model, config = llama(), LoraConfig(r=2, init_lora_weights=start, target_modules=["q_proj"], **more)
    if start == "lora_ga":
        peft.preprocess_loraga(model, config, lambda: model(input_ids=ids(), labels=ids()).loss.backward())
    model = get_peft_model(model, config)
    stir(model)
    want = _logits(model)
    model.save_pretrained(tmp_path)
    fresh = llama()
    if start == "lora_ga":
        with pytest.raises(veneer.ConfigError, match=r"Use PeftModel\.from_pretrained"):
            fresh.load_adapter(str(tmp_path))
        fresh = PeftModel.from_pretrained(llama(), tmp_path)
    else:
        fresh.load_adapter(str(tmp_path))
    assert torch.allclose(_logits(fresh), want, atol=1e-6)


INJECTABLE = sorted(
    n
    for n, m in load_methods().items()
    if issubclass(m, veneer.Method)
    and {"linear"} & set(m.kinds)
    and n not in {"XLORA", "VERA", "PVERA", "FROD", "TINYLORA", "UNILORA", "VBLORA", "POLY"}
)


@pytest.mark.parametrize("name", INJECTABLE)
def test_every_injectable_method_goes_through_transformers(name: str, tmp_path: Path) -> None:
    """Saved by transformers and loaded by transformers: the same logits."""
    method = load_methods()[name]
    fields = {"target_modules": ["q_proj", "v_proj"], **method.examples[0]}
    if name == "IA3":
        fields["feedforward_modules"] = []
    model = llama()
    model.add_adapter(method(**fields))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.is_floating_point():
                p.add_(torch.randn_like(p) * 0.05)
    want = _logits(model)
    model.save_pretrained(tmp_path)
    fresh = llama()
    fresh.load_adapter(str(tmp_path))
    assert torch.allclose(_logits(fresh), want, atol=1e-6)


def test_a_method_whose_layers_share_tensors_is_refused() -> None:
    with pytest.raises(veneer.ConfigError, match="needs get_peft_model"):
        llama().add_adapter(peft.VeraConfig(r=4, target_modules=["q_proj"]))


def test_a_pipeline_takes_an_adapted_model(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    words = tokenizer()
    stir(model)
    generate = transformers.pipeline("text-generation", model=model, tokenizer=words)
    out = generate("w5 w6 w7", max_new_tokens=4, do_sample=False, return_full_text=False)
    ids_ = words("w5 w6 w7", return_tensors="pt").input_ids
    want = model.generate(input_ids=ids_, max_new_tokens=4, do_sample=False)[0, ids_.shape[1] :]
    assert out[0]["generated_text"].split() == words.decode(want, skip_special_tokens=True).split()


def test_a_pipeline_opens_a_folder_with_an_adapter(tmp_path: Path) -> None:
    """The adapter acts; in transformers#36480 it was dropped."""
    base = _base(tmp_path)
    words = tokenizer()
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    words.save_pretrained(tmp_path / "adapter")
    more = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    texts = [
        transformers.pipeline("text-generation", model=m, tokenizer=words)("w5 w6 w7", **more)[0]["generated_text"]
        for m in (str(tmp_path / "adapter"), model, transformers.AutoModelForCausalLM.from_pretrained(base))
    ]
    assert texts[0] == texts[1] and texts[0] != texts[2]


def test_a_pipeline_for_classification_takes_the_trained_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "pad_token_id": 0,
        "num_labels": 3,
    }
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**shape, max_position_embeddings=32))
    base.save_pretrained(tmp_path / "base")
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(opened, LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    words = tokenizer()
    words.model_input_names = ["input_ids", "attention_mask"]
    mine, theirs = (
        transformers.pipeline("text-classification", model=m, tokenizer=words)("w5 w6")
        for m in (model, transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter"))
    )
    assert mine[0]["label"] == theirs[0]["label"] and mine[0]["score"] == pytest.approx(theirs[0]["score"], abs=1e-6)


CACHES = [
    {},
    {"cache_implementation": "dynamic"},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"cache_implementation": "offloaded"},
    {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4}},
    {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", "nbits": 4, "q_group_size": 8, "residual_length": 4}},
]


@pytest.mark.parametrize(
    "cache", CACHES, ids=lambda c: "-".join(map(str, [*c.values()][:1])) + str(c.get("cache_config", {}).get("backend", ""))
)
@pytest.mark.filterwarnings("ignore:.*offloaded.*", "ignore:.*quantiz.*")
def test_generate_with_every_cache_does_what_the_merged_model_does(cache: dict[str, Any]) -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    stir(model, 0.1)
    if "offloaded" in cache.values() and not torch.cuda.is_available():
        pytest.skip("transformers' offloaded cache needs an accelerator")
    more = {"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long), "max_new_tokens": 8, "do_sample": False, **cache}
    mine = model.generate(**more)
    merged = model.merge_and_unload()
    assert torch.equal(mine, merged.generate(**more))


@pytest.mark.parametrize("cache", [c for c in CACHES if "offloaded" not in c.values()], ids=lambda c: str([*c.values()][:1]))
def test_generate_with_every_cache_after_a_prompt(cache: dict[str, Any]) -> None:
    """A prompt is made of embeddings, and the cache holds it: what comes out is what comes out without any cache."""
    if "cache_config" in cache:
        cache = {**cache, "cache_config": {**cache["cache_config"], "residual_length": 64}}  # nothing is rounded yet
    model = get_peft_model(llama(), peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    stir(model, 0.5)
    more = {"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**more, **cache), model.generate(**more, use_cache=False))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_both_kinds_of_checkpointing_give_the_same_gradients(reentrant: bool, wrapped: bool) -> None:
    def grads(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = llama().train()
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
        if wrapped:
            model = get_peft_model(model, config)
        else:
            model.add_adapter(config)
        stir(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids(), labels=ids()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, again = grads(False), grads(True)
    assert plain and all(torch.equal(g, again[n]) for n, g in plain.items())
