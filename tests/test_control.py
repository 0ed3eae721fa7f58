"""Learning rates, clipping and freezing by layer, accumulation, statistics: in loops, in Trainer and in recipes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.control import (
    Accumulation,
    Depths,
    FreezingSchedule,
    LayerClipping,
    LayerStatistics,
    Phase,
    Rates,
    attached,
    effective_rank,
    parameter_groups,
    picture_of_schedule,
    picture_of_statistics,
    singular_values,
    trained,
    trainer_callback,
    unfreezing,
)
from veneer.errors import ConfigError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())  # type: ignore[no-any-return]


class Net(nn.Module):
    """A table, four layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return logits if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def _model(**fields: Any) -> Any:
    torch.manual_seed(0)
    fields = {"r": 2, "target_modules": ["embed", "up", "down"], "modules_to_save": ["head"], **fields}
    model = veneer.get_peft_model(Net(), veneer.LoraConfig(**fields))
    for n, p in model.named_parameters():
        if "lora_B" in n or "embedding_A" in n:
            nn.init.normal_(p, std=0.2)
    return model


def _batch(seed: int, rows: int = 8) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"ids": torch.randint(0, 13, (rows,), generator=g), "labels": torch.randint(0, 3, (rows,), generator=g)}


def _backward(model: Any, seed: int = 1) -> None:
    model(**_batch(seed))["loss"].backward()


# ---------------------------------------------------------------- depth


def test_layers_are_counted_from_the_input() -> None:
    names = ["embed", "encoder", "encoder.layer", "encoder.layer.0", "encoder.layer.0.q", "encoder.layer.1.q", "decoder.block.0.0.x",
             "decoder.block.0.1.x", "decoder.block.1.0.x", "pooler", "head.0"]  # fmt: skip
    depths = Depths.of(names)
    assert depths.count == 4  # of nested stacks the outermost; a single number is no stack
    assert [depths.level(n) for n in ("embed", "encoder.layer.1.q", "decoder.block.0.1.x", "decoder.block.1.0.x", "pooler", "head.0")] == [
        0, 2, 3, 4, 5, 5,
    ]  # fmt: skip


def test_every_trained_tensor_is_found_once_with_its_name() -> None:
    model = _model()
    all_, depths = trained(model)
    assert depths.count == 4
    assert len(all_) == len({id(t.parameter) for t in all_}) == sum(p.requires_grad for p in model.parameters())
    levels = {t.name: t.level for t in all_}
    assert levels["embed.lora_embedding_A"] == 0 and levels["layers.3.down.lora_B"] == 4 and levels["head.weight"] == 5


# ---------------------------------------------------------------- rates


def test_rates_fall_with_the_depth() -> None:
    model = _model()
    groups = parameter_groups(model, 0.1, Rates(decay=0.5))
    rate = {n: g["lr"] for g in groups for n in g["names"]}
    assert rate["head.weight"] == rate["layers.3.up.lora_A"] == pytest.approx(0.1)
    assert rate["layers.2.up.lora_A"] == pytest.approx(0.05)
    assert rate["layers.0.up.lora_A"] == pytest.approx(0.0125)
    assert rate["embed.lora_embedding_A"] == pytest.approx(0.00625)
    assert sorted(len(g["params"]) for g in groups) == sorted(len(g["names"]) for g in groups)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


def test_bands_patterns_and_weight_decay_multiply_and_overrule() -> None:
    rates = Rates(bands=[0.1, 1.0], patterns={"lora_B": 4, r"layers\.[01]\.up": 3}, weight_decay={"head": 0.5})
    groups = parameter_groups(_model(), 1.0, rates, weight_decay=0.1)
    found = {n: (round(g["lr"], 6), g["weight_decay"]) for g in groups for n in g["names"]}
    assert found["layers.1.up.lora_B"] == (0.4, 0.1)  # the first key that fits
    assert found["layers.1.up.lora_A"] == (0.3, 0.1)
    assert found["layers.1.down.lora_A"] == (0.1, 0.1)
    assert found["layers.2.up.lora_A"] == (1.0, 0.1)
    assert found["head.weight"] == (1.0, 0.5)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.NAdam])
def test_any_optimizer_takes_the_groups(optimizer: Any) -> None:
    model = _model()
    made = optimizer(parameter_groups(model, 0.1, Rates(patterns={"head": 0.0})))
    before = {t.name: t.parameter.detach().clone() for t in trained(model)[0]}
    _backward(model)
    made.step()
    moved = {t.name: not torch.equal(t.parameter, before[t.name]) for t in trained(model)[0]}
    assert not moved["head.weight"] and moved["layers.0.up.lora_A"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5)
    assert {g["lr"] for g in made.param_groups} == {0.05, 0.0} and scheduler is not None


