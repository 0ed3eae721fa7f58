"""End to end: `veneer train` against PEFT with transformers' Trainer, on SmolLM2-135M: the same rows, steps, method and learning rate.

Each run is a process of its own, so that its peak memory is its own: `python -m benchmarks.train veneer|peft` prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, ROWS, LENGTH, RATE, RANK = 6, 4, 256, 1e-3, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def compare() -> dict[str, dict[str, float]]:
    """Seconds, tokens per second and added megabytes of both, and the loss they end at."""
    out = {}
    for library in ("veneer", "peft"):
        found = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.train", library], capture_output=True, text=True, check=True
        )
        out[library] = json.loads(found.stdout.strip().splitlines()[-1])
    return out


def _rows(folder: Path) -> Path:
    """Python's documentation topics, the longest ones, so that rows are full."""
    from pydoc_data.topics import topics

    texts = sorted(topics.values(), key=len, reverse=True)[: STEPS * ROWS]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def _model() -> Path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    import assets

    found: Path = assets.smollm2()
    return found


def _rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _with_veneer(folder: Path) -> dict[str, float]:
    from veneer.cli.train import run

    record = run(
        None,
        {
            "model": str(_model()), "data": str(_rows(folder)), "out": str(folder / "out"), "method": "lora", "eval_fraction": 0.0,
            "method_fields": {"r": RANK, "lora_alpha": RANK, "target_modules": TARGETS}, "steps": STEPS, "batch_size": ROWS, "length": LENGTH,
            "learning_rate": RATE, "dtype": "bfloat16", "schedule": "constant", "warmup": 0.0,
        },
    )  # fmt: skip
    return {"seconds": record["seconds"], "tokens": record["tokens_per_second"] * record["seconds"], "loss": record["losses"][-1]["loss"]}


def _with_peft(folder: Path) -> dict[str, float]:
    import peft
    import torch
    import transformers

    path = _model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM"))
    texts = [json.loads(line)["text"] for line in _rows(folder).read_text(encoding="utf-8").splitlines()]
    rows = [tokenizer(t, truncation=True, max_length=LENGTH)["input_ids"] for t in texts]
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=RATE, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer: Any = transformers.Trainer(model=model, args=args, train_dataset=[{"input_ids": r} for r in rows], data_collator=collate)
    started = time.perf_counter()
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    return {"seconds": time.perf_counter() - started, "tokens": float(sum(map(len, rows))), "loss": losses[-1]}


def main(library: str) -> None:
    """One run, as a line of JSON."""
    import torch

    with tempfile.TemporaryDirectory() as work:
        import transformers  # noqa: F401  what it takes is not the training's

        before = time.process_time()
        found = (_with_veneer if library == "veneer" else _with_peft)(Path(work))
        found |= {"cpu_seconds": time.process_time() - before, "peak_mb": _rss(), "threads": torch.get_num_threads()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
