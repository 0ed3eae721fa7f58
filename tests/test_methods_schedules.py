"""Methods that act when an optimizer steps: AdaLoRA's ranks, by themselves and driven by the training loop."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import veneer as V
from veneer.distributed import load_state, save_state
from veneer.engine.route import find_switch
from veneer.engine.steps import carried, carry_on
from veneer.errors import ConfigError, LoadError, SaveError


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.two(torch.relu(self.one(x)))


def inputs() -> torch.Tensor:
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(1))


def adalora(**fields: Any) -> V.AdaLoraConfig:
    given = {"target_modules": ["one", "two"], "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 8, "lora_alpha": 8}
    return V.AdaLoraConfig(**{**given, **fields})


def train(model: Any, steps: int, after: Any = None, lr: float = 0.05) -> list[int]:
    """Train; returns how many entries of E live after each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    live = []
    for i in range(1, steps + 1):
        optimizer.zero_grad()
        model(inputs()).square().sum().backward()
        optimizer.step()
        if after is not None:
            after(i)
        live.append(sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n))
    return live


def adapted(config: Any) -> Any:
    torch.manual_seed(2)
    return V.get_peft_model(Mlp(), config)


def test_ranks_follow_the_cubic_budget_by_themselves() -> None:
    model = adapted(adalora())
    # 12 ranks, 4 wanted: 4 + int(8 (1 - (step - 1) / 5)³) until step 6, then what lives is fixed
    assert train(model, 8) == [12, 8, 5, 4, 4, 4, 4, 4]
    assert sum(sum(v) for v in model.peft_config["default"].rank_pattern.values()) == 4


def test_what_is_cut_last_is_decided_by_the_steps_before() -> None:
    """As in PEFT and in the paper's own code: the step that fixes the ranks measures no more."""
    kept = []
    for end in range(4):
        model = adapted(adalora(deltaT=100))
        train(model, 5)
        torch.manual_seed(end)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        (model(torch.randn(4, 12)) * torch.randn(4, 8) * 1000).sum().backward()  # whatever this one asks for
        optimizer.step()
        live = [p != 0 for n, p in model.named_parameters() if "lora_E" in n]
        assert sum(int(e.sum()) for e in live) == 4
        kept.append(torch.cat(live))
    assert all(torch.equal(k, kept[0]) for k in kept)


def test_the_loops_own_calls_take_the_schedule_over() -> None:
    by_itself, driven, late = (adapted(adalora()) for _ in range(3))
    train(by_itself, 8)
    train(driven, 8, driven.base_model.update_and_allocate)
    train(late, 8, lambda i: late.base_model.update_and_allocate(i) if i > 3 else None)
    for n, p in by_itself.named_parameters():
        assert torch.equal(p, driven.get_parameter(n))  # as if it had acted once a step, not twice
        assert torch.equal(p, late.get_parameter(n))
    held = adapted(adalora())
    assert train(held, 8, lambda i: held.base_model.update_and_allocate(1)) == [12] * 8  # the loop says it is still the first step


def test_orthogonality_is_in_the_gradients_and_not_in_the_loss() -> None:
    config = adalora(orth_reg_weight=0.7, tinit=5)
    model, plain = adapted(config), adapted(adalora(orth_reg_weight=0.0, tinit=5))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = [p if "lora_A" in n else p.T for n, p in parameters.items() if "lora_E" not in n]
    term = 0.7 * torch.stack([(q @ q.T - torch.eye(6)).norm() for q in matrices]).mean()
    wanted = torch.autograd.grad(term, list(parameters.values()), allow_unused=True)
    for m in (model, plain):
        m(inputs()).square().sum().backward()
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.0).step()
    for (n, p), g in zip(parameters.items(), wanted, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad - plain.get_parameter(n).grad, torch.zeros_like(p) if g is None else g, atol=1e-5, rtol=1e-5)


def test_only_live_ranks_are_written_and_come_back(tmp_path: Path) -> None:
    model = adapted(adalora())
    train(model, 8)
    y = model(inputs())
    model.save_pretrained(tmp_path)
    small = V.PeftModel.from_pretrained(Mlp(), tmp_path)
    assert sum(p.numel() for n, p in small.named_parameters() if "lora_E" in n) == 4
    torch.testing.assert_close(small(inputs()), y, atol=1e-6, rtol=0)
    whole = adapted(adalora())  # training goes on from the file in a model with all its ranks
    V.set_peft_model_state_dict(whole, V.get_peft_model_state_dict(model))
    torch.testing.assert_close(whole(inputs()), y, atol=1e-6, rtol=0)
    further = V.PeftModel.from_pretrained(Mlp(), tmp_path, is_trainable=True)
    assert train(further, 8)[-1] == 4  # at the target there is nothing to cut


