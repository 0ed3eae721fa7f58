"""Merging file to file gives the very files that a model merged in memory saves, in the memory of two tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from veneer.checkpoint.shards import weights_in, write_shard
from veneer.errors import LoadError, MergeError
from veneer.testing.laws import move


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16, bias=False)}) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.conv = nn.Conv1d(16, 8, 3)
        self.head = nn.Linear(16, 20, bias=False)
        self.to(dtype)

    def forward(self, ids: Any) -> Any:
        h = self.embed(ids)
        for b in self.blocks:
            h = h + b["down"](torch.relu(b["up"](h)))
        return self.head(self.norm(h)) + self.conv(h.mT).sum()


def write_base(folder: Path, net: nn.Module, shards: int = 3, **config: Any) -> Path:
    """The net's tensors dealt out to files, with an index and a config beside them."""
    folder.mkdir()
    state = {k: t.contiguous() for k, t in net.state_dict().items()}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {k: names[i % shards] for i, k in enumerate(state)}
    for n in names:
        save_file({k: t for k, t in state.items() if where[k] == n}, folder / n, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))
    return folder


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in sorted(folder.glob("*.safetensors")) for k, t in load_file(f).items()}


LAYERS = ["up", "down"]
CONFIGS: dict[str, Any] = {
    "lora": lambda: veneer.LoraConfig(r=4, target_modules=[*LAYERS, "head"]),
    "lora everywhere": lambda: veneer.LoraConfig(r=4, target_modules=[*LAYERS, "embed", "conv"], rank_pattern={"0.up": 2}),
    "dora": lambda: veneer.LoraConfig(r=4, target_modules=LAYERS, use_dora=True),
    "bias": lambda: veneer.LoraConfig(r=4, target_modules=["up"], lora_bias=True),
    "saved": lambda: veneer.LoraConfig(r=4, target_modules=["up"], modules_to_save=["norm", "head"]),
    "tokens": lambda: veneer.LoraConfig(r=4, target_modules=["up"], trainable_token_indices={"embed": [3, 5]}),
    "trained biases": lambda: veneer.LoraConfig(r=4, target_modules=["up"], bias="lora_only"),
    "oft": lambda: veneer.OFTConfig(oft_block_size=4, target_modules=LAYERS),
    "loha": lambda: veneer.LoHaConfig(r=2, target_modules=LAYERS),
    "ia3": lambda: veneer.IA3Config(target_modules=LAYERS, feedforward_modules=["down"]),
    "vera": lambda: veneer.VeraConfig(r=4, target_modules=["up"]),
    "osf": lambda: veneer.OSFConfig(effective_rank=4, target_modules=LAYERS),
    "norms": lambda: veneer.LNTuningConfig(target_modules=["norm"]),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", CONFIGS)
def test_files_are_those_of_a_model_merged_in_memory(kind: str, shards: int, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", Net(), shards)
    (base / "tokenizer.json").write_text("{}")
    model = veneer.get_peft_model(Net(), CONFIGS[kind]())
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    report = veneer.merge_files(base, tmp_path / "adapter", tmp_path / "out")
    loaded = veneer.PeftModel.from_pretrained(Net(), tmp_path / "adapter")
    wanted, got, before = loaded.merge_and_unload().state_dict(), everything(tmp_path / "out"), everything(base)
    assert set(got) == set(wanted) and {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in base.iterdir()}
    for k, t in wanted.items():
        assert torch.equal(got[k], t), k
    assert any(not torch.equal(got[k], before[k]) for k in got)
    assert set(report.layers) or kind in ("saved",)
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert all(k in load_file(tmp_path / "out" / f) for k, f in index["weight_map"].items())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in got.values())


@pytest.mark.parametrize(("targets", "flag"), [(["c_attn", "c_proj"], True), (["c_attn", "c_proj"], False), (["attn.c_proj"], False)])
def test_conv1d_of_transformers_is_known(targets: list[str], flag: bool, tmp_path: Path) -> None:
    """By fan_in_fan_out, or by the biases of the base: attn.c_proj is square, and its own shape tells nothing."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(config)
    base.save_pretrained(tmp_path / "base")
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=flag))
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    veneer.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]])
def test_tables_that_the_adapters_file_holds_whole(targets: list[str], tmp_path: Path) -> None:
    """As PEFT does, an adapter's file keeps the embeddings that it adapts."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))
    base.save_pretrained(tmp_path / "base")
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=4, target_modules=targets))
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    assert any(".base_layer." in k for k in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    veneer.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=1e-5)


def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    base, adapter = trained(tmp_path)
    with pytest.raises(MergeError, match="could not be written"):
        veneer.merge_files(base, adapter, base / "config.json" / "out")


