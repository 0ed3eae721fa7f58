"""Compiled code and the choice of adapters: one program for all adapters of a shape, right at every switch."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import veneer
from veneer.engine.layer import adapted_layers

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
NAMES = [f"n{k}" for k in range(8)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


def stirred(model: nn.Module, seed: int = 0) -> Any:
    """The model with other numbers in everything that belongs to an adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if any(part in NAMES for part in name.split(".")) and t.is_floating_point():
                t.add_(0.3 * torch.randn(t.shape, generator=generator).to(t.dtype))
    return model.eval()


def several(make: Any = None, count: int = 8) -> Any:
    torch.manual_seed(0)
    make = make or (lambda k: veneer.LoraConfig(target_modules=["up", "down"], r=4, lora_alpha=2 + k))
    model = veneer.get_peft_model(Net(), make(0), adapter_name="n0")
    for k, name in enumerate(NAMES[1:count], 1):
        model.add_adapter(name, make(k))
    return stirred(model)


@pytest.fixture
def counter() -> Iterator[Any]:
    torch._dynamo.reset()
    counters.clear()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_hundred_switches_are_one_graph(counter: Any) -> None:
    """Adapters of one shape whose scalings differ, chosen by `set_adapter`, by `using` and by both at once."""
    model = several()
    run = torch.compile(model, backend=counter, fullgraph=True)
    model.set_adapter("n0", inference_mode=True)
    outs: dict[str, Tensor] = {}
    for i in range(100):
        name = NAMES[(3 * i) % 8]
        if i % 3:
            model.set_adapter(name, inference_mode=True)
            same(run(X), model(X))
            outs[name] = model(X)
        else:
            with model.using(name):
                same(run(X), model(X))
    assert counter.frame_count == 1 and counters["stats"]["unique_graphs"] == 1
    values = list(outs.values())
    assert len(values) == 8 and all(not torch.allclose(a, b) for i, a in enumerate(values) for b in values[:i])


METHODS = {
    "dora": lambda k: veneer.LoraConfig(target_modules=["up", "down"], r=2, lora_alpha=2 + k, use_dora=True),
    "ia3": lambda k: veneer.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]),
    "vera": lambda k: veneer.VeraConfig(target_modules=["up", "down"], r=4),
    "oft": lambda k: veneer.OFTConfig(target_modules=["up", "down"], oft_block_size=4),
    "loha": lambda k: veneer.LoHaConfig(target_modules=["up", "down"], r=2, alpha=1 + k),
}


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_so_it_is_with_other_methods(method: str, counter: Any) -> None:
    model = several(METHODS[method], 4)
    run = torch.compile(model, backend=counter, fullgraph=True)
    for i in range(8):
        model.set_adapter(NAMES[i % 4], inference_mode=True)
        same(run(X), model(X))
    assert counter.frame_count == 1


def test_training_too(counter: Any) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = several(count=4).train()
    run = torch.compile(model, backend=counter, fullgraph=True)

    def grads(forward: Any) -> dict[str, Tensor]:
        model.zero_grad()
        forward(X).square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    for i in range(12):
        name = NAMES[i % 4]
        model.set_adapter(name)
        got, want = grads(run), grads(model)
        assert got.keys() == want.keys() and all(name in n for n in got) and len(got) == 8
        for n, g in got.items():
            same(g, want[n])
        with torch.no_grad():  # what an optimizer does
            for n, p in model.named_parameters():
                if n in got:
                    p -= 0.01 * got[n]
    assert counter.frame_count == 1


@torch.no_grad()
def test_another_shape_is_another_graph_and_then_no_more(counter: Any) -> None:
    model = several(lambda k: veneer.LoraConfig(target_modules=["up", "down"] if k % 3 else ["up"], r=2 + k % 2, lora_alpha=2 + k), 6)
    run = torch.compile(model, backend=counter, fullgraph=True)
    for i in range(18):
        model.set_adapter(NAMES[i % 6], inference_mode=True)
        same(run(X), model(X))
    assert counter.frame_count == 4  # n0; n1 and n5; n2 and n4; n3
    for pair in (["n1", "n2"], ["n5", "n4"]):  # two at once are a shape as well
        model.set_adapter(pair, inference_mode=True)
        same(run(X), model(X))
    assert counter.frame_count == 5
    with model.disable_adapter():
        same(run(X), model.get_base_model()(X))
    same(run(X), model(X))
    assert counter.frame_count == 6


