"""End to end: `veneer train` against PEFT with transformers' Trainer, on SmolLM2-135M: the same rows of different lengths in the same order, the same
start, steps, method and learning rate; what both have learned is measured by one piece of code.

Each run is a process of its own, so that its peak memory is its own: `python -m benchmarks.train` runs all of them, as `make bench` does.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

ROWS, LENGTH, RATE, RANK = 4, 512, 5e-4, 16  # rows an optimizer step; tokens a row at most
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HELD_OUT = 40


def compare(steps: int) -> dict[str, dict[str, float]]:
    """What each run took, and the held-out perplexity of each adapter."""
    with tempfile.TemporaryDirectory() as work:
        out: dict[str, dict[str, float]] = {}
        for what in RUNS:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.train", "--one", what, "--folder", work, "--steps", str(steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            out[what] = json.loads(done.stdout.strip().splitlines()[-1])
        return out


def _pieces() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Python's documentation as questions and answers, (training, held out): a topic's section is the answer, of 20 to 2,000 characters."""
    from pydoc_data.topics import topics

    rows = []
    for name, text in sorted(topics.items()):
        paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text) if len(p.strip()) >= 20]
        for i in range(0, len(paragraphs) - 1, 2):
            said = "\n\n".join(paragraphs[i + 1 : i + 2 + i // 2 % 4])[:2000]
            rows.append({"prompt": f"Go on with Python's documentation on {name}: {paragraphs[i][:300]}", "completion": said})
    held = rows[:: len(rows) // HELD_OUT][:HELD_OUT]
    return [r for r in rows if r not in held], held


def _files(folder: Path) -> tuple[Path, Path]:
    paths = (folder / "train.jsonl", folder / "held_out.jsonl")
    for path, rows in zip(paths, _pieces(), strict=True):
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return paths


def _model() -> Path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    import assets

    found: Path = assets.smollm2()
    return found


def _recipe(folder: Path, steps: int) -> dict[str, Any]:
    data, held = _files(folder)
    return {
        "model": str(_model()), "data": str(data), "eval_data": str(held), "out": str(folder / "veneer"), "method": "lora", "packing": "rows",
        "method_fields": {"r": RANK, "lora_alpha": RANK, "target_modules": TARGETS}, "steps": steps, "batch_size": ROWS, "length": LENGTH,
        "learning_rate": RATE, "dtype": "bfloat16", "schedule": "constant", "warmup": 0.0,
    }  # fmt: skip


def _start(folder: Path, steps: int) -> dict[str, float]:
    """The adapter that both begin with, and the rows in their order."""
    from veneer.training.prepare import prepare
    from veneer.training.processes import Shuffled
    from veneer.training.recipe import read_recipe

    recipe = read_recipe(None, _recipe(folder, steps))
    prepared = prepare(recipe)
    prepared.model.save_pretrained(folder / "start")
    sampler, order = Shuffled(len(prepared.train), ROWS, recipe.seed), []
    while len(order) < steps * ROWS:
        order += list(sampler)
        sampler.set_epoch(sampler.epoch + 1)
    rows = [prepared.train[i] for i in order[: steps * ROWS]]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "held.json").write_text(json.dumps(prepared.held_out), encoding="utf-8")
    lengths = sorted(len(r["input_ids"]) for r in rows)
    padded = sum(ROWS * max(len(r["input_ids"]) for r in rows[i : i + ROWS]) for i in range(0, len(rows), ROWS))
    said = sum(x != -100 for r in rows for x in r["labels"])
    return {"rows": len(rows), "shortest": lengths[0], "median": lengths[len(rows) // 2], "longest": lengths[-1], "tokens": sum(lengths),
            "padded": padded, "answers": said}  # fmt: skip


def _read(folder: Path, name: str) -> list[dict[str, list[int]]]:
    found: list[dict[str, list[int]]] = json.loads((folder / name).read_text(encoding="utf-8"))
    return found


def _measured(train: Callable[[], object]) -> dict[str, float]:
    """Seconds of the wall and of the process, and the megabytes that it comes to hold at its highest beyond those before and in all."""
    gc.collect()
    before, cpu, started = _now_mb(), time.process_time(), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak of loading
    train()
    peak = _status("VmHWM")
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "added_mb": peak - before,
        "peak_mb": peak,
    }


def _status(key: str) -> float:
    """Megabytes, as Linux counts them."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _now_mb() -> float:
    return _status("VmRSS")


def _with_veneer(folder: Path, steps: int) -> dict[str, float]:
    from veneer.training.prepare import prepare
    from veneer.training.recipe import read_recipe
    from veneer.training.record import finish, new_record
    from veneer.training.trainer import make_trainer

    recipe = read_recipe(None, _recipe(folder, steps))
    prepared = prepare(recipe)
    record = new_record(prepared, recipe)
    trainer = make_trainer(prepared, recipe)
    found = _measured(trainer.train)
    finish(prepared, recipe, record)
    return found | {"loss": [e["loss"] for e in trainer.state.log_history if "loss" in e][-1]}


def _with_peft(folder: Path, steps: int, padded: bool = True) -> dict[str, float]:
    import peft
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(_model())
    model = transformers.AutoModelForCausalLM.from_pretrained(_model(), dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(model, str(folder / "start"), is_trainable=True)
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=RATE, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.use_cache = padded  # with a cache, transformers lets rows end to end see each other
    join = transformers.DataCollatorForSeq2Seq(tokenizer) if padded else transformers.DataCollatorWithFlattening()
    trainer: Any = transformers.Trainer(model=model, args=args, train_dataset=_read(folder, "rows.json"), data_collator=join)
    found = _measured(trainer.train)
    model.save_pretrained(folder / ("peft" if padded else "peft_flat"))
    return found | {"loss": [e["loss"] for e in trainer.state.log_history if "loss" in e][-1]}


def _with_peft_flat(folder: Path, steps: int) -> dict[str, float]:
    """The same with transformers' collator that lays rows end to end."""
    return _with_peft(folder, steps, padded=False)


def _floor(folder: Path, steps: int) -> dict[str, float]:
    """The frozen model on the same rows without padding, its loss over the answers in chunks, differentiated to the embeddings."""
    import torch
    import transformers

    from veneer.training.attention import attend_by_rows
    from veneer.training.data import end_to_end
    from veneer.training.loss import Aside, chunked_cross_entropy

    model = transformers.AutoModelForCausalLM.from_pretrained(_model(), dtype=torch.bfloat16).requires_grad_(False).train()
    attend_by_rows(model)
    rows, head = _read(folder, "rows.json"), model.lm_head
    model.lm_head = Aside()

    def run() -> None:
        for i in range(0, steps * ROWS, ROWS):
            batch = end_to_end(rows[i : i + ROWS])
            x = model.model.embed_tokens(batch["input_ids"]).requires_grad_()
            h = model(inputs_embeds=x, position_ids=batch["position_ids"], use_cache=False).logits
            total, count = chunked_cross_entropy(h[0, :-1], head.weight, None, batch["labels"][0, 1:])
            (total / count).backward()

    return _measured(run)


def _quality(folder: Path, steps: int) -> dict[str, float]:
    """Held-out perplexity with the start, and with what both have trained: the model's own logits, a row at a time."""
    import torch
    import transformers

    import veneer

    out = {}
    for name in ("start", "veneer", "peft", "peft_flat"):
        base = transformers.AutoModelForCausalLM.from_pretrained(_model(), dtype=torch.bfloat16)
        model = veneer.PeftModel.from_pretrained(base, folder / name).eval()
        total = count = 0.0
        with torch.no_grad():
            for row in _read(folder, "held.json"):
                labels = torch.tensor(row["labels"][1:])
                logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
                total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                count += int((labels != -100).sum())
        out[name] = float(torch.tensor(total / count).exp())
    return out


RUNS = {"start": _start, "veneer": _with_veneer, "peft": _with_peft, "peft_flat": _with_peft_flat, "floor": _floor, "quality": _quality}


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 30,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    out: Annotated[Path | None, typer.Option(help="The folder for train.json.")] = None,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Train with both, and say what it took and what was learned."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    import torch

    if one is not None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        print(json.dumps(RUNS[one](folder, steps)))
        return
    found: dict[str, Any] = {"torch": torch.__version__, "threads": threads, "steps": steps, **compare(steps)}
    print(json.dumps(found, indent=1))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "train.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
