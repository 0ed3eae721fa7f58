"""TRL's trainers with a config; the adapter switched off is the reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from .small import llama, tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:torch.*", "ignore:.*pin_memory.*"
)

COMMON: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 5e-2, "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True,
    "save_strategy": "no", "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False,
}  # fmt: skip


def _config() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def _moved(model: Any) -> float:
    return max(float(p.detach().abs().max()) for n, p in model.named_parameters() if "lora_B" in n)


def _base_is_untouched(model: Any) -> bool:
    x = torch.tensor([[3, 4, 5]])
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        return torch.equal(model(x).logits, llama()(x).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft(checkpointing: bool, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": f"w{i} w{i + 1} w{i + 2} w{i + 3}"} for i in range(3, 15)])
    args = SFTConfig(output_dir=str(tmp_path), **{**COMMON, "gradient_checkpointing": checkpointing}, max_length=16)
    trainer = SFTTrainer(llama(), args=args, train_dataset=rows, processing_class=tokenizer(), peft_config=_config())
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    assert _moved(trainer.model) > 0 and _base_is_untouched(trainer.model)
    trainer.save_model(str(tmp_path / "out"))
    again = PeftModel.from_pretrained(llama(), tmp_path / "out")
    x = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(again(x).logits, trainer.model.eval()(x).logits)


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_takes_the_model_without_its_adapter_for_reference(precomputed: bool, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2}", "rejected": f" w{i + 9}"} for i in range(3, 15)])
    args = DPOConfig(output_dir=str(tmp_path), **COMMON, max_length=16, precompute_ref_log_probs=precomputed)
    trainer = DPOTrainer(llama(), args=args, train_dataset=rows, processing_class=tokenizer(), peft_config=_config())
    assert trainer.ref_model is None
    trainer.train()
    logs = [e for e in trainer.state.log_history if "loss" in e]
    # at the first step the policy is the reference: the margin is 0 and the loss log 2
    assert logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-6) and logs[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert logs[1]["rewards/margins"] != 0
    assert _moved(trainer.model) > 0 and _base_is_untouched(trainer.model)


def test_grpo_measures_its_distance_to_the_model_without_its_adapter(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(3, 15)])
    args = GRPOConfig(
        output_dir=str(tmp_path),
        **{**COMMON, "per_device_train_batch_size": 4, "max_steps": 3},
        num_generations=4,
        max_completion_length=6,
        beta=0.1,
    )
    lengths: list[int] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        lengths.extend(len(c) for c in completions)
        return [float(len(set(c.split()))) + i for i, c in enumerate(completions)]

    trainer = GRPOTrainer(llama(), reward_funcs=reward, args=args, train_dataset=rows, processing_class=tokenizer(), peft_config=_config())
    assert trainer.ref_model is None
    trainer.train()
    logs = [e for e in trainer.state.log_history if "kl" in e]
    assert lengths and logs[0]["kl"] == pytest.approx(0, abs=1e-6) and logs[-1]["kl"] > 0
    assert _moved(trainer.model) > 0 and _base_is_untouched(trainer.model)
