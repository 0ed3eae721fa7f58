"""`veneer train` as torchrun and accelerate start it: the same numbers as one process, one voice, one adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .launch import TORCHRUN, start
from .words import save_word_llama

pytest.importorskip("transformers")
pytest.importorskip("typer")

from veneer.cli.train import run

TWO = [*TORCHRUN, "--nproc-per-node=2"]
ACCELERATE = [
    "-m",
    "accelerate.commands.launch",
    "--cpu",
    "--num_processes=2",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
]
# with --cpu alone accelerate starts one process, and several by MPI only; its launcher for GPUs is torchrun, and takes what it finds
ACCELERATE_TWO = [
    *["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"],
    *["--dynamo_backend=no", "--main_process_port=0"],
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 12 steps over 37 rows, which 4 does not divide."""
    folder = tmp_path_factory.mktemp("train")
    save_word_llama(folder / "model")
    texts = ["the cat sat on the mat", "the dog ran on a rug", "hello how are you", "fine the cat ran"] * 13
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": t, "label": t[0]}) + "\n" for t in texts))
    fields = {
        "model": str(folder / "model"), "data": str(folder / "data.jsonl"), "steps": 12, "length": 8, "learning_rate": 1e-2, "dtype": "float32",
        "method_fields": {"r": 4},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(fields))
    return folder / "recipe.yaml"


def train(recipe: Path, out: Path, *options: str, by: list[str] = TWO, code: int = 0) -> tuple[dict[str, Any], str]:
    """The record of a run on two processes (or, `by` nothing, on one), and what it said."""
    [done] = start([*by, "-m", "veneer", "train", str(recipe), "--out", str(out), *options])
    assert (done.code == 0) == (code == 0), done.said[-6000:]
    return (json.loads((out / "run.json").read_text()) if code == 0 else {}), done.said


def same(one: Path, two: Path, a: dict[str, Any], b: dict[str, Any]) -> None:
    losses = [[s["loss"] for s in r["losses"]] for r in (a, b)]
    assert len(losses[0]) == len(losses[1]) and losses[0][-1] < losses[0][0]
    assert max(abs(x - y) for x, y in zip(*losses, strict=True)) < 1e-5
    for when in ("before", "after"):
        assert a[when] == pytest.approx(b[when], abs=1e-5)
    for key, t in load_file(one / "adapter_model.safetensors").items():
        torch.testing.assert_close(load_file(two / "adapter_model.safetensors")[key], t, atol=1e-5, rtol=0)


def test_two_processes_do_what_one_does_and_speak_with_one_voice(recipe: Path, tmp_path: Path) -> None:
    one = run(str(recipe), {"out": str(tmp_path / "one"), "batch_size": 4})  # what the command calls
    two, said = train(recipe, tmp_path / "two", "--batch-size", "2")
    same(tmp_path / "one", tmp_path / "two", one, two)
    assert said.count(" done ") == 1 and said.count("trained parameters") == 1, said
    assert "on each of 2 processes" in said
    assert two["plan"]["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_every_task_and_accumulation_and_accelerate_too(recipe: Path, task: str, tmp_path: Path) -> None:
    one, _ = train(recipe, tmp_path / "one", "--batch-size", "4", "--accumulate", "2", "--task", task, by=ACCELERATE)
    two, _ = train(recipe, tmp_path / "two", "--batch-size", "2", "--accumulate", "2", "--task", task)
    same(tmp_path / "one", tmp_path / "two", one, two)


@pytest.mark.slow
def test_two_processes_of_accelerate_do_what_one_does_and_speak_with_one_voice(recipe: Path, tmp_path: Path) -> None:
    one, _ = train(recipe, tmp_path / "one", "--batch-size", "4", by=[])
    two, said = train(recipe, tmp_path / "two", "--batch-size", "2", by=ACCELERATE_TWO)
    same(tmp_path / "one", tmp_path / "two", one, two)
    assert two["plan"]["processes"] == 2 and said.count(" done ") == 1, said


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["nf4", "torchao-int8"])
def test_packed_weights_train_on_two_processes_as_on_one(storage: str, recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes" if storage == "nf4" else "torchao")
    one, _ = train(recipe, tmp_path / "one", "--batch-size", "4", "--quantize", storage, by=[])
    two, _ = train(recipe, tmp_path / "two", "--batch-size", "2", "--quantize", storage)
    same(tmp_path / "one", tmp_path / "two", one, two)


@pytest.mark.slow
def test_a_run_of_two_processes_is_resumed_exactly(recipe: Path, tmp_path: Path) -> None:
    whole, _ = train(recipe, tmp_path / "whole", "--batch-size", "2", "--save-every", "4")
    for path in (tmp_path / "whole" / "checkpoints").glob("checkpoint-*"):
        (tmp_path / "cut" / "checkpoints").mkdir(parents=True, exist_ok=True)
        if path.name == "checkpoint-8":
            path.rename(tmp_path / "cut" / "checkpoints" / path.name)
    cut, _ = train(recipe, tmp_path / "cut", "--batch-size", "2", "--save-every", "4", "--resume")
    assert [s["loss"] for s in cut["losses"]][-4:] == [s["loss"] for s in whole["losses"]][-4:]
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(t, b[k]) for k, t in a.items())


@pytest.mark.slow
def test_bad_input_is_told_once(recipe: Path, tmp_path: Path) -> None:
    _, said = train(recipe, tmp_path / "out", "--data", str(tmp_path / "nothing.jsonl"), code=2)
    assert said.count("veneer train") == 1 and said.count("╭") == 1 and not (tmp_path / "out" / "run.json").exists()
