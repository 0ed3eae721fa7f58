"""Several gloo processes against one: the losses, the adapter that is saved, and what is refused."""

from __future__ import annotations

import json
import signal
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from veneer import ConfigError, LoadError, LoraConfig, SaveError, get_peft_model, get_peft_model_state_dict
from veneer.distributed import load_state, save_state
from veneer.method import Method, load_methods
from veneer.testing import Case, cases, examples, packed_sites

from .launch import ROOT, TORCHRUN, Ended, start

WORKER = Path(__file__).parent / "distributed" / "worker.py"
METHODS = "lora,dora,ia3,oft,vera,prompt,saved,tied,pissa"


def launch(layout: str, processes: int, methods: str, out: Path, task: str = "compare") -> dict[str, dict[str, Any]]:
    """What the processes found, by method."""
    return launch_all([(layout, task)], processes, methods, out)[layout]


def launch_all(todo: list[tuple[str, str]], processes: int, methods: str, out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Several (layout, task) in one start of the processes by torchrun: what they found, by layout and method."""
    [done] = start([*TORCHRUN, f"--nproc-per-node={processes}", *words(todo, methods, out)], DS_ACCELERATOR="cpu")
    assert done.code == 0, done.said[-6000:]
    return {layout: json.loads((out / f"{layout}.json").read_text()) for layout, _ in todo}


def fork(todo: list[tuple[str, str]], processes: int, methods: str, out: Path) -> Ended:
    """The same without torchrun: one process, which becomes several when it has imported what all need."""
    return start([*words(todo, methods, out), f"--fork={processes}"])[0]


def words(todo: list[tuple[str, str]], methods: str, out: Path) -> list[str]:
    pytest.importorskip("transformers")
    layouts, tasks = (",".join(part) for part in zip(*todo, strict=True))
    return [str(WORKER), "--layout", layouts, "--methods", methods, "--out", str(out), "--task", tasks]


def check(results: dict[str, dict[str, Any]], adapter: float = 1e-4, losses: float = 1e-5) -> None:
    for method, r in results.items():
        assert "error" not in r, (method, r)
        assert r["keys"], method
        assert r["losses"] < losses, (method, r)
        assert r["adapter"] < adapter, (method, r)  # 20 AdamW steps blow roundings up
        assert r.get("merged", 0.0) < adapter, (method, r)


def check_said(said: dict[str, Any], words: dict[str, str]) -> None:
    """What was refused, each with its words."""
    assert said.keys() == words.keys(), said
    assert all(word in said[name] for name, word in words.items()), said


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Where two processes have left what they found, and their end: one kills itself under DDP."""
    out = tmp_path_factory.mktemp("two")
    return out, fork([*LAYOUTS, ("late", "late_ddp"), ("ddp", "killed")], 2, "lora", out)


LAYOUTS = [("ddp", "both"), ("fsdp2", "both"), ("tp_plan", "compare")]


def test_two_processes_train_and_save_what_one_does_and_send_the_adapters_gradients_alone(two: tuple[Path, Ended]) -> None:
    out, done = two
    assert (out / "tp_plan.json").exists(), done.said[-6000:]
    check_bytes({layout: json.loads((out / f"{layout}.json").read_text()) for layout, _ in LAYOUTS})


def test_an_adapter_that_trains_unknown_to_ddp_is_refused(two: tuple[Path, Ended]) -> None:
    out, done = two
    assert (out / "late.json").exists(), done.said[-6000:]
    said = json.loads((out / "late.json").read_text())["lora"]
    assert "error" not in said, said
    for case, words in said.items():
        kind, what = case.split(", ")
        assert words == "" if what == "fine" else f"the adapter '{what}' trains, and DistributedDataParallel" in words, (kind, what, words)
    assert len(said) == 9


@pytest.mark.slow
def test_two_processes_of_torchrun_do_so_with_dora_too(tmp_path: Path) -> None:
    check_bytes(launch_all(LAYOUTS, 2, "lora,dora", tmp_path))


def check_bytes(found: dict[str, dict[str, Any]]) -> None:
    check(found.pop("tp_plan"))
    for layout, results in found.items():
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


@pytest.mark.slow
def test_merged_and_not_on_and_off_in_mixed_batches(tmp_path: Path) -> None:
    found = launch_all([("tp_plan", "merging"), ("tp", "merging"), ("fsdp2", "merging")], 2, "lora,dora", tmp_path)
    for layout, results in found.items():
        for method, r in results.items():
            assert "error" not in r, (layout, method, r)
            assert r.pop("acts") > 0.1
            assert all(off < 1e-5 for off in r.values()), (layout, method, r)


@pytest.mark.slow
def test_what_a_plan_leaves_no_place_for_is_refused(tmp_path: Path) -> None:
    said = launch("tp_plan", 2, "lora", tmp_path, "refusals")["lora"]
    words = {
        "whole": "adapted in its module",
        "bias": "cannot be trained beside",
        "block": "only a linear layer can",
        "parameter": "adapted in its parameter",
        "cache": "keys and values of all heads",
        "norm": "Qwen3RMSNorm has been given a forward of its own",
        "copy": "Qwen3RMSNorm has been given a forward of its own",
        "piece": "shape (16, 32), and the layer's is (32, 32)",
    }
    check_said(said, words)


@pytest.mark.slow
def test_the_plans_of_other_models_than_llamas(tmp_path: Path) -> None:
    kinds = ["qwen2", "qwen3", "gemma3_text", "phi3", "gpt_neox", "glm", "gpt_oss", "mixtral", "qwen3_moe", "deepseek_v3"]
    results = launch("tp_plan", 2, ",".join(f"dora/{kind}" for kind in kinds), tmp_path)
    check({"qwen2": results.pop("dora/qwen2")}, adapter=1e-3, losses=1e-4)  # 3.1e-4 and 7.9e-6 were measured
    check(results)


@pytest.mark.slow
def test_packed_weights_that_a_plan_has_cut_are_refused(tmp_path: Path) -> None:
    """By transformers' plan and by torch's, which makes of a packed weight what no library reads."""
    for library in ("bitsandbytes", "torchao", "optimum.quanto"):
        pytest.importorskip(library)
    found = launch_all([("tp_plan", "packed"), ("tp", "packed")], 2, "lora", tmp_path)
    cut, unknown = (
        "a tensor-parallel plan has cut this",
        "a tensor-parallel plan (tp_plan, parallelize_module) or FSDP2 has cut the packed weight of this",
    )
    wanted = {
        "tp_plan": {
            "nf4": f"{unknown} Linear4bit",
            "int8": f"{unknown} Linear8bitLt",
            "torchao": f"{cut} Linear, stored as 'torchao'",
            "quanto": f"{cut} QLinear, stored as 'quanto'",
        },
        "tp": {"nf4": f"{unknown} Linear4bit", "int8": f"{unknown} Linear8bitLt", "quanto": f"{unknown} QLinear"},
    }
    for layout, words in wanted.items():
        check_said(found[layout]["lora"], words)


@pytest.mark.slow
def test_what_comes_too_late_to_a_sharded_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    said = launch("fsdp2", 2, "lora", tmp_path, "late")["lora"]
    assert said.pop("combined") < 1e-5
    words = {
        "trained": "the adapter 'other' comes to layers that FSDP2 has sharded",
        "first": "the adapter 'default' comes to layers that FSDP2 has sharded",
        "unloaded": "save_merged",
        "int8": "have lost their scales",
    }
    check_said(said, words)


@pytest.mark.parametrize(
    "storage", ["torchao_int8", *(pytest.param(s, marks=pytest.mark.slow) for s in ("nf4", "llm_int8", "quanto_int8"))]
)
def test_a_packed_layer_whose_forward_a_plan_has_bound_is_refused_when_it_runs(storage: str) -> None:
    """As transformers leaves the layers that it has cut into local pieces; those that it says may be cut, and are not, run."""
    if storage not in packed_sites():
        pytest.skip("its library is not installed")
    for bound in (False, True):
        case = Case(LoraConfig(r=2), storage)
        base = case.base()
        layer = next(m for m in base.modules() if hasattr(m, "in_features"))
        layer._hf_quantized_needs_local_tp = True
        if bound:
            layer.forward = MethodType(type(layer).forward, layer)
        model = get_peft_model(base, case.targeted())
        if not bound:
            assert case.run(model).isfinite().all()
            continue
        with pytest.raises(ConfigError, match=r"tensor-parallel plan has cut this \w+, stored as .* FSDP2"):
            case.run(model)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "processes"), [("tp_plan", 2), ("tp_plan", 4), ("hsdp", 4)])