def test_a_layer_may_lose_all_its_ranks(tmp_path: Path) -> None:
    model = adapted(adalora(target_r=0))
    assert train(model, 8)[-1] == 0
    model.save_pretrained(tmp_path)
    again = V.PeftModel.from_pretrained(Mlp(), tmp_path)
    assert torch.equal(again(inputs()), Mlp()(inputs()))
    assert torch.allclose(again.merge_and_unload()(inputs()), Mlp()(inputs()))


def test_a_schedule_that_never_advanced_is_not_saved(tmp_path: Path) -> None:
    model = adapted(adalora())
    model.save_pretrained(tmp_path)  # nothing was trained
    for _ in range(2):
        model.zero_grad()
        model(inputs()).square().sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad  # an optimizer that torch does not know of
    with pytest.raises(SaveError, match="update_and_allocate"):
        model.save_pretrained(tmp_path)
    model.base_model.update_and_allocate(2)
    model.save_pretrained(tmp_path)


def test_an_optimizer_that_goes_on_tells_its_step() -> None:
    first = adapted(adalora())
    optimizer = torch.optim.AdamW([p for p in first.parameters() if p.requires_grad])
    model = copy.deepcopy(first)
    for _ in range(3):
        first(inputs()).square().sum().backward()
        optimizer.step()
    resumed = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    resumed.load_state_dict(optimizer.state_dict())
    model(inputs()).square().sum().backward()
    resumed.step()
    assert sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n) == 4  # step 4 of the schedule, not 1


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def steps(model: Any, optimizer: torch.optim.Optimizer, which: range) -> list[float]:
    """The losses of steps with a batch each of their own."""
    losses = []
    for step in which:
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - x[:, :8]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


RESUMED: dict[str, Any] = {
    "pissa": lambda: V.LoraConfig(r=3, target_modules=["one", "two"], init_lora_weights="pissa"),
    "adalora": lambda: adalora(total_step=14, tfinal=4, tinit=2),
    "adamss": lambda: V.AdamssConfig(
        target_modules=["one", "two"],
        r=6,
        num_subspaces=4,
        use_asa=True,
        asa_target_subspaces=3,
        init_warmup=2,
        final_warmup=11,
        mask_interval=3,
    ),
}


@pytest.mark.parametrize("method", RESUMED)
def test_a_state_goes_on_bit_for_bit_wherever_the_schedule_was(method: str, tmp_path: Path) -> None:
    whole = adapted(RESUMED[method]())
    want = steps(whole, optimizer_of(whole), range(14))
    held = adapted(RESUMED[method]())
    opt = optimizer_of(held)
    for at in range(14):
        save_state(held, opt, tmp_path)
        again = adapted(RESUMED[method]())
        theirs = optimizer_of(again)
        load_state(again, theirs, tmp_path)
        assert steps(again, theirs, range(at, 14)) == want[at:], at
        tensors = {**dict(again.named_parameters()), **dict(again.named_buffers())}
        assert all(torch.equal(t, tensors[n]) for n, t in (*whole.named_parameters(), *whole.named_buffers()))
        assert again.peft_config["default"] == whole.peft_config["default"]  # AdaLoRA's ranks
        steps(held, opt, range(at, at + 1))


def test_the_loops_own_schedule_goes_on_from_a_state(tmp_path: Path) -> None:
    held = adapted(adalora())
    opt = optimizer_of(held)
    steps(held, opt, range(1))
    held.base_model.update_and_allocate(1)
    save_state(held, opt, tmp_path)
    again = adapted(adalora())
    theirs = optimizer_of(again)
    load_state(again, theirs, tmp_path)
    steps(again, theirs, range(1, 7))  # until the loop calls, nothing is taken away
    assert all(bool((p != 0).all()) for n, p in again.named_parameters() if "lora_E" in n)


