"""Mixtures of experts whose weights are fused 3-D parameters, and adapters from when each expert was modules of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

import veneer

from .small import ids, stir

EXPERTS, WIDTH, MIDDLE = 4, 32, 24
SHAPE = {
    "vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": MIDDLE, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def mixtral() -> Any:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE, num_local_experts=EXPERTS)).eval()


def qwen() -> Any:
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SHAPE, num_experts=EXPERTS, moe_intermediate_size=MIDDLE, head_dim=8)
    ).eval()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


# model, the old names' stem, gate, up and down
KINDS = [
    pytest.param(mixtral, "block_sparse_moe", ("w1", "w3", "w2"), id="mixtral"),
    pytest.param(qwen, "mlp", ("gate_proj", "up_proj", "down_proj"), id="qwen3_moe"),
]


def _old_file(
    folder: Path, make: Callable[[], Any], stem: str, names: tuple[str, str, str], targets: list[str], **fields: Any
) -> torch.Tensor:
    """An adapter as it was written when experts were modules; returns the logits of the model with its changes added by hand."""
    r, alpha = 3, 6
    scale = alpha / (r**0.5 if fields.get("use_rslora") else r)
    generator = torch.Generator().manual_seed(3)
    model, tensors = make(), {}
    for i, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        halves = {
            names[0]: experts.gate_up_proj.data[:, :MIDDLE],
            names[1]: experts.gate_up_proj.data[:, MIDDLE:],
            names[2]: experts.down_proj.data,
        }
        places: dict[str, tuple[torch.Tensor, str]] = {"q_proj": (layer.self_attn.q_proj.weight.data, f"model.layers.{i}.self_attn.q_proj")}
        for name, w in halves.items():
            places |= {f"{name} {e}": (w[e], f"model.layers.{i}.{stem}.experts.{e}.{name}") for e in range(EXPERTS)}
        for name, (w, path) in places.items():
            if name.split()[0] in targets:
                a, b = torch.randn(r, w.shape[1], generator=generator) * 0.3, torch.randn(w.shape[0], r, generator=generator) * 0.3
                tensors[f"base_model.model.{path}.lora_A.weight"], tensors[f"base_model.model.{path}.lora_B.weight"] = a, b
                w += scale * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "lora_dropout": 0.05,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return _logits(model)


@pytest.mark.parametrize(("make", "stem", "names"), KINDS)
@pytest.mark.parametrize("some", ["all", "gate", "down"])
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}], ids=["alpha/r", "rslora"])
@pytest.mark.filterwarnings("ignore:The experts of this model are kept")
def test_old_checkpoints_do_what_they_did(
    make: Any, stem: str, names: tuple[str, str, str], some: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    targets = {"all": ["q_proj", *names], "gate": [names[0]], "down": ["q_proj", names[2]]}[some]
    want = _old_file(tmp_path / "old", make, stem, names, targets, **fields)
    assert not torch.allclose(want, _logits(make()), atol=1e-2)
    ours = PeftModel.from_pretrained(make(), tmp_path / "old")
    assert torch.allclose(_logits(ours), want, atol=1e-5)
    theirs = make()
    theirs.load_adapter(str(tmp_path / "old"))
    assert torch.allclose(_logits(theirs), want, atol=1e-5)
    # saved again, it is an adapter of the parameters, and does the same
    ours.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["target_parameters"]
    assert torch.equal(_logits(PeftModel.from_pretrained(make(), tmp_path / "new")), _logits(ours))
    assert torch.allclose(_logits(ours.merge_and_unload()), want, atol=1e-5)


@pytest.mark.parametrize(("make", "stem", "names"), KINDS)
@pytest.mark.filterwarnings("ignore:The experts of this model are kept")
def test_a_file_without_an_expert_is_an_error(make: Any, stem: str, names: tuple[str, str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _old_file(tmp_path / "old", make, stem, names, [names[2]])
    file = tmp_path / "old" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if ".experts.1." not in k}, file, {"format": "pt"})
    with pytest.raises(veneer.LoadError, match=r"no lora_A.weight for the experts \[1\]"):
        PeftModel.from_pretrained(make(), tmp_path / "old")
    with pytest.raises((veneer.LoadError, RuntimeError)):
        make().load_adapter(str(tmp_path / "old"))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("make", [mixtral, qwen])
def test_fused_experts_train_merge_and_travel(make: Any, implementation: str, tmp_path: Path) -> None:
    model = make()
    model.set_experts_implementation(implementation)
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=["v_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    )
    stir(model)
    model.train()(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.eval()
    want = _logits(model)
    model.save_pretrained(tmp_path)
    theirs = make()
    theirs.load_adapter(str(tmp_path))
    assert torch.allclose(_logits(theirs), want, atol=1e-5)
    assert torch.allclose(_logits(model.merge_and_unload()), want, atol=1e-5)


def test_old_targets_in_a_new_config_mean_the_parameters(tmp_path: Path) -> None:
    """`gate_proj` of a model whose shared parts have one too: both are adapted, and the user is told."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["gate_proj", "q_proj"])
    with pytest.warns(veneer.PeftWarning, match="kept in one parameter"):
        model = get_peft_model(qwen(), config)
    assert config.target_parameters == ["mlp.experts.gate_up_proj"] and config.target_modules == {"q_proj"}
    assert any("experts.lora_A" in n for n, _ in model.named_parameters())