def test_every_method_under_the_models_own_plan_and_sharded_in_two_dimensions(layout: str, processes: int, tmp_path: Path) -> None:
    results = launch(layout, processes, METHODS + ",adalora", tmp_path)
    check({"pissa": results.pop("pissa")}, adapter=3e-4)  # AdamW blows up the rounding of sums over four parts: 1.6e-4 was measured
    check(results)


@pytest.mark.slow
def test_a_state_is_read_in_another_layout_and_by_one_process(tmp_path: Path) -> None:
    """FSDP1, tensor parallel, FSDP2, and one process with no group."""
    first = launch_all([("fsdp1", "first"), ("tp_plan", "first"), ("fsdp2", "first")], 2, "lora,saved", tmp_path)
    again = ["fsdp1", "tp_plan", "fsdp1>ddp", "fsdp2>fsdp1", "tp_plan>fsdp2", "fsdp2>single"]
    found = {**first, **launch_all([(how, "second") for how in again], 2, "lora,saved", tmp_path)}
    for layout, results in found.items():
        for method, r in results.items():
            assert "error" not in r, (layout, method, r)
            assert r["losses"] < 1e-5, (layout, method, r)
            assert r.get("logits", 0.0) < 1e-4, (layout, method, r)


@pytest.mark.slow
def test_every_method_goes_on_from_a_state_bit_for_bit(tmp_path: Path) -> None:
    def step(case: Case, model: Any, opt: torch.optim.Optimizer) -> None:
        torch.manual_seed(8)
        opt.zero_grad()
        case.run(model).float().square().mean().backward()
        opt.step()

    done = set()
    methods = [m for m in load_methods().values() if issubclass(m, Method)]
    configs = [c for m in methods for c in examples(m) for c in list(cases([c]))[:1]]
    pissa = [Case(LoraConfig(r=2, init_lora_weights=start), "linear") for start in ("pissa", "olora")]
    for case in (c for c in [*configs, *pissa] if not c.refused):
        model, again = (case.fresh().train() for _ in range(2))
        if not any(p.requires_grad for p in model.parameters()):  # Arrow
            continue
        opts = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02) for m in (model, again)]
        for _ in range(3):
            step(case, model, opts[0])
        save_state(model, opts[0], tmp_path)
        load_state(again, opts[1], tmp_path)
        for m, opt in zip((model, again), opts, strict=True):
            step(case, m, opt)
            step(case, m, opt)
        mine, theirs = model.state_dict(), again.state_dict()
        assert all(torch.equal(t, theirs[k]) for k, t in mine.items()), case
        assert torch.equal(case.output(model.eval()), case.output(again.eval())), case
        done.add(type(case.config))
    assert len(done) == len(methods), {m.__name__ for m in methods} - {d.__name__ for d in done}


