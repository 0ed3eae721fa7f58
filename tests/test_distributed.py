"""Several gloo processes against one: the losses, the adapter that is saved, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "distributed" / "worker.py"
METHODS = "lora,dora,ia3,oft,vera,prompt,saved,tied,pissa"


def launch(layout: str, processes: int, methods: str, out: Path, task: str = "compare") -> dict[str, dict[str, Any]]:
    pytest.importorskip("transformers")
    src = Path(__file__).resolve().parents[1] / "src"
    env = {**os.environ, "PYTHONPATH": str(src), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(WORKER)]
    for _ in range(2):  # on a machine that is all taken, processes may not find each other in time
        done = subprocess.run(
            [*command, "--layout", layout, "--methods", methods, "--out", str(out), "--task", task],
            capture_output=True, text=True, timeout=300, env=env,
        )  # fmt: skip
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, dict[str, Any]] = json.loads((out / f"{layout}.json").read_text())
    return results


def check(results: dict[str, dict[str, Any]]) -> None:
    for method, r in results.items():
        assert "error" not in r, (method, r)
        assert r["keys"], method
        assert r["losses"] < 1e-5, (method, r)
        assert r["adapter"] < 1e-4, (method, r)  # 20 AdamW steps blow roundings up
        assert r.get("merged", 0.0) < 1e-4, (method, r)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_processes_train_and_save_what_one_does_and_send_the_adapters_gradients_alone(layout: str, tmp_path: Path) -> None:
    results = launch(layout, 2, "lora,dora", tmp_path, "both")
    check(results)
    for method, r in results.items():
        for kind, counted in r["bytes"].items():
            by, gradients, weights = counted["by"], 4 * counted["trained"], 4 * counted["all"]
            if layout == "ddp":
                assert by.pop("allreduce_") == gradients, (method, kind)
                assert sum(by.values()) < 200, (method, kind)  # the broadcast of the model's buffers
            else:
                assert by.pop("_reduce_scatter_base_") == gradients, (method, kind)
                # the weights, once for each direction; the outermost unit stays after the first
                assert weights < by.pop("_allgather_base_") <= 2 * weights, (method, kind)
                assert not by, (method, kind)
        assert r["bytes"]["adapter"]["trained"] * 10 < r["bytes"]["full"]["trained"], method


def same(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    assert (one / "adapter_config.json").read_text() == (other / "adapter_config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_saved_by_two_goes_on_with_four(layout: str, tmp_path: Path) -> None:
    methods = ["lora", "dora", "ia3", "saved", "tied"]
    halves = {task: launch(layout, n, ",".join(methods), tmp_path, task) for task, n in (("first", 2), ("second", 4))}
    for task, results in halves.items():
        for method, r in results.items():
            assert "error" not in r, (task, method, r)
            assert r["losses"] < 1e-5, (task, method, r)
    for method in methods:
        assert halves["second"][method]["logits"] < 1e-4, method  # a plain model reads the file
        for part in ("half", "whole"):
            same(tmp_path / f"{method}-{layout}-{part}", tmp_path / f"{method}-single-{part}")


@pytest.mark.parametrize("layout", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_other_and_leaves_the_checkpoint(layout: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    src = Path(__file__).resolve().parents[1] / "src"
    meet = f"file://{tmp_path / 'meet'}"  # no torchrun, which would end the other by itself
    command = [
        sys.executable,
        str(WORKER),
        "--layout",
        layout,
        "--methods",
        "lora",
        "--out",
        str(tmp_path),
        "--task",
        "killed",
        "--meet",
        meet,
    ]
    env = {**os.environ, "PYTHONPATH": str(src), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    started = [subprocess.Popen(command, env={**env, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        _, said = started[0].communicate(timeout=90)
        started[1].communicate(timeout=30)
    finally:
        for p in started:
            p.kill()
    assert started[1].returncode == -signal.SIGKILL
    assert started[0].returncode == 1, said[-2000:]
    assert "Error" in said.strip().splitlines()[-1] or "gloo" in said, said[-2000:]
    saved = load_file(tmp_path / "last" / "adapter_model.safetensors")
    assert all(t.abs().max() > 0 for t in saved.values())  # B left zero: it has been trained
    assert not [f.name for f in (tmp_path / "last").iterdir() if "tmp" in f.name]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_every_method_on_four_processes(layout: str, tmp_path: Path) -> None:
    check(launch(layout, 4, METHODS + ",adalora", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "tp"])
def test_every_method_on_layouts_that_keep_gradients_by_tensor(layout: str, tmp_path: Path) -> None:
    check(launch(layout, 2, METHODS + ",adalora", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["lora", "dora", "ia3", "oft", "vera", "prompt", "pissa"]
)  # each in a launch of its own: see docs/distributed.md
def test_zero_3_trains_what_one_process_does(method: str, tmp_path: Path) -> None:
    if find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    check(launch("zero3", 2, method, tmp_path))


@pytest.mark.slow
def test_zero_3_refuses_what_acts_at_optimizer_steps(tmp_path: Path) -> None:
    if find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    assert "ZeRO-3 keeps every tensor in pieces" in launch("zero3", 2, "adalora", tmp_path)["adalora"]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp1", "zero2"])
def test_layouts_with_flat_gradients_train_all_but_schedules_which_are_refused(layout: str, tmp_path: Path) -> None:
    if layout == "zero2" and find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    results = launch(layout, 2, METHODS + ",adalora", tmp_path)
    assert "flat pieces" in results.pop("adalora")["error"]
    check(results)


def test_the_page_has_the_tables_that_the_script_prints() -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, str(root / "benchmarks" / "scale.py")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in (root / "docs" / "distributed.md").read_text(encoding="utf-8")