def test_the_step_of_sgd_is_in_proportion_to_the_rates() -> None:
    model = _model()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1, Rates(decay=0.5)))
    _backward(model)
    before = [(t, t.parameter.detach().clone(), t.parameter.grad.clone()) for t in trained(model)[0] if t.parameter.grad is not None]
    optimizer.step()
    for t, old, grad in before:
        torch.testing.assert_close(old - t.parameter.detach(), 0.1 * 0.5 ** (4 - min(t.level, 4)) * grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Rates(decay=-1), "decay has to be"),
        (lambda m: Rates(patterns={"x": "fast"}), "patterns"),
        (lambda m: parameter_groups(m, 1, Rates(patterns={"lora_C": 2})), r"lora_C.*Did you mean 'lora_[AB]'"),
        (lambda m: parameter_groups(m, 1, Rates(bands=[1] * 9)), "9 bands for 4 layers"),
        (lambda m: LayerClipping(m, 0.0), "positive norm"),
        (lambda m: LayerClipping(m, 1.0, by="block"), "by is one of"),
        (lambda m: LayerClipping(m, 1.0, patterns={"upp": 1.0}), "Did you mean 'up'"),
        (lambda m: FreezingSchedule(m, []), "needs phases"),
        (lambda m: FreezingSchedule(m, [Phase(0), Phase(0, "none")]), "different steps"),
        (lambda m: FreezingSchedule(m, [Phase(0, [4])]), r"layers \[4\].*0 to 3"),
        (lambda m: FreezingSchedule(m, [Phase(0, "7:")]), "none of the 4 layers"),
        (lambda m: FreezingSchedule(m, [Phase(0, "al")]), "Did you mean 'all'"),
        (lambda m: FreezingSchedule(m, [Phase(0, "none", freeze=["head"])]), "Nothing would train from step 0"),
        (lambda m: FreezingSchedule(m, [Phase(0, only=["dwon"])]), "Did you mean 'down'"),
        (lambda m: Accumulation(torch.optim.SGD(m.parameters(), lr=1), 0), "1 batch"),
        (lambda m: LayerStatistics(m, 0), "every"),
    ],
)
def test_what_is_wrong_is_said(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(_model())


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize("by", ["module", "layer", "tensor"])
def test_each_layer_is_clipped_by_itself(by: Any) -> None:
    model = _model()
    all_ = trained(model)[0]
    _backward(model)
    norms: dict[str, float] = {}
    for t in all_:
        key = {"module": t.module, "layer": str(t.level), "tensor": t.name}[by]
        norms[key] = math.hypot(norms.get(key, 0.0), float(t.parameter.grad.norm()))  # type: ignore[union-attr]
    before = {t.name: t.parameter.grad.clone() for t in all_}  # type: ignore[union-attr]
    limit = sorted(norms.values())[len(norms) // 2]
    clip = LayerClipping(model, limit, by=by)
    optimizer = torch.optim.SGD([t.parameter for t in all_], lr=0.0)
    with attached(optimizer, [clip]):
        optimizer.step()
    assert sorted(clip.norms.values()) == pytest.approx(sorted(norms.values()), rel=1e-5)
    for t in all_:
        key = {"module": t.module, "layer": str(t.level), "tensor": t.name}[by]
        torch.testing.assert_close(t.parameter.grad, before[t.name] * min(1.0, limit / norms[key]))
    again = {t.name: t.parameter.grad.clone() for t in all_}  # type: ignore[union-attr]
    for t in all_:
        t.parameter.grad = before[t.name].clone()
    optimizer.step()  # outside the block it acts no more
    assert all(torch.equal(t.parameter.grad, before[t.name]) for t in all_) and again.keys() == before.keys()  # type: ignore[arg-type]


def test_patterns_have_a_norm_of_their_own() -> None:
    model = _model()
    _backward(model)
    LayerClipping(model, 1e6, patterns={"lora_B": 1e-3}).clip()
    for t in trained(model)[0]:
        assert t.parameter.grad is not None
        if t.level in (1, 2, 3, 4):
            assert (float(t.parameter.grad.norm()) <= 1.001e-3) is (t.leaf == "lora_B")


# ---------------------------------------------------------------- freezing


def test_frozen_layers_have_no_gradient_and_keep_their_optimizer_state() -> None:
    model = _model()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, weight_decay=0.1))
    schedule = FreezingSchedule(model, [Phase(0), Phase(2, "2:", freeze=["down"]), Phase(4, "all")])
    seen = []
    with attached(optimizer, [schedule]):
        for step in range(6):
            optimizer.zero_grad()
            _backward(model, step)
            before = {t.name: (t.parameter.detach().clone(), _state(optimizer, t.parameter)) for t in schedule.trained}
            optimizer.step()
            moved = set()
            for t in schedule.trained:
                old, state = before[t.name]
                if torch.equal(t.parameter, old):
                    assert _state(optimizer, t.parameter) == state  # the moments did not decay
                else:
                    moved.add(t.name)
            seen.append(moved)
    everything = {t.name for t in schedule.trained}
    some = {t.name for t in schedule.trained if t.module == "head" or (t.level >= 3 and "down" not in t.module)}
    assert seen == [everything] * 2 + [some] * 2 + [everything] * 2
    assert some == {n for n, on in schedule.trains_at(3).items() if on}