@pytest.mark.slow
def test_adalora_goes_on_from_a_state_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Stopped within the schedule of its ranks: the averages that decide them go on in every layout that it trains in."""
    launch_all([(how, "first") for how in ("ddp", "fsdp2", "tp_plan")], 2, "adalora", tmp_path)
    again = ["ddp", "fsdp2", "tp_plan", "ddp>fsdp2", "fsdp2>tp_plan", "tp_plan>ddp", "fsdp2>single"]
    for layout, found in launch_all([(how, "second") for how in again], 2, "adalora", tmp_path).items():
        assert found["adalora"]["losses"] < 1e-5, (layout, found)
        if "single" not in layout:
            assert found["adalora"]["ranks"] == found["adalora"]["wanted"] and any(
                False in r for r in found["adalora"]["ranks"].values()
            ), layout


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
def test_a_killed_process_ends_the_other_and_leaves_the_checkpoint_and_the_state(
    layout: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if layout == "ddp":
        root, done = request.getfixturevalue("two")
    else:
        root, done = tmp_path, fork([(layout, "killed")], 2, "lora", tmp_path)
    codes, error = json.loads((root / "codes.json").read_text()), done.err.strip().splitlines()[-1]
    assert codes == [1, -signal.SIGKILL], done.said[-6000:]
    assert "Error" in error or "gloo" in error, done.said[-6000:]
    saved = load_file(root / "last" / "adapter_model.safetensors")
    assert all(t.abs().max() > 0 for t in saved.values())  # B left zero: it has been trained
    assert not [f.name for f in (root / "last").iterdir() if "tmp" in f.name]
    state = root / "state"
    assert json.loads((state / "current.json").read_text())["state"] == "state-3"
    assert (state / "state-4").exists() == (layout == "ddp")  # under DDP it was killed in the write
    torch.manual_seed(0)
    model, opt = small(4)
    assert load_state(model, opt, state) == {"step": 3}
    assert all(float(s["step"]) == 3 for s in opt.state.values()) and len(opt.state) == 12
    for key, t in get_peft_model_state_dict(model).items():
        torch.testing.assert_close(t, saved[key] if layout != "ddp" else t, rtol=0, atol=0)
        assert t.abs().max() > 0, key
    save_state(model, opt, state)
    assert {f.name for f in state.iterdir()} == {"current.json", "state-4"}


def small(r: int) -> tuple[Any, torch.optim.Optimizer]:
    """The worker's model with its LoRA, freshly made."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_bias=True,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=r, target_modules=["q_proj", "v_proj", "down_proj"]))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def test_a_state_that_does_not_fit_says_what_is_missing_and_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model, opt = small(4)
    model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()
    opt.step()
    with pytest.raises(LoadError, match="holds no complete state"):
        load_state(model, opt, tmp_path)
    with pytest.raises(SaveError, match="JSON"):
        save_state(model, opt, tmp_path, extra={"what": object()})
    save_state(model, None, tmp_path, extra={"lr": [0.5]})
    with pytest.raises(LoadError, match="saved without an optimizer"):
        load_state(model, opt, tmp_path)
    assert load_state(model, None, tmp_path) == {"lr": [0.5]}
    save_state(model, opt, tmp_path)
    other, theirs = small(8)
    before = {k: t.clone() for k, t in get_peft_model_state_dict(other).items()}
    with pytest.raises(LoadError, match=r"has shape \(4, 32\) .* and \(8, 32\)"):
        load_state(other, theirs, tmp_path)
    assert all(torch.equal(t, before[k]) for k, t in get_peft_model_state_dict(other).items())
    same, last = small(4)
    before = {k: t.clone() for k, t in get_peft_model_state_dict(same).items()}
    for file in tmp_path.rglob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-200])  # tensors are read one by one, and the last cannot be
    with pytest.raises(LoadError, match="could not be read"):
        load_state(same, last, tmp_path)
    assert all(torch.equal(t, before[k]) for k, t in get_peft_model_state_dict(same).items())
    with pytest.raises(SaveError, match="no tensors of an adapter"):
        save_state(torch.nn.Linear(2, 2), None, tmp_path / "bare")
    next(p for p in model.parameters() if p.requires_grad)._hp_mapping = None  # what ZeRO-1 and ZeRO-2 leave on every parameter they step
    with pytest.raises(SaveError, match=r"save_checkpoint.*save_pretrained"):
        save_state(model, opt, tmp_path)
    with pytest.raises(LoadError, match="load_checkpoint"):
        load_state(model, opt, tmp_path)
    save_state(model, None, tmp_path)  # the adapter's numbers are whole there


