"""transformers' Trainer with `import veneer` alone. Each test has a process of its own: what is imported first decides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SETUP = """
import sys, torch, transformers, veneer
from datasets import Dataset

def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16))

def gpt():  # its head is tied to its embedding
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16))

def trainer(model, rows, **more):
    args = transformers.TrainingArguments(**{**dict(output_dir=FOLDER, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.1,
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False), **more})
    return transformers.Trainer(model, args, train_dataset=rows, eval_dataset=rows)

FOLDER = sys.argv[1]
ROWS = Dataset.from_list([{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(3, 15)])
"""


def _python(code: str, folder: Path) -> str:
    out = subprocess.run([sys.executable, "-c", SETUP + code, str(folder)], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-4000:]
    return out.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("first", ["", "transformers.Trainer"])
def test_a_checkpoint_holds_the_adapter_and_comes_back(first: str, tmp_path: Path) -> None:
    """Without a task type, of a model with tied weights, whichever is there first: Trainer or the model with adapters."""
    code = f"""
{first}
model = veneer.get_peft_model(gpt(), veneer.LoraConfig(r=2, target_modules=["c_attn"]))
run = trainer(model, ROWS, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
run.train()
import os
files = set(os.listdir(FOLDER + "/checkpoint-2"))
assert {{"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"}} <= files and "model.safetensors" not in files, files
best = veneer.PeftModel.from_pretrained(gpt(), run.state.best_model_checkpoint)
x = torch.tensor([[5, 6, 7]])
assert torch.equal(best(x).logits, model.eval()(x).logits) and not torch.equal(best(x).logits, gpt()(x).logits)
assert abs(run.evaluate()["eval_loss"] - run.state.best_metric) < 1e-6
again = veneer.get_peft_model(gpt(), veneer.LoraConfig(r=2, target_modules=["c_attn"]))
second = trainer(again, ROWS, max_steps=6)
second.train(resume_from_checkpoint=FOLDER + "/checkpoint-4")
assert second.state.global_step == 6
print("done")
"""
    assert _python(code, tmp_path) == "done"


def test_every_column_that_the_model_takes_reaches_it(tmp_path: Path) -> None:
    code = """
rows = Dataset.from_list([{"input_ids": [3, 4, 5], "token_type_ids": [0, 0, 1], "label": i % 2, "other": 1} for i in range(4)])
model = veneer.get_peft_model(bert(), veneer.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
print(*sorted(next(iter(trainer(model, rows).get_train_dataloader()))))
"""
    assert _python(code, tmp_path) == "input_ids labels token_type_ids"


def test_other_models_are_saved_as_they_were(tmp_path: Path) -> None:
    """A model without adapters is saved whole, and PEFT is not looked for."""
    code = """
veneer.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), veneer.LoraConfig(target_modules=["0"]))
assert "transformers.trainer" not in sys.modules
finders = len(sys.meta_path)
transformers.Trainer
from transformers import trainer_utils
assert len(sys.meta_path) == finders - 1 and "peft" not in sys.modules
run = trainer(gpt(), ROWS, max_steps=2)
run.train()
import os
assert "model.safetensors" in os.listdir(FOLDER + "/checkpoint-2")
assert not trainer_utils._is_peft_model(gpt())
print("done")
"""
    assert _python(code, tmp_path) == "done"
