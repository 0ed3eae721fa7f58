"""What speed is made of, counted: operations, bytes kept for the backward, calls. The budgets stand in budgets.json.

`python tests/test_budgets.py` writes that file anew: for a change that lowers a figure, or is worth what it costs.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import veneer
from veneer.engine.holders import Holder, Keyed, made
from veneer.engine.layer import adapted_layers
from veneer.ops import Rows
from veneer.testing.laws import move

BUDGETS = Path(__file__).with_name("budgets.json")
N_IN, N_OUT, TOKENS = 64, 96, 160
FORMS: dict[str, Callable[[], Any]] = {
    "lora": lambda: veneer.LoraConfig(r=4),
    "lora, dropout": lambda: veneer.LoraConfig(r=4, lora_dropout=0.1),
    "dora": lambda: veneer.LoraConfig(r=4, use_dora=True),
    "vera": lambda: veneer.VeraConfig(r=8),
    "pvera": lambda: veneer.PveraConfig(r=8),
    "delora": lambda: veneer.DeloraConfig(r=4),
    "miss": lambda: veneer.MissConfig(r=8),
    "ia3": lambda: veneer.IA3Config(feedforward_modules=[]),
    "road": lambda: veneer.RoadConfig(group_size=8),
    "oft": lambda: veneer.OFTConfig(oft_block_size=8),
    "boft": lambda: veneer.BOFTConfig(boft_block_size=4),
    "hra": lambda: veneer.HRAConfig(r=4),
    "loha": lambda: veneer.LoHaConfig(r=4),
    "loha, thin": lambda: veneer.LoHaConfig(r=2),
    "lokr": lambda: veneer.LoKrConfig(r=4),
    "hira": lambda: veneer.HiraConfig(r=4),
    "fourierft": lambda: veneer.FourierFTConfig(n_frequency=50),
    "waveft": lambda: veneer.WaveFTConfig(n_frequency=50),
    "c3a": lambda: veneer.C3AConfig(block_size=16),
    "shira": lambda: veneer.ShiraConfig(r=4, random_seed=0),
    "frod": lambda: veneer.FrodConfig(progressbar=False),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Net(nn.Module):
    def __init__(self, layers: int = 1, n_in: int = N_IN, n_out: int = N_OUT) -> None:
        super().__init__()
        self.proj = nn.ModuleList(nn.Linear(n_in, n_out, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([p(x) for p in self.proj]).sum(0)


def Flops() -> FlopCounterMode:
    """Counts products of matrices, those that are added in place too."""

    def product(y: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * math.prod(a) * b[-1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product, torch.ops.aten.baddbmm_: product})


class Calls(TorchDispatchMode):
    """Counts what torch is asked to do, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _adapted(form: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = FORMS[form]()
    config.target_modules = {"proj.0"}
    model = veneer.get_peft_model(Net().to(dtype), config)
    move(model, size=0.05)
    return model


def _kept(model: Any, x: Tensor) -> tuple[Tensor, int]:
    """The output, and the bytes that autograd keeps for it beside the input and the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            held[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return y, sum(held.values())


def measured(form: str, dtype: str) -> dict[str, int]:
    """The figures of a training step through one linear layer, beyond those of the frozen one."""
    model, x = _adapted(form, DTYPES[dtype]), torch.randn(2, TOKENS // 2, N_IN, dtype=DTYPES[dtype]).requires_grad_()
    y, kept = _kept(model, x)
    y.sum().backward()
    with Flops() as flops:
        model(x).sum().backward()
    with Calls() as calls:
        model(x).sum().backward()
    return {"flops": flops.get_total_flops() - 4 * TOKENS * N_IN * N_OUT, "kept": kept, "calls": calls.count}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_training_step_stays_in_its_budget(form: str, dtype: str) -> None:
    budget, got = json.loads(BUDGETS.read_text(encoding="utf-8"))[form][dtype], measured(form, dtype)
    over = {k: (v, budget[k]) for k, v in got.items() if v > budget[k]}
    assert not over, f"(measured, budget): {over}"


def test_lora_keeps_its_thin_product_alone() -> None:
    """No copy of what has the size of the tokens, and no operation beyond the six thin products."""
    r, item = 4, 4
    got = measured("lora", "float32")
    assert got["kept"] == TOKENS * r * item
    assert got["flops"] == 2 * TOKENS * r * (N_IN + N_OUT) + 4 * TOKENS * r * (N_IN + N_OUT)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_mixed_batch_takes_the_frozen_product_once(k: int) -> None:
    """Its operations are those of the frozen layer and of each row's own factors, whatever the number of adapters; its calls do not grow with it."""
    torch.manual_seed(0)
    model: Any = veneer.get_peft_model(Net(), veneer.LoraConfig(r=4, target_modules=["proj.0"], init_lora_weights=False), "a0").eval()
    for i in range(1, k):
        model.add_adapter(f"a{i}", veneer.LoraConfig(r=4, target_modules=["proj.0"], init_lora_weights=False))
    x, names = torch.randn(8, 5, N_IN), [f"a{i % k}" for i in range(8)]
    with torch.no_grad():
        want = torch.cat([_using(model, n, x[i : i + 1]) for i, n in enumerate(names)])
        with Flops() as flops:
            got = model(x, adapter_names=names)
        with Calls() as calls:
            model(x, adapter_names=names)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert flops.get_total_flops() == 2 * 40 * (N_IN * N_OUT + 4 * (N_IN + N_OUT))
    assert calls.count <= 14


def _using(model: Any, name: str, x: Tensor) -> Tensor:
    with model.using(name):
        out: Tensor = model(x)
    return out


@torch.no_grad()
@pytest.mark.parametrize("form", ["lora", "dora", "oft", "boft", "hra"])
def test_one_token_without_gradients_makes_nothing_anew(form: str) -> None:
    """A second call makes no norm and no rotation again."""
    model, x = _adapted(form, torch.float32).eval(), torch.randn(1, 1, N_IN)
    with Calls() as first:
        y = model(x)
    with Calls() as second:
        again = model(x)
    assert torch.equal(y, again)
    assert second.count <= {"lora": 9, "dora": 16, "oft": 9, "boft": 24, "hra": 24}[form] and (form == "lora" or second.count < first.count)


@torch.no_grad()
@pytest.mark.parametrize("form", ["dora", "oft", "boft", "ia3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_recalled_is_true_however_a_tensor_is_written(form: str, dtype: str) -> None:
    """In place, through .data, as a new parameter, in one row of the frozen weight; or another scaling."""
    model = _adapted(form, DTYPES[dtype]).eval()
    x = torch.randn(3, N_IN, dtype=DTYPES[dtype])
    ((_, layer),) = adapted_layers(model)
    leaf = next(n for n, s in layer.attached["default"].leaves.items() if s.trainable)
    p, w = layer.leaf("default", leaf), layer.base_layer.weight

    def same() -> None:
        want = layer.change("default").rows(lambda z: z @ layer.base_layer.weight.T, x, Rows())
        layer.attached["default"].recalled = None
        fresh = layer.change("default").rows(lambda z: z @ layer.base_layer.weight.T, x, Rows())
        assert torch.equal(want, fresh)

    writes: list[Callable[[], Any]] = [
        lambda: p.mul_(1.5),
        lambda: p.data.mul_(0.5),
        lambda: p.data.view(-1)[3:4].add_(0.25),
        lambda: w.data[5].mul_(2.0),
        lambda: w.data.view(-1)[7:8].add_(0.5),
        lambda: w.mul_(1.1),
        lambda: layer.replace_leaves("default", {leaf: p * 2}),
        lambda: layer.set_scale("default", 3.0),
    ]
    for write in writes:
        model(x)
        write()
        same()


def _made(run: Callable[[], Any]) -> int:
    """How many Python functions a call makes, which is what its time follows."""
    count = 0

    def seen(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    gc.disable()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def test_many_adapters_cost_no_more_than_few(tmp_path: Path) -> None:
    """Attaching, loading and switching do not go through the tensors of the adapters that are there."""
    config = veneer.LoraConfig(r=2, target_modules=r"proj\.\d+")
    model: Any = veneer.get_peft_model(Net(6, 4, 4), config)
    model.save_pretrained(tmp_path)
    model.add_adapter("a0", config)
    model.load_adapter(tmp_path, "l0")
    attach, load = _made(lambda: model.add_adapter("a1", config)), _made(lambda: model.load_adapter(tmp_path, "l1"))
    switch = _made(lambda: model.set_adapter("a1"))
    for i in range(2, 40):
        model.add_adapter(f"a{i}", config)
    assert _made(lambda: model.add_adapter("last", config)) < 1.5 * attach
    assert _made(lambda: model.load_adapter(tmp_path, "l2")) < 1.5 * load
    assert _made(lambda: model.set_adapter("a3")) < 1.5 * switch + 200  # a few lines an adapter, none a layer


def test_attaching_costs_the_same_for_each_linear() -> None:
    config = veneer.LoraConfig(r=2, target_modules=r"proj\.\d+")
    some, many = (_made(lambda n=n: veneer.inject_adapter_in_model(config, Net(n, 4, 4))) for n in (20, 200))
    assert many < 11 * some
    assert many < 200 * 250


def test_switching_touches_what_changes_and_choosing_for_a_block_nothing() -> None:
    config = veneer.LoraConfig(r=2, target_modules=r"proj\.\d+")

    def counted(layers: int, adapters: int) -> tuple[int, int]:
        model: Any = veneer.get_peft_model(Net(layers, 4, 4), config)
        for i in range(1, adapters):
            model.add_adapter(f"a{i}", config)
        model.set_adapter("a1")

        def use() -> None:
            with model.using("a2"):
                pass

        return _made(lambda: model.set_adapter("a2")), _made(use)

    (few, use_few), (many, use_many), (deep, use_deep) = counted(10, 3), counted(10, 20), counted(80, 3)
    assert many < few + 100
    assert deep < few + 70 * 12
    assert use_few == use_many == use_deep < 100


def test_one_more_adapter_on_many_makes_the_calls_that_the_second_made() -> None:
    """On a model without a 3-D parameter: none of its modules are asked for more than once, and no adapter's."""
    model: Any = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    config = veneer.LoraConfig(r=2, target_modules=list("012345"))
    model = veneer.get_peft_model(model, config)
    model.add_adapter("warm", config)
    second = _made(lambda: model.add_adapter("second", config))
    for i in range(30):
        model.add_adapter(f"a{i}", config)
    assert _made(lambda: model.add_adapter("last", config)) < second + 200


def test_after_a_switch_just_the_active_adapter_trains() -> None:
    """Whichever way another one was let train before."""
    config = veneer.LoraConfig(r=2, target_modules=r"proj\.\d+")
    model: Any = veneer.get_peft_model(Net(3, 4, 4), config)
    for name in ("a", "b", "c"):
        model.add_adapter(name, config)

    def training() -> set[str]:
        return {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}

    model.set_requires_grad(["a", "b"], True)
    assert training() == {"default", "a", "b"}
    model.base_model.model.proj[1].set_adapter(["b", "c"])
    assert training() == {"default", "a", "b", "c"}
    model.set_adapter("c")
    assert training() == {"c"}
    model.set_adapter("a", inference_mode=True)
    assert training() == set()
    model.set_adapter(["a", "b"])
    copied = copy.deepcopy(model)
    model.delete_adapter("a")
    assert training() == {"b"}
    model = copied
    assert training() == {"a", "b"}
    model.set_adapter("default")
    assert training() == {"default"}


@pytest.mark.parametrize("kind", [Keyed, Holder, nn.Identity])
def test_a_module_made_fast_is_a_module(kind: type[nn.Module]) -> None:
    one, two, new = made(kind), made(kind), kind()
    assert type(one) is kind and list(vars(one)) == list(vars(new))
    for name, value in vars(new).items():
        assert type(vars(one)[name]) is type(value) and vars(one)[name] == value
        assert not isinstance(value, (dict, set)) or vars(one)[name] is not vars(two)[name]


def test_what_was_attached_is_not_looked_through_for_garbage() -> None:
    """Nor is anything frozen: what dies later is found."""
    gc.collect()
    before = gc.get_freeze_count()
    veneer.inject_adapter_in_model(veneer.LoraConfig(r=2, target_modules=r"proj\.\d+"), Net(50, 4, 4))
    assert gc.isenabled() and gc.get_count()[0] < 2000 and gc.get_freeze_count() == before


if __name__ == "__main__":
    table = {form: {dtype: measured(form, dtype) for dtype in DTYPES} for form in FORMS}
    BUDGETS.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
