"""transformers' Trainer: training, eval_loss, the best checkpoint, save_only_model, resuming bit for bit."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from .small import llama

ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (24, 8), generator=torch.Generator().manual_seed(5))]


def _adapted(config: Any = None) -> Any:
    torch.manual_seed(0)
    config = config or LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.2, modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    return get_peft_model(llama(), config)


def _trainer(model: Any, folder: Path, **args: Any) -> transformers.Trainer:
    fixed = {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 4,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3, "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.Trainer(model, transformers.TrainingArguments(**{**fixed, **args}), train_dataset=ROWS[:16], eval_dataset=ROWS[16:])


def _losses(trainer: transformers.Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def _state(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


CONFIGS = {
    "lora": None,
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["v_proj"], task_type="CAUSAL_LM"),
    "adalora": AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=8, target_modules=["v_proj"], task_type="CAUSAL_LM"
    ),
    "prompt": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    whole = _trainer(_adapted(copy.deepcopy(config)), tmp_path / "whole")
    whole.train()
    first = _trainer(_adapted(copy.deepcopy(config)), tmp_path / "cut")
    first.add_callback(_StopAt(4))
    first.train()
    assert (tmp_path / "cut" / "checkpoint-4").is_dir() and first.state.global_step == 4
    second = _trainer(_adapted(copy.deepcopy(config)), tmp_path / "cut")
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    want, got = _losses(whole), _losses(second)
    assert len(want) == 8 and {s: want[s] for s in range(5, 9)} == {s: got[s] for s in range(5, 9)}
    ours, theirs = _state(whole.model), _state(second.model)
    assert ours and all(torch.equal(t, theirs[n]) for n, t in ours.items())


class _StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def test_eval_loss_is_there_and_the_best_checkpoint_comes_back(tmp_path: Path) -> None:
    trainer = _trainer(
        _adapted(), tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        learning_rate=0.05,  # rows at random: what is learnt of some is wrong for others, so the last checkpoint is not the best
    )  # fmt: skip
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(losses, key=losses.__getitem__)
    assert len(losses) == 4 and trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}") and best != 8
    again = PeftModel.from_pretrained(llama(), tmp_path / f"checkpoint-{best}")
    x = ROWS[0]["input_ids"][None]
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(trainer.model(x).logits, again(x).logits)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)


def test_save_only_model_writes_the_adapter_alone(tmp_path: Path) -> None:
    trainer = _trainer(_adapted(), tmp_path, save_only_model=True)
    trainer.train()
    files = {p.name for p in (tmp_path / "checkpoint-8").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not files & {"optimizer.pt", "scheduler.pt", "model.safetensors", "rng_state.pth"}
    trainer.save_model(str(tmp_path / "last"))
    again = PeftModel.from_pretrained(llama(), tmp_path / "last")
    x = ROWS[0]["input_ids"][None]
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(trainer.model(x).logits, again(x).logits)


def test_a_model_with_an_adapter_of_its_own_trains_and_saves(tmp_path: Path) -> None:
    """`model.add_adapter` and Trainer, without a PeftModel: checkpoints hold the adapter, and AutoModel-like loading gives the trained model."""
    model = llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    trainer = _trainer(model, tmp_path, eval_strategy="steps", eval_steps=4)
    trainer.train()
    assert len([e for e in trainer.state.log_history if "eval_loss" in e]) == 2
    files = {p.name for p in (tmp_path / "checkpoint-8").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files and "model.safetensors" not in files
    again = llama()
    again.load_adapter(str(tmp_path / "checkpoint-8"))
    x = ROWS[0]["input_ids"][None]
    with torch.no_grad():
        want = model.eval()(x).logits
        assert torch.equal(again(x).logits, want) and not torch.allclose(llama()(x).logits, want, atol=1e-2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_loss(reentrant: bool, tmp_path: Path) -> None:
    plain = _trainer(_adapted(), tmp_path / "a", max_steps=3)
    plain.train()
    again = _trainer(
        _adapted(), tmp_path / "b", max_steps=3, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*use_cache.*")
        again.train()
    assert _losses(plain) == pytest.approx(_losses(again), abs=1e-6)
    assert max(_losses(plain).values()) > 0
