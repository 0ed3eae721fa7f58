"""Adapter files of other libraries: there and back bit by bit, losses stated, and the same output where a library that reads them is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from veneer.errors import ConfigError, ConversionError, LoadError
from veneer.formats import FORMATS, check, convert, detect
from veneer.testing.laws import move

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A trained adapter of the small llama, written into `folder`."""
    config = veneer.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", "lora_dropout": 0.1, **fields})
    model = veneer.get_peft_model(llama(), config)
    move(model, size=0.3)
    model.to(dtype).save_pretrained(folder)
    return model.float().eval()


class Block(nn.Module):
    """Names as a UNet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3)
        self.down_blocks = nn.ModuleList([nn.Module()])
        self.down_blocks[0].time_emb_proj = nn.Linear(8, 8)
        self.down_blocks[0].attn1 = nn.Module()
        self.down_blocks[0].attn1.to_out = nn.ModuleList([nn.Linear(8, 8)])
        self.down_blocks[0].attn1.to_q = nn.Linear(8, 8)


def unet_adapter(folder: Path, **fields: Any) -> None:
    targets = ["conv_in", "time_emb_proj", "to_out.0", "to_q"]
    model = veneer.get_peft_model(Block(), veneer.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **fields}))
    move(model, size=0.3)
    model.save_pretrained(folder)


def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path / "adapter_model.safetensors")


def same(a: Path, b: Path) -> None:
    one, two = tensors(a), tensors(b)
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]), key


def fields_of(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return {k: sorted(v) if k == "target_modules" and isinstance(v, list) else v for k, v in fields.items()}


def ids() -> Tensor:
    return torch.arange(3, 15)[None]


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("to", ["mlx", "gguf", "peft"])
def test_a_language_models_adapter_comes_back_bit_by_bit(to: str, dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "a", dtype)
    there = convert(tmp_path / "a", tmp_path / "there", to, model=base)
    assert there.notes == [] and there.layers == {"": 14} and detect(tmp_path / "there") == to
    back = convert(tmp_path / "there", tmp_path / "b", "peft")
    assert back.notes == [] and back.source == to
    same(tmp_path / "a", tmp_path / "b")
    assert fields_of(tmp_path / "a") == fields_of(tmp_path / "b")


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 3}}]
)
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_pipelines_adapter_comes_back_bit_by_bit(to: str, options: dict[str, Any], tmp_path: Path) -> None:
    unet_adapter(tmp_path / "a", **options)
    out = tmp_path / "there.safetensors"
    there = convert(tmp_path / "a", out, to, component="unet")
    assert detect(out) == to and there.layers == {"unet": 4}
    convert(out, tmp_path / "b", "peft")
    same(tmp_path / "a", tmp_path / "b" / "unet")
    assert fields_of(tmp_path / "a") == fields_of(tmp_path / "b" / "unet")
    # and from one to the other
    other = {"kohya": "diffusers", "diffusers": "kohya"}[to]
    convert(out, tmp_path / "other.safetensors", other)
    convert(tmp_path / "other.safetensors", tmp_path / "again.safetensors", to)
    first, second = load_file(out), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_scales_are_those_of_the_layers(base: Path, tmp_path: Path) -> None:
    """What a file says without veneer's note: alpha / r of every layer, rsLoRA and patterns included."""
    options = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}
    adapter(tmp_path / "a", **options)
    want = {p: f.scale for p, f in FORMATS["peft"].read(tmp_path / "a")[""].layers.items()}
    assert want["model.layers.0.self_attn.q_proj"] == pytest.approx(8 / 2**0.5)
    assert want["model.layers.0.self_attn.v_proj"] == pytest.approx(5 / 2)
    convert(tmp_path / "a", tmp_path / "k.safetensors", "kohya", component="text_encoder")
    raw = load_file(tmp_path / "k.safetensors")
    for path, scale in want.items():
        name = "lora_te_" + path.replace(".", "_")
        assert float(raw[f"{name}.alpha"]) / raw[f"{name}.lora_down.weight"].shape[0] == pytest.approx(scale, rel=1e-7)
    delta = {p: f.scale * f.up.double() @ f.down.double() for p, f in FORMATS["peft"].read(tmp_path / "a")[""].layers.items()}
    for to in ("mlx", "gguf", "diffusers"):  # these have one alpha, or one scale, or patterns
        out = tmp_path / f"{to}.safetensors" if to == "diffusers" else tmp_path / to
        made = convert(tmp_path / "a", out, to, model=base, component="text_encoder" if to == "diffusers" else None)
        again = next(iter(FORMATS[to].read(out, model=base).values())).layers
        for path, d in delta.items():
            f = again[path]
            assert torch.allclose(f.scale * f.up.double() @ f.down.double(), d, rtol=1e-5, atol=1e-6), (to, path)
        if to != "diffusers":
            assert any("multiplied into B" in n for n in made.notes)