@torch.no_grad()
def test_what_is_written_afterwards_is_seen_without_compiling_again(counter: Any) -> None:
    model = several(count=3)
    model.set_adapter("n1", inference_mode=True)
    run = torch.compile(model, backend=counter, fullgraph=True)
    layers = [layer for _, layer in adapted_layers(model)]

    def agree() -> Tensor:
        y = model(X)
        same(run(X), y)
        return y

    before = [agree()]
    for change in (
        lambda: layers[0].scaling.__setitem__("n1", 3.0),
        lambda: layers[1].set_scale("n1", 0.5),
        lambda: layers[2].scale_layer(2.0),
        lambda: layers[0].lora_A["n1"].weight.mul_(2),
        lambda: setattr(layers[1].lora_B["n1"], "weight", nn.Parameter(torch.ones(8, 4), requires_grad=False)),
        lambda: layers[2].replace_leaves("n1", {"lora_A": torch.ones(4, 8)}),
        lambda: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}),
    ):
        change()
        before.append(agree())
    assert counter.frame_count == 1
    assert all(not torch.allclose(a, b) for a, b in itertools.pairwise(before))
    model.double()
    same(run(X.double()), model(X.double()))
    model.float()
    agree()
    model.add_adapter(
        "n7", veneer.LoraConfig(target_modules=["up", "down"], r=4, lora_alpha=9)
    )  # peft_config is longer: compiled once more
    count = counter.frame_count
    for name in ("n7", "n0", "n7"):
        stirred(model, 3).set_adapter(name, inference_mode=True)
        agree()
    assert counter.frame_count <= count + 1
    model.set_adapter("n2", inference_mode=True)
    model.delete_adapter("n7")
    agree()
    layers[0].set_adapter("n0", inference_mode=True)  # one layer's own choice
    agree()


@pytest.mark.parametrize("method", ["lora", "ia3", "vera"])
@torch.no_grad()
def test_nothing_is_kept_of_an_adapter_that_is_taken_off(method: str, counter: Any) -> None:
    model = several(METHODS.get(method), 3)
    model.set_adapter("n1", inference_mode=True)
    run = torch.compile(model, backend=counter, fullgraph=True)
    run(X)
    held = [weakref.ref(p) for n, p in model.named_parameters() if "n1" in n.split(".")]
    model.set_adapter("n0", inference_mode=True)
    model.delete_adapter("n1")
    same(run(X), model(X))
    torch._dynamo.reset()  # compiled code may keep what it was compiled with
    gc.collect()
    assert held and all(ref() is None for ref in held)


@torch.no_grad()
def test_dropout_that_is_put_in_is_seen(counter: Any) -> None:
    model = several(count=2)
    model.set_adapter("n1", inference_mode=True)
    run = torch.compile(model, backend=counter, fullgraph=True)
    same(run(X), model(X))
    for _, layer in adapted_layers(model):
        layer.lora_dropout["n1"] = nn.Dropout(0.9999999)
        layer.lora_dropout["n1"].train()
    same(run(X), Net.forward(_base(model), X))


def _base(model: Any) -> Any:
    return copy.deepcopy(model).unload()