def test_a_state_takes_the_schedule_back_and_one_of_before_begins_the_averages_anew(tmp_path: Path) -> None:
    model = adapted(RESUMED["adalora"]())
    opt = optimizer_of(model)
    want = steps(model, opt, range(2))
    save_state(model, opt, tmp_path / "second")
    want += steps(model, opt, range(2, 14))
    load_state(model, opt, tmp_path / "second")  # in the very model that has gone on
    model.save_pretrained(tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(6 in t.shape for t in held.values())  # no rank of the end is gone here
    assert steps(model, opt, range(2, 14)) == want[2:]
    other = adapted(RESUMED["adalora"]())
    theirs = optimizer_of(other)
    with pytest.MonkeyPatch.context() as patch:  # a state of a veneer that did not keep them
        patch.setattr("veneer.states.carried", lambda switch: {})
        load_state(model, opt, tmp_path / "second")
        save_state(model, opt, tmp_path / "old")
    load_state(other, theirs, tmp_path / "old")
    got = steps(other, theirs, range(2, 14))
    assert got[0] == want[2] and got != want[2:]
    assert sum(sum(v) for v in other.peft_config["default"].rank_pattern.values()) == 4  # the schedule still knows its step


def test_a_state_of_other_layers_averages_is_refused() -> None:
    model, other = adapted(adalora()), adapted(adalora(init_r=5))
    steps(model, optimizer_of(model), range(3))
    with pytest.raises(LoadError, match=r"one.lora_A.mean.*\(5, 12\).*\(6, 12\)"):
        carry_on(find_switch(other), carried(find_switch(model)))
    held = carried(find_switch(model))
    del held["default/two.lora_E.spread"]
    with pytest.raises(LoadError, match=r"two\.lora_E\.spread.* is missing"):
        carry_on(find_switch(model), held)


@pytest.mark.parametrize("engine", ["FSDP1", "ZeRO-2", "ZeRO-3"])
def test_flat_pieces_are_refused_by_the_optimizer_that_has_them_alone(engine: str) -> None:
    """A model that an engine took apart before is no concern of the next model's optimizer in the same process."""
    model = adapted(adalora())
    trained = [p for p in model.parameters() if p.requires_grad]
    mine, other = (torch.optim.SGD([nn.Parameter(torch.zeros(400))]) for _ in range(2))
    flat = mine.param_groups[0]["params"][0]
    at = 0
    for p in trained:  # as each engine leaves them
        if engine == "FSDP1":
            p.data = p.data.flatten()
        elif engine == "ZeRO-2":
            p._hp_mapping = SimpleNamespace(hp_fragment=flat.narrow(0, at, p.numel())) if at + p.numel() <= 400 else None
        else:
            p.ds_id, p._z3_optimizer = at, SimpleNamespace(optimizer=mine)
        at += p.numel()
    if engine == "FSDP1":
        mine = torch.optim.SGD(trained)
    other.step()
    with pytest.raises(ConfigError, match="flat pieces"):
        mine.step()


def test_what_is_dead_in_a_file_stays_so_when_training_goes_on_from_it_alone(tmp_path: Path) -> None:
    """As transformers' Trainer does: adapter and optimizer, and no state of the method."""
    model = adapted(adalora(tfinal=4))
    opt = optimizer_of(model)
    steps(model, opt, range(5))
    live = {n: p != 0 for n, p in model.named_parameters() if "lora_E" in n}
    assert sum(int(v.sum()) for v in live.values()) == 4
    again = adapted(adalora(tfinal=4))
    model.save_pretrained(tmp_path)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    theirs = optimizer_of(again)
    theirs.load_state_dict(opt.state_dict())
    steps(again, theirs, range(5, 8))
    assert all(torch.equal(again.get_parameter(n) != 0, v) for n, v in live.items())


def test_schedules_without_room_are_refused() -> None:
    for wrong in ({"total_step": None}, {"tinit": 6}, {"use_dora": True}):
        with pytest.raises(ConfigError):
            adalora(**wrong)


class Counter(TorchDispatchMode):
    """Counts what aten runs, views aside."""

    VIEWS = ("transpose", "view", "detach", "_local_scalar_dense", "split_with_sizes", "unbind", "expand", "unsqueeze")

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func._opname not in self.VIEWS
        return func(*args, **(kwargs or {}))


def test_a_step_costs_what_loras_costs() -> None:
    """At most 5 % more operations than LoRA's step of the same rank, and calls that do not grow with the number of layers."""
    from torch.utils.flop_counter import FlopCounterMode

    def cost(config: Any, layers: int) -> tuple[int, int]:
        model = V.get_peft_model(nn.Sequential(*[nn.Linear(256, 256) for _ in range(layers)]), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
        for _ in range(2):  # the first step makes what is remembered
            with FlopCounterMode(display=False) as flops:
                model(torch.randn(128, 256)).square().sum().backward()
                with Counter() as counter:
                    optimizer.step()
        return flops.get_total_flops(), counter.calls

    ada = V.AdaLoraConfig(target_modules=r"\d+", init_r=8, target_r=4, total_step=10)
    lora = V.LoraConfig(target_modules=r"\d+", r=8)
    assert cost(ada, 4)[0] <= 1.05 * cost(lora, 4)[0]
    extra = [cost(ada, n)[1] - cost(lora, n)[1] for n in (2, 8)]
    assert extra[0] == extra[1] < 40