def test_exact_factors_are_said_to_be_exact(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "a", alpha_pattern={"q_proj": 16})
    made = convert(tmp_path / "a", tmp_path / "there", "gguf", model=base)
    assert len(made.notes) == 1 and "exactly (powers of two)" in made.notes[0]
    adapter(tmp_path / "a3", alpha_pattern={"q_proj": 12})
    made = convert(tmp_path / "a3", tmp_path / "there3", "gguf", model=base)
    assert "rounded to the dtype in 2 of them" in made.notes[0]


def test_padding_and_uniformity_keep_the_change(tmp_path: Path) -> None:
    model = adapter(tmp_path / "a", rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 16})
    before = model(ids()).logits
    made = convert(tmp_path / "a", tmp_path / "b", "peft", uniform=True, rank=16)
    fields = fields_of(tmp_path / "b")
    assert fields["r"] == 16 and not fields["rank_pattern"] and not fields["alpha_pattern"] and len(made.notes) == 2
    again = veneer.PeftModel.from_pretrained(llama(), tmp_path / "b").eval()
    assert torch.allclose(again(ids()).logits, before, atol=1e-5)
    with pytest.raises(ConversionError, match=r"has rank 4, more than 2.*save_as_lora"):
        convert(tmp_path / "a", tmp_path / "c", "peft", rank=2)
    assert not (tmp_path / "c").exists()


# ---------------------------------------------------------------- the same output