@torch.no_grad()
def test_threads_do_not_see_each_other(counter: Any) -> None:
    model = several()
    model.set_adapter("n0", inference_mode=True)
    run = torch.compile(model, backend=counter, fullgraph=True)
    want = {}
    for name in NAMES:
        with model.using(name):
            want[name] = model(X)
    same(run(X), want["n0"])
    wrong: list[str] = []
    start = threading.Barrier(4)

    def work(name: str) -> None:
        start.wait()
        for i in range(10):
            other = NAMES[(NAMES.index(name) + i) % 8]
            with model.using(other), torch.no_grad():
                if not torch.allclose(run(X), want[other], atol=1e-5):
                    wrong.append(other)

    threads = [threading.Thread(target=work, args=(name,)) for name in NAMES[1:5]]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert counter.frame_count <= 3  # of a thread that has chosen, of one that has not
    same(run(X), want["n0"])  # this thread's own choice stands


@torch.no_grad()
def test_copies_and_files_of_a_compiled_model_choose_for_themselves(counter: Any) -> None:
    model = several(count=3)
    run = torch.compile(model, backend=counter, fullgraph=True)
    model.set_adapter("n1", inference_mode=True)
    same(run(X), model(X))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    y = model(X)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        again = torch.compile(other, backend=counter, fullgraph=True)
        same(again(X), y)
        other.set_adapter("n2", inference_mode=True)
        next(layer for _, layer in adapted_layers(other)).scaling["n2"] = 7.0
        same(again(X), other(X))
        assert not torch.allclose(again(X), y)
        same(run(X), y)
    layer = copy.deepcopy(next(layer for _, layer in adapted_layers(model)))  # of a layer alone no more is copied
    assert len(layer.switch.alive()) == 1


@torch.no_grad()
def test_blocks_of_one_kind_are_one_graph(counter: Any) -> None:
    model = several(count=3)
    for block in model.get_base_model().blocks:
        block.compile(backend=counter, fullgraph=True)
    plain = several(count=3)
    for name in ("n0", "n1", "n2", "n0"):
        for m in (model, plain):
            m.set_adapter(name, inference_mode=True)
        same(model(X), plain(X))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor() -> None:
    torch._dynamo.reset()
    model = several(count=3)
    run = torch.compile(model, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("n0", "n1", "n2"):
            model.set_adapter(name)
            model.zero_grad()
            y = run(X)
            same(y, model(X))
            y.sum().backward()
            got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            model.zero_grad()
            model(X).sum().backward()
            for a, b in zip(got, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
                same(a, b)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_thread_that_has_left_its_block_follows_the_default(counter: Any) -> None:
    model = several(count=2)
    model.set_adapter("n0", inference_mode=True)
    run, before, changed = torch.compile(model, backend=counter), threading.Event(), threading.Event()
    got: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            with model.using("n1"):
                run(X)
            got.append(run(X))
            before.set()
            changed.wait(30)
            got.extend([run(X), model(X)])

    thread = threading.Thread(target=work)
    thread.start()
    before.wait(30)
    want = [model(X)]
    model.set_adapter("n1", inference_mode=True)
    changed.set()
    thread.join()
    for y, z in zip(got, [*want, model(X), model(X)], strict=True):
        same(y, z)


@torch.no_grad()
def test_layers_compiled_in_place_are_copied_as_they_are(counter: Any) -> None:
    """What `Module.compile` leaves in a module runs that very module."""
    model = several(count=1).eval()
    for _, layer in adapted_layers(model):
        layer.compile(backend=counter)
    y, other = model(X), copy.deepcopy(model)
    for p in other.parameters():
        p.zero_()
    same(other(X), X)
    same(model(X), y)
    torch.save(model, io.BytesIO())


@pytest.mark.parametrize("kind", ["parameter", "module"])
def test_modules_compiled_in_place_run_with_the_changed_weights(kind: str, counter: Any) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    inner = Experts() if kind == "parameter" else nn.LayerNorm(4)
    inner.compile(backend=counter)
    lora = veneer.LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    config = lora if kind == "parameter" else veneer.LNTuningConfig(target_modules=["0"])
    model = stirred(veneer.get_peft_model(nn.Sequential(inner), config, "n0"))
    x = torch.randn(2, 4)
    y = model(x)
    with model.disable_adapter():
        assert not torch.allclose(model(x), y)
    same(model.merge_and_unload()(x), y)