def trained(tmp_path: Path, config: Any = None, **fields: Any) -> tuple[Path, Path]:
    base = write_base(tmp_path / "base", Net(), **fields)
    model = veneer.get_peft_model(Net(), config or veneer.LoraConfig(r=4, target_modules=LAYERS))
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def test_what_does_not_go_leaves_nothing_behind(tmp_path: Path) -> None:
    base, adapter = trained(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(MergeError, match="there already"):
        veneer.merge_files(base, adapter, out)
    assert [p.name for p in out.iterdir()] == ["mine"]
    state = everything(base)
    state["blocks.1.up.weight"] = state["blocks.1.up.weight"] * 2
    save_file(state, base / "model.safetensors")
    (base / "model.safetensors.index.json").unlink()
    with pytest.raises(LoadError, match="not the base model the adapter was made for"):
        veneer.merge_files(base, adapter, tmp_path / "new")
    veneer.merge_files(base, adapter, tmp_path / "new", check_base=False)
    for name, change, error, message in (
        ("nan", lambda s: s | {"blocks.0.up.weight": s["blocks.0.up.weight"] * float("nan")}, MergeError, "NaNs"),
        ("gone", lambda s: {k: t for k, t in s.items() if k != "blocks.0.up.bias"}, LoadError, None),
        ("packed", lambda s: s | {"blocks.0.up.weight": torch.zeros(24, 16, dtype=torch.uint8)}, Exception, None),
    ):
        other = tmp_path / name
        other.mkdir()
        save_file(change(state), other / "model.safetensors")
        if name == "gone":
            veneer.merge_files(other, adapter, tmp_path / "x", check_base=False)  # a layer without bias is a layer
            continue
        with pytest.raises(error, match=message):
            veneer.merge_files(other, adapter, tmp_path / "y", check_base=False)
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "y").exists()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(LoadError, match=r"pytorch_model\.bin.*save_pretrained"):
        veneer.merge_files(tmp_path / "bin", adapter, tmp_path / "z")
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(LoadError, match="no whole safetensors file"):
        veneer.merge_files(base, adapter, tmp_path / "z")


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("fields", [{"target_modules": ["wte"]}, {"target_modules": ["c_fc"], "modules_to_save": ["wte"]}], ids=str)
def test_a_head_that_is_tied_by_default_is_not_changed_either(fields: dict[str, Any], says: bool, tmp_path: Path) -> None:
    """Configs of models that are tied by default, such as GPT-2's on the Hub, do not say so. What the error advises is what works."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 1}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    base.save_pretrained(tmp_path / "base")
    if not says:
        file = tmp_path / "base" / "config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "tie_word_embeddings"}))
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=4, **fields))
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"head is tied to 'transformer.wte'.*merge_and_unload"):
        veneer.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        want = model.eval()(ids).logits
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(ids).logits, want, atol=1e-5, rtol=0)


def test_an_encoder_without_a_head_has_nothing_tied(tmp_path: Path) -> None:
    base, adapter = trained(tmp_path, veneer.LoraConfig(r=4, target_modules=["embed"]), architectures=["NetModel"], vocab_size=20)
    veneer.merge_files(base, adapter, tmp_path / "out")
    (base / "config.json").write_text(json.dumps({"architectures": ["NetForCausalLM"], "vocab_size": 20}))
    veneer.merge_files(base, adapter, tmp_path / "own")  # a head whose weights are in the files is not tied


def test_the_config_of_an_adapter_in_the_bases_folder_stays_there(tmp_path: Path) -> None:
    base, adapter = trained(tmp_path)
    for path in adapter.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    veneer.merge_files(base, base, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("text", ['{"weight_map": {', "{}", "[]", '{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(LoadError, match=r"index.json is no index of safetensors files .*Copy it again"):
        weights_in(tmp_path)


def test_a_tied_head_is_not_changed_unasked(tmp_path: Path) -> None:
    base, adapter = trained(tmp_path, veneer.LoraConfig(r=4, target_modules=["embed"]), tie_word_embeddings=True)
    with pytest.raises(MergeError, match=r"head is tied to 'embed'.*merge_and_unload"):
        veneer.merge_files(base, adapter, tmp_path / "out")


def test_unmergeable_and_packed_models_are_refused(tmp_path: Path) -> None:
    base, adapter = trained(tmp_path, veneer.LilyConfig(r=4, target_modules=["up"]))
    with pytest.raises(MergeError, match="depends on the input"):
        veneer.merge_files(base, adapter, tmp_path / "out")
    (base / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(LoadError, match="packed by a quantisation library"):
        veneer.merge_files(base, adapter, tmp_path / "out")


def test_a_written_shard_is_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "b": torch.randn(7).bfloat16(),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored = weights_in(tmp_path)
    assert {k: tuple(s.shape) for k, s in stored.items()} == {k: tuple(t.shape) for k, t in tensors.items()}
    assert all(torch.equal(stored[k].read(), t) for k, t in tensors.items())
    write_shard(tmp_path / "copy.safetensors", stored)
    with safe_open(tmp_path / "copy.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
        assert all(torch.equal(f.get_tensor(k), t) for k, t in tensors.items())


_MEASURE = """
import resource, sys, torch, veneer
from veneer.filemerge import merge_files
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_files(*sys.argv[1:4], check_base=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_two_tensors_worth_of_memory(tmp_path: Path) -> None:
    """Six weights of 32 MiB in two files: never more than two of them are held; 24 MiB are for what Python itself loads on the way."""
    n, layers = 4096, 6
    base = tmp_path / "base"
    base.mkdir()
    block = torch.full((n, n), 0.5, dtype=torch.float16)
    where = {}
    for f in range(2):
        name = f"model-{f + 1:05d}-of-00002.safetensors"
        keys = [f"layers.{i}.fc.weight" for i in range(f * 3, f * 3 + 3)]
        save_file({k: block + i for i, k in enumerate(keys)}, base / name)
        where |= dict.fromkeys(keys, name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    small = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(n, n, bias=False, device="meta")}) for _ in range(layers))}
    )
    model = veneer.get_peft_model(small, veneer.LoraConfig(r=8, target_modules=["fc"]), low_cpu_mem_usage=True)
    state = veneer.get_peft_model_state_dict(model)
    (tmp_path / "adapter").mkdir()
    save_file({k: torch.randn(t.shape) * 0.01 for k, t in state.items()}, tmp_path / "adapter" / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(tmp_path / "adapter")
    run = [sys.executable, "-c", _MEASURE, str(base), str(tmp_path / "adapter"), str(tmp_path / "out")]
    grown = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()[-1])
    assert grown < (2 * 32 + 24) << 20, f"{grown / 2**20:.0f} MiB"
    assert len(weights_in(tmp_path / "out")) == layers