def test_a_damaged_state_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model, opt = small(4)
    model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()
    opt.step()
    place = save_state(model, opt, tmp_path)
    with torch.no_grad():
        for p in opt.param_groups[0]["params"]:
            p.fill_(5)
            opt.state[p]["exp_avg"].fill_(7)
    (file,) = place.glob("*.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 3 // 5])
    with pytest.raises(LoadError, match="could not be read"):
        load_state(model, opt, tmp_path)
    assert all(bool((p == 5).all()) and bool((opt.state[p]["exp_avg"] == 7).all()) for p in opt.param_groups[0]["params"])
    file.write_bytes(whole)
    load_state(model, opt, tmp_path)
    assert not any(bool((p == 5).all()) or bool((opt.state[p]["exp_avg"] == 7).all()) for p in opt.param_groups[0]["params"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_every_method_on_four_processes(layout: str, tmp_path: Path) -> None:
    check(launch(layout, 4, METHODS + ",adalora", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "tp"])
def test_every_method_on_layouts_that_keep_gradients_by_tensor(layout: str, tmp_path: Path) -> None:
    check(launch(layout, 2, METHODS + ",adalora", tmp_path))


def test_a_parameters_adapter_trains_where_deepspeed_has_replaced_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """`zero.Init` leaves an autograd function of its own in torch's place: only of tensors does it hand gradients on."""
    own = torch.nn.functional.linear

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, w: Any, b: Any) -> torch.Tensor:
            ctx.save_for_backward(x, w)
            return own(x, w, b)

        @staticmethod
        def backward(ctx: Any, dy: Any) -> tuple[torch.Tensor, ...]:
            x, w = ctx.saved_tensors
            return dy @ w, dy.T @ x, dy.sum(0)

    def grads() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_parameters=["0.weight"], init_lora_weights=False)
        )
        model(torch.randn(5, 4)).square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]

    expected = grads()
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: Linear.apply(x, w, b))
    got = grads()
    assert len(got) == len(expected) == 2
    torch.testing.assert_close(got, expected)