def _state(optimizer: Any, p: Tensor) -> Any:
    return {k: v.tolist() for k, v in optimizer.state.get(p, {}).items()}


def test_a_frozen_layer_gets_no_gradient_in_the_backward_either() -> None:
    model = _model()
    optimizer = torch.optim.SGD(parameter_groups(model, 1.0))
    schedule = FreezingSchedule(model, [Phase(0, "-1:")])
    schedule.attach(optimizer)
    _backward(model)
    with_grad = {t.name for t in schedule.trained if t.parameter.grad is not None}
    assert with_grad == {n for n, on in schedule.trains_at(0).items() if on}
    schedule.detach()
    assert all(t.parameter.requires_grad for t in schedule.trained)


def test_unfreezing_goes_from_the_end_to_the_input() -> None:
    model = _model()
    schedule = FreezingSchedule(model, unfreezing(4, every=3, at_a_time=2))
    levels = [{t.level for t in schedule.trained if schedule.trains_at(s)[t.name]} for s in (0, 2, 3, 100)]
    assert levels == [{3, 4, 5}, {3, 4, 5}, {0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5}]


def test_an_optimizer_that_lacks_what_is_thawed_later_is_refused() -> None:
    model = _model()
    schedule = FreezingSchedule(model, unfreezing(4, every=1))
    optimizer = torch.optim.SGD([t.parameter for t in schedule.trained if t.level > 3], lr=1.0)
    with pytest.raises(ConfigError, match="the optimizer does not hold it"):
        schedule.attach(optimizer)


def test_a_run_that_goes_on_is_in_the_right_phase() -> None:
    model = _model()
    schedule = FreezingSchedule(model, unfreezing(4, every=2))
    schedule.attach(torch.optim.SGD([t.parameter for t in schedule.trained], lr=1.0), step=3)
    assert {t.level for t in schedule.trained if t.parameter.requires_grad} == {3, 4, 5}


# ---------------------------------------------------------------- accumulation


def test_accumulated_batches_of_any_size_are_one_batch() -> None:
    sizes, results = (8, 3, 5), []
    for accumulated in (False, True):
        model = _model()
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2))
        parts = [_batch(i, n) for i, n in enumerate(sizes)]
        if accumulated:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            loop = Accumulation(optimizer, 3, [scheduler])
            assert [loop.backward(model(**b)["loss"], len(b["ids"])) for b in parts] == [False, False, True]
            assert loop.steps == 1 and scheduler.last_epoch == 1 and not loop.finish()
        else:
            model(**{k: torch.cat([b[k] for b in parts]) for k in parts[0]})["loss"].backward()
            optimizer.step()
        results.append([t.parameter.detach().clone() for t in trained(model)[0]])
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-4)


def test_what_is_left_at_the_end_is_a_step_too() -> None:
    model = _model()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1))
    loop = Accumulation(optimizer, 4)
    loop.backward(model(**_batch(0))["loss"])
    before = [t.parameter.detach().clone() for t in trained(model)[0]]
    assert loop.finish() and loop.steps == 1
    assert any(not torch.equal(t.parameter, b) for t, b in zip(trained(model)[0], before, strict=True))
    loop.backward(model(**_batch(0))["loss"], 0)
    assert not loop.finish() and loop.steps == 1  # nothing counted


# ---------------------------------------------------------------- statistics


def test_statistics_are_what_they_say(tmp_path: Path) -> None:
    model = _model()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.5))
    stats = LayerStatistics(model, every=2, json_path=tmp_path / "s.jsonl")
    layer = model.base_model.model.layers[1].up
    with attached(optimizer, [stats]):
        for step in range(4):
            optimizer.zero_grad()
            _backward(model, step)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            gradient = math.hypot(float(a.grad.norm()), float(b.grad.norm()))
            optimizer.step()
            if step % 2 == 0:
                found = stats.records[-1]["layers"]["layers.1.up"]
                assert stats.records[-1]["step"] == step + 1
                assert found["gradient"] == pytest.approx(gradient, rel=1e-5)
                assert found["update"] == pytest.approx(0.5 * gradient, rel=1e-4)  # SGD's step is the rate times the gradient
                assert found["weight"] == pytest.approx(math.hypot(float(a.detach().norm()), float(b.detach().norm())), rel=1e-5)
                s = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double())
                p = s[:2] / s[:2].sum()
                assert found["delta"] == pytest.approx(float(s.norm()), rel=1e-5)
                assert found["effective_rank"] == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert lines == stats.records and [r["step"] for r in lines] == [1, 3]
    assert "delta" not in lines[0]["layers"]["head"]  # a head that trains whole has no ΔW