def test_the_command_line_merges_and_tells(tmp_path: Path) -> None:
    base, adapter = trained(tmp_path)
    run = [sys.executable, "-m", "veneer", "merge", str(base), str(adapter), str(tmp_path / "out")]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0 and "6 layers merged" in done.stdout, done.stderr
    again = subprocess.run(run, capture_output=True, text=True)
    assert again.returncode == 2 and "there already" in again.stderr


def test_an_adapter_on_a_rebuilt_stack_of_layers(tmp_path: Path) -> None:
    """What the error advises is what works."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    base.save_pretrained(tmp_path / "base")
    peft = veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]))
    move(peft)
    peft.save_pretrained(tmp_path / "adapter")
    for check in (True, False):
        with pytest.raises(MergeError, match=r"layer_replication=\[\[0, 2\], \[1, 2\]\] .*merge_and_unload\(\) and save_pretrained"):
            veneer.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", check_base=check)
    assert not (tmp_path / "out").exists()
    back = veneer.PeftModel.from_pretrained(peft.unload(), tmp_path / "adapter")
    back.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert "model.layers.2.self_attn.q_proj.weight" in everything(tmp_path / "merged")


def test_an_adapter_on_fused_experts_and_a_base_that_has_them_one_by_one(tmp_path: Path) -> None:
    """What the error advises is what works."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    names = everything(tmp_path / "base").keys()
    if not any(".experts.0." in n for n in names):
        pytest.skip("this transformers writes fused experts")
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base")
    for parameters, modules in ((["mlp.experts.gate_up_proj"], ["q_proj"]), (["experts.down_proj"], [])):
        peft = veneer.get_peft_model(model, veneer.LoraConfig(r=2, target_modules=modules, target_parameters=parameters))
        move(peft)
        folder = tmp_path / parameters[0]
        peft.save_pretrained(folder)
        with pytest.raises(LoadError, match=r"holds its experts one by one \('model.layers.0.*merge_and_unload\(\) and save_pretrained"):
            veneer.merge_files(tmp_path / "base", folder, tmp_path / "out")
        model = peft.unload()
    back = veneer.PeftModel.from_pretrained(model, folder)
    back.merge_and_unload().save_pretrained(tmp_path / "merged")
    before, after = everything(tmp_path / "base"), everything(tmp_path / "merged")
    changed = {k for k, t in before.items() if not torch.equal(t, after[k])}
    assert after.keys() == names
    assert changed == {k for k in names if ".w2." in k}