def launch_zero(todo: list[tuple[str, str]], processes: int, methods: str, out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """`launch_all` with DeepSpeed; skipped where it is not installed."""
    if find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed (the extra veneer[distributed])")
    return launch_all(todo, processes, methods, out)


def test_zero_2_trains_what_one_process_does(tmp_path: Path) -> None:
    check(launch_zero([("zero2", "compare")], 2, "lora,saved", tmp_path)["zero2"])


@pytest.mark.slow
def test_zero_3_trains_what_one_process_does_and_refuses_what_acts_at_optimizer_steps(tmp_path: Path) -> None:
    results = launch_zero([("zero3", "compare")], 2, METHODS + ",adalora", tmp_path)["zero3"]
    assert "ZeRO-3 keeps every tensor in pieces" in results.pop("adalora")["error"]
    check(results)


@pytest.mark.slow
def test_zero_3_trains_tables_convolutions_and_attention_as_one_process_does(tmp_path: Path) -> None:
    names = {
        "embedding": "lora dora oft",
        "conv": "lora dora biased ia3 ia3in oft",
        "attention": "lora",
        "head": "biased",
        "head.weight": "lora",
    }
    methods = ",".join(f"{name}@{part}" for part, some in names.items() for name in some.split())
    results = launch_zero([("zero3", "compare")], 2, methods, tmp_path)["zero3"]
    assert "ZeRO-3 keeps it in pieces" in results.pop("lora@head.weight")["error"]
    check(results)


@pytest.mark.slow
def test_zero_3_cuts_what_was_adapted_whole(tmp_path: Path) -> None:
    check(launch_zero([("zero_late3", "compare")], 2, "saved,tied,lora@head.weight", tmp_path)["zero_late3"])


@pytest.mark.slow
def test_four_processes_under_zero_draw_dropout_and_train_as_one_does(tmp_path: Path) -> None:
    found = launch_zero([("zero2", "compare"), ("zero3", "compare")], 4, "dropped,dora", tmp_path)
    for results in found.values():
        check(results)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "task"), [(2, "zero_second"), (4, "zero_universal")])
def test_zero_goes_on_from_its_checkpoint_and_one_process_reads_the_adapter(processes: int, task: str, tmp_path: Path) -> None:
    """On another number of processes by way of DeepSpeed's universal checkpoint."""
    layouts, methods = ("zero2", "zero3"), ("lora", "saved")
    found = {"zero_first": launch_zero([(layout, "zero_first") for layout in layouts], 2, ",".join(methods), tmp_path)}
    if task == "zero_universal":
        states = [tmp_path / f"{method}-{layout}-state" for method in methods for layout in layouts]
        options = ["--inject_missing_state", "--num_extract_workers=1", "--num_merge_workers=1"]
        for state in states:
            convert = [
                "-m",
                "deepspeed.checkpoint.ds_to_universal",
                f"--input_folder={state / 'ten'}",
                f"--output_folder={state / 'universal'}",
            ]
            [done] = start([*convert, *options], DS_ACCELERATOR="cpu")
            assert done.code == 0, done.said[-6000:]
    found[task] = launch_zero([(layout, task) for layout in layouts], processes, ",".join(methods), tmp_path)
    for part, of_part in found.items():
        for layout, results in of_part.items():
            for method, r in results.items():
                assert "error" not in r, (part, layout, method, r)
                assert r["losses"] < 1e-5, (part, layout, method, r)
                assert r.get("logits", 0.0) < 1e-4, (part, layout, method, r)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp1", "zero2"])
def test_layouts_with_flat_gradients_train_all_but_schedules_which_are_refused(layout: str, tmp_path: Path) -> None:
    begin = launch_zero if layout == "zero2" else launch_all
    # AdaLoRA first: the worker keeps its model, which is no concern of the others' optimizers
    results = begin([(layout, "compare")], 2, "adalora," + METHODS, tmp_path)[layout]
    assert "flat pieces" in results.pop("adalora")["error"]
    check(results)


def test_the_page_has_the_tables_that_the_script_prints() -> None:
    [done] = start([str(ROOT / "benchmarks" / "scale.py")])
    assert done.out.strip() and done.out.strip() in (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