def _write_base(model: Any, path: Path, scale: float = 0.0, adapter: dict[str, Any] | None = None) -> None:
    """The small llama as GGUF, with an adapter's changes added there, tensor by tensor."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    c = model.config
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for key, w in model.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight",))
        w = w.float()
        heads = c.num_attention_heads if "q_proj" in key else c.num_key_value_heads if "k_proj" in key else 0
        if heads:  # as llama.cpp's converter: rows of a head in pairs
            n, d = w.shape
            w = torch.stack([w.view(heads, 2, n // heads // 2, d)[:, half] for half in (0, 1)], dim=2).reshape(n, d)
        if adapter and f"{name}.lora_a" in adapter:
            a, b = (torch.from_numpy(adapter[f"{name}.lora_{s}"].copy()) for s in "ab")
            w = w + scale / b.shape[1] * (b @ (a.T if "token_embd" not in name else a).T if "token_embd" not in name else (b @ a.T).T)
        writer.add_tensor(name, w.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_adapter_added_to_a_gguf_base_gives_the_same_output(base: Path, tmp_path: Path) -> None:
    """transformers reads the sum: it undoes the order of rows in its own code."""
    import gguf
    from transformers import AutoModelForCausalLM

    model = adapter(tmp_path / "a", rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 8})
    convert(tmp_path / "a", tmp_path / "a.gguf", "gguf", model=base)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert {reader.get_field(k).contents() for k in ("general.type", "adapter.type", "general.architecture")} == {
        "adapter",
        "lora",
        "llama",
    }
    alpha = reader.get_field("adapter.lora.alpha").contents()
    parts = {t.name: t.data for t in reader.tensors}
    assert alpha == 8 and parts["blk.1.attn_k.weight.lora_a"].shape == (2, 32) and len(parts) == 28
    _write_base(llama(), tmp_path / "sum.gguf", alpha, parts)
    summed = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="sum.gguf", dtype=torch.float32).eval()
    assert torch.allclose(summed(ids()).logits, model(ids()).logits, atol=1e-4)
    assert not torch.allclose(summed(ids()).logits, llama()(ids()).logits, atol=1e-2)
    # the same numbers without turning the rows are another model: the order matters
    parts["blk.0.attn_q.weight.lora_b"] = parts["blk.0.attn_q.weight.lora_b"][::-1]
    _write_base(llama(), tmp_path / "wrong.gguf", alpha, parts)
    wrong = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="wrong.gguf", dtype=torch.float32).eval()
    assert not torch.allclose(wrong(ids()).logits, model(ids()).logits, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}, "use_rslora": True}], ids=["lora", "dora", "ranks"]
)
def test_mlx_computes_the_same_with_the_converted_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm")
    import numpy as np
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import load_adapters

    model = adapter(tmp_path / "a", **options)
    convert(tmp_path / "a", tmp_path / "mlx", "mlx")
    c = llama().config
    args = ModelArgs(
        model_type="llama", **SIZES, rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=False,
        rope_theta=c.rope_parameters["rope_theta"],
    )  # fmt: skip
    theirs = Model(args)
    theirs.load_weights([(k, mx.array(v.numpy())) for k, v in llama().state_dict().items()])
    theirs = load_adapters(theirs, str(tmp_path / "mlx"))
    theirs.eval()
    out = np.array(theirs(mx.array(ids().numpy())))
    assert np.abs(out - model(ids()).logits.detach().numpy()).max() < 1e-3
    assert np.abs(out - llama()(ids()).logits.detach().numpy()).max() > 0.05


# ---------------------------------------------------------------- files of others


def test_a_file_of_kohyas_is_read_by_its_names(tmp_path: Path) -> None:
    stems = {
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0": "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
        "lora_unet_mid_block_resnets_0_time_emb_proj": "mid_block.resnets.0.time_emb_proj",
        "lora_unet_time_embedding_linear_1": "time_embedding.linear_1",
        "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj": "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "lora_te_text_model_encoder_layers_3_self_attn_q_proj": "text_model.encoder.layers.3.self_attn.q_proj",
    }
    raw = {}
    for stem in stems:
        raw |= {
            f"{stem}.lora_down.weight": torch.randn(4, 6),
            f"{stem}.lora_up.weight": torch.randn(5, 4),
            f"{stem}.alpha": torch.tensor(2.0),
        }
    save_file(raw, tmp_path / "k.safetensors")
    read = FORMATS["kohya"].read(tmp_path / "k.safetensors")
    assert {p for part in read.values() for p in part.layers} == set(stems.values()) and set(read) == {"unet", "text_encoder"}
    assert all(f.scale == 0.5 for part in read.values() for f in part.layers.values())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lora_unet_input_blocks_4_1_proj_in", "Stability's"),
        ("lora_unet_down_blocks_0_whatever_to_q", "no model known here"),
        ("lora_unet_proj_out_hada", "no model known here"),
    ],
)
def test_names_that_cannot_be_undone_are_refused(name: str, says: str, tmp_path: Path) -> None:
    save_file({f"{name}.lora_down.weight": torch.ones(2, 3), f"{name}.lora_up.weight": torch.ones(3, 2)}, tmp_path / "k.safetensors")
    with pytest.raises(ConversionError, match=says):
        convert(tmp_path / "k.safetensors", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_a_tucker_core_is_multiplied_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    down, mid, up = torch.randn(3, 5, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(7, 3, 1, 1)
    stem = "lora_unet_conv_in"
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_up.weight": up}, tmp_path / "k.safetensors")
    f = FORMATS["kohya"].read(tmp_path / "k.safetensors")["unet"].layers["conv_in"]
    x, conv = torch.randn(2, 5, 8, 8), nn.functional.conv2d
    assert torch.allclose(conv(conv(x, f.down), f.up), conv(conv(conv(x, down), mid), up), atol=1e-4)


@pytest.mark.parametrize(("shape", "reads"), [((6, 1), True), ((6,), True), ((1, 6), False)])
def test_which_side_of_a_square_weight_a_magnitude_is_for(shape: tuple[int, ...], reads: bool, tmp_path: Path) -> None:
    stem = "lora_unet_conv_in"
    raw = {
        f"{stem}.lora_down.weight": torch.ones(2, 6),
        f"{stem}.lora_up.weight": torch.ones(6, 2),
        f"{stem}.dora_scale": torch.ones(shape),
    }
    save_file(raw, tmp_path / "k.safetensors")
    if reads:
        assert FORMATS["kohya"].read(tmp_path / "k.safetensors")["unet"].layers["conv_in"].magnitude is not None
    else:
        with pytest.raises(ConversionError, match="columns were normed"):
            FORMATS["kohya"].read(tmp_path / "k.safetensors")


def test_the_folder_of_a_component_is_not_overwritten_either(tmp_path: Path) -> None:
    stem = "unet.mid_block.attentions.0.proj_in"
    save_file({f"{stem}.lora_A.weight": torch.ones(2, 6), f"{stem}.lora_B.weight": torch.ones(6, 2)}, tmp_path / "d.safetensors")
    convert(tmp_path / "d.safetensors", tmp_path / "out", "peft")
    with pytest.raises(ConversionError, match=r"out/unet' holds an adapter already"):
        convert(tmp_path / "d.safetensors", tmp_path / "out", "peft")


def test_old_names_of_diffusers_are_read(tmp_path: Path) -> None:
    a, b = torch.randn(4, 6), torch.randn(6, 4)
    save_file(
        {
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight": a.clone(),
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight": b.clone(),
            "unet.down_blocks.0.attn2.to_k.lora.down.weight": a.clone(),
            "unet.down_blocks.0.attn2.to_k.lora.up.weight": b.clone(),
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight": a.clone(),
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight": b.clone(),
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight": a.clone(),
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight": b.clone(),
        },
        tmp_path / "pytorch_lora_weights.safetensors",
    )
    read = FORMATS["diffusers"].read(tmp_path)
    assert set(read["unet"].layers) == {"mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", "down_blocks.0.attn2.to_k"}
    assert set(read["text_encoder"].layers) == {f"text_model.encoder.layers.0.{n}" for n in ("self_attn.q_proj", "mlp.fc1")}
    assert all(f.scale == 1 and torch.equal(f.down, a) and torch.equal(f.up, b) for part in read.values() for f in part.layers.values())


# ---------------------------------------------------------------- refusals


def test_what_a_format_has_no_place_for_is_refused(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "dora", use_dora=True)
    with pytest.raises(ConversionError, match=r"'gguf' has no place for DoRA's magnitudes.*merge"):
        convert(tmp_path / "dora", tmp_path / "out", "gguf", model=base)
    adapter(tmp_path / "head", modules_to_save=["lm_head"])
    for to in ("gguf", "mlx"):
        with pytest.raises(ConversionError, match=r"lm_head.weight: trained copies"):
            convert(tmp_path / "head", tmp_path / "out", to, model=base)
    veneer.get_peft_model(llama(), veneer.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ConversionError, match=r"IA3.*save_as_lora"):
        convert(tmp_path / "ia3", tmp_path / "out", "mlx")
    adapter(tmp_path / "a")
    with pytest.raises(ConversionError, match="--model FOLDER"):
        convert(tmp_path / "a", tmp_path / "out", "gguf")
    with pytest.raises(ConversionError, match="--component"):
        convert(tmp_path / "a", tmp_path / "out.safetensors", "kohya")
    with pytest.raises(ConversionError, match="Did you mean 'gguf'"):
        convert(tmp_path / "a", tmp_path / "out", "ggufs")
    with pytest.raises(LoadError, match="no adapter in a format that is known"):
        convert(base, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_others_tensors_go_from_peft_to_peft(tmp_path: Path) -> None:
    adapter(tmp_path / "a", modules_to_save=["lm_head"])
    convert(tmp_path / "a", tmp_path / "b", "peft")
    same(tmp_path / "a", tmp_path / "b")


def test_metadata_tells_diffusers_the_alphas(tmp_path: Path) -> None:
    unet_adapter(tmp_path / "a", alpha_pattern={"to_q": 2})
    convert(tmp_path / "a", tmp_path / "out", "diffusers", component="unet")
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", framework="pt") as f:
        told = json.loads(f.metadata()["lora_adapter_metadata"])
    assert told["unet.lora_alpha"] == 6 and told["unet.alpha_pattern"] == {"to_q": 2}


# ---------------------------------------------------------------- what runtimes serve


@pytest.mark.parametrize(
    ("fields", "runtime", "says"),
    [
        ({}, "vllm", []),
        ({}, "llama.cpp", []),
        ({}, "mlx", []),
        ({}, "diffusers", []),
        ({"r": 24}, "vllm", ["--max-lora-rank 32"]),
        ({"r": 600}, "vllm", ["above 512"]),
        ({"use_dora": True}, "vllm", ["use_dora"]),
        ({"use_dora": True}, "mlx", []),
        ({"use_dora": True}, "diffusers", []),
        ({"use_dora": True}, "llama.cpp", ["use_dora"]),
        ({"use_rslora": True}, "vllm", []),
        ({"use_rslora": True}, "llama.cpp", ["folds it into alpha"]),
        ({"modules_to_save": ["lm_head"]}, "vllm", ["lm_head"]),
        ({"bias": "all"}, "mlx", ["bias='all'"]),
        ({"alpha_pattern": {"q_proj": 4}}, "vllm", ["--uniform"]),
        ({"rank_pattern": {"q_proj": 4}}, "vllm", ["--uniform"]),
        ({"rank_pattern": {"q_proj": 4}}, "mlx", ["pads with zeros"]),
        ({"alpha_pattern": {"q_proj": 4}}, "mlx", ["one scale"]),
        ({"alora_invocation_tokens": [1, 2]}, "vllm", ["alora_invocation_tokens"]),
        ({"init_lora_weights": "pissa"}, "vllm", ["path_initial_model_for_weight_conversion"]),
    ],
)
def test_before_training_the_config_is_enough(fields: dict[str, Any], runtime: str, says: list[str]) -> None:
    found = check(veneer.LoraConfig(**{"target_modules": ["q_proj"], **fields}), runtime)
    assert len(found) == len(says), found
    for finding, word in zip(found, says, strict=True):
        assert word in finding.what + finding.change


def test_other_methods_and_runtimes() -> None:
    assert "IA3" in check(veneer.IA3Config(), "vllm")[0].what
    assert check(veneer.LoKrConfig(), "diffusers") == [] and check(veneer.LoKrConfig(), "mlx")
    with pytest.raises(ConfigError, match=r"llama\.cpp"):
        check(veneer.LoraConfig(), "llamacpp")


def test_after_training_the_file_is_looked_at(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "a", modules_to_save=["lm_head"], r=24)
    assert [f.what.split("=")[0] for f in check(tmp_path / "a", "vllm")] == [
        "`modules_to_save",
        "Rank 24 is above --max-lora-rank 16 (the default).",
    ]
    assert len(check(tmp_path / "a", "vllm", max_rank=32)) == 1
    adapter(tmp_path / "b", rank_pattern={"q_proj": 2})
    assert check(tmp_path / "b", "vllm")
    convert(tmp_path / "b", tmp_path / "c", "peft", uniform=True, rank=8)
    assert check(tmp_path / "c", "vllm") == []
    unet_adapter(tmp_path / "u")
    assert "conv" in check(tmp_path / "u", "mlx")[0].what and check(tmp_path / "u", "diffusers") == []
    convert(tmp_path / "b", tmp_path / "b.gguf", "gguf", model=base)
    assert check(tmp_path / "b.gguf", "llama.cpp", model_type="llama") == []
    assert "gpt2" in check(tmp_path / "b.gguf", "llama.cpp", model_type="gpt2")[0].what


def test_the_command_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.cli.main import main

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["veneer", *words])
        with pytest.raises(SystemExit) as e:
            main()
        out = capsys.readouterr()
        return int(e.value.code or 0), out.out + out.err

    adapter(tmp_path / "a", r=24)
    code, text = run("convert", str(tmp_path / "a"), str(tmp_path / "a.gguf"), "--to", "gguf", "--model", str(base))
    assert code == 0 and "14 layers" in text and "same bits" in text
    code, text = run("convert", str(tmp_path / "a"), str(tmp_path / "k.safetensors"), "--to", "kohya")
    assert code == 2 and "--component" in text
    code, text = run("check", str(tmp_path / "a"), "--runtime", "vllm")
    assert code == 1 and "--max-lora-rank 32" in text
    code, text = run("check", str(tmp_path / "a"), "--runtime", "llama.cpp")
    assert code == 0 and "serves it" in text
    code, text = run("check", "--runtime", "vllm", "--method", "lora", "--r", "8", "--use-dora")
    assert code == 1 and "use_dora" in text
    code, text = run("check", "--runtime", "vllm")
    assert code == 2 and "--method" in text
    code, text = run("check", "--runtime", "vllm", "--method", "lora", "--use-dorra")
    assert code == 2 and "Did you mean 'use_dora'" in text
    code, text = run("convert", str(tmp_path / "a"), str(tmp_path), "--to", "gguf", "--model", str(base))
    assert code == 2 and "could not be written" in text


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"adapter_config.json is not JSON"):
        detect(tmp_path)
