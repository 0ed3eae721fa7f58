"""Merging from file to file: what it writes, what it refuses, and how much it holds in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from veneer.checkpoint.shards import header, model_files
from veneer.testing.laws import move

TARGETS = ["q_proj", "down_proj"]


def _llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=64,
        attention_bias=True, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def _saved(model: nn.Module, config: Any, folder: Path) -> dict[str, Tensor]:
    """The adapter saved; what merging in memory gives."""
    peft = veneer.get_peft_model(model, config)
    move(peft, size=0.05)
    peft.save_pretrained(folder)
    merged: nn.Module = peft.merge_and_unload()
    return {k: v.detach().clone() for k, v in merged.state_dict().items()}


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for name in model_files(folder) for k, v in load_file(folder / name).items()}


CONFIGS = {
    "lora": lambda: veneer.LoraConfig(r=4, target_modules=TARGETS),
    "lora on a head, trained biases": lambda: veneer.LoraConfig(
        r=4, target_modules=[*TARGETS, "lm_head", "embed_tokens"], bias="lora_only"
    ),
    "dora": lambda: veneer.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "pissa": lambda: veneer.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
    "vera": lambda: veneer.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "ia3": lambda: veneer.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": lambda: veneer.OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "road, which turns biases": lambda: veneer.RoadConfig(group_size=4, target_modules=TARGETS),
    "loha, a head trained whole": lambda: veneer.LoHaConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_it_writes_what_merging_in_memory_gives(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = _llama(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    assert len(model_files(tmp_path / "base")) > 3
    before = _tensors(tmp_path / "base")
    want = _saved(model, CONFIGS[case](), tmp_path / "adapter")
    changed = veneer.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = _tensors(tmp_path / "out")
    assert list(got) == list(before)
    assert {k for k in got if not torch.equal(got[k], before[k])} <= set(changed)
    assert all(not torch.equal(got[k], before[k]) for k in want if not torch.equal(want[k], before[k]))
    for k, t in got.items():
        assert t.dtype == before[k].dtype
        torch.testing.assert_close(t, want[k], rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-7)
    for name in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    type(model).from_pretrained(tmp_path / "out")


class _Two(nn.Module):
    def __init__(self, n: int = 8) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(n, n), nn.LayerNorm(n), nn.Linear(n, n, bias=False)


def test_without_a_config_the_names_of_tensors_tell_the_layers(tmp_path: Path) -> None:
    model, base = _Two(), tmp_path / "base"
    base.mkdir()
    save_file(model.state_dict(), base / "model.safetensors", metadata={"format": "pt"})
    want = _saved(model, veneer.LoraConfig(r=2, target_modules=["first", "second"]), tmp_path / "adapter")
    assert sorted(veneer.merge_files(base, tmp_path / "adapter", tmp_path / "out")) == ["first.bias", "first.weight", "second.weight"]
    for k, t in _tensors(tmp_path / "out").items():
        torch.testing.assert_close(t, want[k])
    assert header(tmp_path / "out" / "model.safetensors")[1] == {"format": "pt"}


def test_it_holds_less_than_two_weights(tmp_path: Path) -> None:
    """Not the model, not a layer in float32: some rows of one weight."""
    n, base = 2048, tmp_path / "base"
    model = _Two(n).bfloat16()
    base.mkdir()
    save_file(model.state_dict(), base / "model.safetensors")
    _saved(model, veneer.LoraConfig(r=2, target_modules=["first", "second"]), tmp_path / "adapter")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        veneer.merge_files(base, tmp_path / "adapter", tmp_path / "out")
    now = highest = 0
    for e in sorted((e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        now += e.nbytes()
        highest = max(highest, now)
    assert 0 < highest < 2 * n * n * 2


def test_what_it_cannot_do_is_refused_and_nothing_written(tmp_path: Path) -> None:
    model = _llama(tied=True)
    model.save_pretrained(tmp_path / "base")
    _saved(model, veneer.LoraConfig(r=2, target_modules=["embed_tokens"]), tmp_path / "tied")
    with pytest.raises(veneer.MergeError, match="ties"):
        veneer.merge_files(tmp_path / "base", tmp_path / "tied", tmp_path / "out")
    veneer.get_peft_model(_llama(), veneer.VeraConfig(r=2, target_modules=["q_proj"], save_projection=False)).save_pretrained(
        tmp_path / "vera"
    )
    with pytest.raises(veneer.PeftError, match=r"save_projection|vera_A"):
        veneer.merge_files(tmp_path / "base", tmp_path / "vera", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(veneer.LoadError, match="exists already"):
        veneer.merge_files(tmp_path / "base", tmp_path / "tied", tmp_path / "full")
    with pytest.raises(veneer.LoadError, match=r"model\.safetensors"):
        veneer.merge_files(tmp_path / "full", tmp_path / "tied", tmp_path / "out")
    index = {"weight_map": {"a": "gone.safetensors"}}
    (tmp_path / "full" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(veneer.LoadError, match="gone"):
        veneer.merge_files(tmp_path / "full", tmp_path / "tied", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_command(tmp_path: Path) -> None:
    typer = pytest.importorskip("typer.testing")
    import typer as lib

    from veneer.cli.merge import merge

    model, base = _Two(), tmp_path / "base"
    base.mkdir()
    save_file(model.state_dict(), base / "model.safetensors")
    _saved(model, veneer.LoraConfig(r=2, target_modules=["first"]), tmp_path / "adapter")
    app = lib.Typer()
    app.command()(merge)
    run = typer.CliRunner().invoke(app, [str(base), str(tmp_path / "adapter"), str(tmp_path / "out")])
    assert run.exit_code == 0 and "2 tensors" in run.output
    again = typer.CliRunner().invoke(app, [str(base), str(tmp_path / "adapter"), str(tmp_path / "out")])
    assert again.exit_code == 2 and "exists already" in again.output