@pytest.mark.parametrize("config", [
    veneer.LoraConfig(r=2, use_dora=True, target_modules=["up"]), veneer.LoHaConfig(r=2, target_modules=["up"]),
    veneer.OFTConfig(r=1, oft_block_size=0, target_modules=["up"]),
])  # fmt: skip
def test_spectra_of_other_changes_are_those_of_the_difference(config: Any) -> None:
    torch.manual_seed(0)
    model = veneer.get_peft_model(Net(), config)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    layer = model.base_model.model.layers[0].up
    s = singular_values(layer, "default")
    assert s is not None
    torch.testing.assert_close(s, torch.linalg.svdvals(layer.get_delta_weight("default").detach().double()), atol=1e-6, rtol=1e-4)


def test_effective_ranks() -> None:
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = _model()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.5))
    stats = LayerStatistics(model, every=1, tensorboard=tmp_path)
    with attached(optimizer, [stats]):
        for step in range(2):
            optimizer.zero_grad()
            _backward(model, step)
            optimizer.step()
    stats.writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(e.step, e.value) for e in events.Scalars("effective_rank/layers.0.up")]
    assert found == [(s, pytest.approx(v)) for s, v in stats.series("effective_rank")["layers.0.up"]]


def test_pictures_show_the_schedule_and_the_statistics(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from veneer.control.pictures import rates_by_step, trains_by_layer

    model = _model()
    groups = parameter_groups(model, 0.1, Rates(decay=0.5))
    schedule = FreezingSchedule(model, unfreezing(4, every=2))
    grid = trains_by_layer(schedule, 8)
    assert len(grid) == 6 and grid[0] == [0.0] * 6 + [1.0] * 2 and grid[3] == [0.0] * 2 + [1.0] * 6  # table; third layer
    curves = rates_by_step(groups, 3, lambda s: 1 - s / 3)
    assert [max(c) for c in curves.values()] == pytest.approx([0.00625, 0.0125, 0.025, 0.05, 0.1])
    picture_of_schedule(tmp_path / "schedule.png", groups, 8, lambda s: 1 - s / 8, schedule)
    optimizer = torch.optim.SGD(groups)
    stats = LayerStatistics(model, every=1)
    with pytest.raises(ConfigError, match="Nothing has been measured"):
        picture_of_statistics(tmp_path / "statistics.png", stats)
    with attached(optimizer, [stats]):
        _backward(model)
        optimizer.step()
    picture_of_statistics(tmp_path / "statistics.png", stats)
    for name in ("schedule.png", "statistics.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- Trainer


def test_trainer_takes_groups_and_controls(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = _model()
    schedule = FreezingSchedule(model, [Phase(0, "-1:"), Phase(2, "all")])
    clip = LayerClipping(model, 1e-3)
    stats = LayerStatistics(model, every=1)
    optimizer = torch.optim.SGD(parameter_groups(model, 1.0, Rates(decay=0.5)), lr=1.0)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, report_to=[], disable_tqdm=True,
        save_strategy="no", lr_scheduler_type="constant", remove_unused_columns=False, use_cpu=True, dataloader_pin_memory=False, logging_strategy="no",
        label_names=["labels"], log_level="error",
    )  # fmt: skip
    rows = [{k: v[i] for k, v in _batch(0, 32).items()} for i in range(32)]
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=rows, optimizers=(optimizer, None), callbacks=[trainer_callback([schedule, clip, stats])]
    )
    trainer.train()
    assert [r["step"] for r in stats.records] == [1, 2, 3, 4]
    first, last = stats.records[0]["layers"], stats.records[3]["layers"]
    assert first["layers.0.up"]["gradient"] is None and first["layers.0.up"]["update"] == 0.0
    assert all(m["gradient"] <= 1.001e-3 for m in last.values())
    for name, m in last.items():  # SGD moves by rate times gradient, whatever the layer
        level = next(t.level for t in schedule.trained if (t.module or t.leaf) == name)
        assert m["update"] == pytest.approx(0.5 ** (4 - min(level, 4)) * m["gradient"], rel=2e-2), name
    assert all(t.parameter.requires_grad for t in schedule.trained)
    optimizer.zero_grad()
    _backward(model)
    before = len(stats.records)
    optimizer.step()
    assert len(stats.records) == before  # the controls have been taken off
