"""AdaMSS: clusters, files with and without them, and the schedule that lets clusters compete."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from veneer.errors import ConfigError, LoadError, SaveError
from veneer.testing.laws import move

pytest.importorskip("sklearn")
BEST = {"r": 6, "num_subspaces": 3, "subspace_rank": 2, "target_modules": ["up", "down"]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.tanh(self.up(x)))
        return y


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _base(seed: int = 7) -> Any:
    torch.manual_seed(seed)
    return Deep()


def _model(**fields: Any) -> Any:
    return veneer.get_peft_model(_base(), veneer.AdamssConfig(**{**BEST, **fields}))


def _trained(**fields: Any) -> Any:
    model = _model(**fields)
    move(model)
    return model.eval()


def _as_peft_writes(folder: Path) -> Path:
    (folder / "adapter_init.safetensors").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors")  # without veneer's notes
    return folder


def test_every_row_changes_within_its_cluster() -> None:
    model = _trained()
    layer = model.get_base_model().layers[0].up
    a, b, v = (layer.leaf("default", f"adamss_{n}") for n in ("A", "B", "newB"))
    rows, sizes = layer.leaf("default", "adamss_rows"), layer.leaf("default", "adamss_sizes")
    d = torch.zeros(16, 13)
    start = 0
    for c, (count, rank) in enumerate(sizes.tolist()):
        for k in range(start, start + count):
            d[rows[k]] = b[k, :rank] @ a[c, :rank] @ v
        start += count
    assert sorted(rows.tolist()) == list(range(16))
    torch.testing.assert_close(layer.get_delta_weight("default"), d[:, :12], atol=1e-6, rtol=1e-5)
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ d[:, :12].T + d[:, 12], atol=1e-5, rtol=1e-5)
    assert model.base_model.supports_lora_conversion()  # to a LoRA with a bias


def test_the_start_is_the_clusters_own_directions() -> None:
    layer = _model().get_base_model().layers[0].up
    w = torch.cat([layer.base_layer.weight, layer.base_layer.bias.unsqueeze(1)], 1).detach()
    v = layer.leaf("default", "adamss_newB")
    torch.testing.assert_close(v @ v.T, torch.eye(6), atol=1e-5, rtol=0)
    u = w @ v.T / (w @ v.T).norm(dim=0)
    rows, sizes, a = (layer.leaf("default", f"adamss_{n}") for n in ("rows", "sizes", "A"))
    for c, part in enumerate(rows.long().split(sizes[:, 0].tolist())):
        mine, best = a[c, : int(sizes[c, 1])], torch.linalg.svdvals(u[part])[: int(sizes[c, 1])]
        torch.testing.assert_close(mine @ mine.T, torch.eye(len(mine)), atol=1e-5, rtol=0)
        torch.testing.assert_close((u[part] @ mine.T).square().sum(), best.square().sum(), rtol=1e-2, atol=0)


def test_files_are_pefts_and_hold_the_rows_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair of tensors a cluster; and loading needs no scikit-learn, nor the very base."""
    model, x = _trained(), torch.randn(3, 12)
    model.save_pretrained(tmp_path)
    tensors = {k.removeprefix("base_model.model.layers.0.up."): t for k, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    sizes = model.get_base_model().layers[0].up.leaf("default", "adamss_sizes")
    for c, (count, rank) in enumerate(sizes.tolist()):
        assert tensors[f"adamss_A.{c}"].shape == (rank, 6)
        assert tensors[f"adamss_B.{c}"].shape == (count, rank)
    assert tensors["adamss_newB"].shape == (6, 13)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    assert torch.equal(veneer.PeftModel.from_pretrained(_base(), tmp_path)(x), model(x))
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        _model()
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        veneer.PeftModel.from_pretrained(_base(), _as_peft_writes(tmp_path))


def test_files_of_peft_have_their_clusters_found_again(tmp_path: Path) -> None:
    model, x = _trained(num_subspaces=5), torch.randn(3, 12)
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(_base(), _as_peft_writes(tmp_path))
    assert torch.equal(again(x), model(x))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_init.safetensors").exists()
    low = veneer.PeftModel.from_pretrained(_base(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(low(x), model(x))


def test_another_base_is_no_guess(tmp_path: Path) -> None:
    """Where k-means finds other clusters, loading a file of PEFT is an error, and the model is as it was."""
    _trained(num_subspaces=5).save_pretrained(tmp_path)
    other = _base(seed=8)
    with pytest.raises(LoadError, match=r"clusters of \["):
        veneer.PeftModel.from_pretrained(other, _as_peft_writes(tmp_path))
    assert type(other.layers[0].up) is nn.Linear


def test_ranks_follow_the_clusters() -> None:
    """A cluster has no more ranks than rows, and with use_dynamic_rank no more than matter."""
    many = _model(num_subspaces=30, subspace_rank=3).get_base_model().layers[0].up.leaf("default", "adamss_sizes")
    assert many.shape == (16, 2)
    assert many[:, 0].tolist() == [1] * 16
    assert many[:, 1].tolist() == [1] * 16
    for threshold, rank in ((0.999, 1), (0.0, 3)):
        sizes = _model(num_subspaces=2, subspace_rank=3, use_dynamic_rank=True, svd_threshold=threshold)
        assert sizes.get_base_model().layers[0].up.leaf("default", "adamss_sizes")[:, 1].tolist() == [rank] * 2


def test_a_start_that_is_none() -> None:
    model = _model(init_weights=None)
    assert not torch.equal(model(torch.ones(1, 12)), _base()(torch.ones(1, 12)))


# -------------------------------------------------------------------- the schedule

ASA = {"use_asa": True, "asa_target_subspaces": 6, "init_warmup": 2, "final_warmup": 10, "mask_interval": 4}


def _live(model: Any) -> list[list[int]]:
    return [
        layer.leaf("default", "adamss_live").int().tolist() for block in model.get_base_model().layers for layer in (block.up, block.down)
    ]


def _step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    target = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    optimizer.zero_grad()
    (model(x) - target).square().mean().backward()
    optimizer.step()


def _train(model: Any, steps: int, explicit: bool = False, cls: Any = torch.optim.AdamW) -> list[int]:
    """How many clusters train after each step."""
    optimizer = cls([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    counts = []
    for step in range(steps):
        _step(model, optimizer)
        if explicit:
            model.base_model.update_and_allocate(step)
        counts.append(sum(map(sum, _live(model))))
    return counts


def test_clusters_stop_by_the_schedule() -> None:
    """24 clusters fall to the target as 6 + 18 (1 - t)³, at steps 4, 8 and, the last, 10, counted from 0."""
    counts = _train(_model(**ASA), 12)
    at4, at8 = int(6 + 18 * (6 / 8) ** 3), int(6 + 18 * (2 / 8) ** 3)
    assert counts == [24] * 4 + [at4] * 4 + [at8] * 2 + [6] * 2


def test_a_cut_at_the_end_whatever_the_interval() -> None:
    assert _train(_model(**{**ASA, "mask_interval": 7}), 12) == [24] * 7 + [int(6 + 18 * (3 / 8) ** 3)] * 3 + [6] * 2


def test_what_has_stopped_stays_put_under_an_optimizer_with_a_memory() -> None:
    model = _model(**ASA)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(5):
        _step(model, optimizer)
    layer = next(x for b in model.get_base_model().layers for x in (b.up, b.down) if 0 < int(x.leaf("default", "adamss_live").sum()) < 3)
    live = layer.leaf("default", "adamss_live").clone()
    a, b = (layer.leaf("default", f"adamss_{n}") for n in "AB")
    of = torch.repeat_interleave(torch.arange(3), layer.leaf("default", "adamss_sizes")[:, 0])
    before = a.detach().clone(), b.detach().clone()
    for _ in range(2):
        _step(model, optimizer)
    assert torch.equal(a[~live], before[0][~live])
    assert torch.equal(b[~live[of]], before[1][~live[of]])
    assert bool((a[live] != before[0][live]).any())


def test_the_loops_own_count_does_the_same() -> None:
    automatic, explicit = _model(**ASA), _model(**ASA)
    assert _train(automatic, 12) == _train(explicit, 12, explicit=True)
    assert _live(automatic) == _live(explicit)
    late = _model(**ASA)
    assert _train(late, 3) == [24] * 3
    late.base_model.update_and_allocate(0)  # from here on the loop decides
    assert _train(late, 12) == [24] * 12


def test_the_callback_is_harmless_and_hands_on_the_count() -> None:
    class State:
        global_step = 0

    model, callback = _model(**ASA), veneer.AdamssAsaCallback()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(12):
        callback.on_step_begin(None, None, None, model=model)
        _step(model, optimizer)
        State.global_step = step
        callback.on_optimizer_step(None, State, None, model=model)
    assert sum(map(sum, _live(model))) == 6
    with pytest.raises(AttributeError, match="nonsense"):
        callback.nonsense  # noqa: B018


def test_the_trainer_takes_the_callback(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = _base()

        def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
            return {"loss": (self.deep(x) - labels).square().mean()}

    model: Any = veneer.get_peft_model(WithLoss(), veneer.AdamssConfig(**{**BEST, **ASA}))
    data = [{"x": torch.randn(12), "labels": torch.randn(12)} for _ in range(24)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[veneer.AdamssAsaCallback()]).train()
    held = [layer.leaf("default", "adamss_live") for b in model.get_base_model().deep.layers for layer in (b.up, b.down)]
    assert int(torch.cat(held).sum()) == 6


def test_training_goes_on_with_what_has_stopped(tmp_path: Path) -> None:
    model = _model(**ASA)
    _train(model, 9)
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(_base(), tmp_path, is_trainable=True)
    assert _live(again) == _live(model)
    assert sum(map(sum, _live(again))) == 6


def test_a_schedule_that_never_advanced_is_not_saved(tmp_path: Path) -> None:
    model = _model(**ASA)
    model(torch.randn(3, 12)).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad)  # by no torch optimizer
    with pytest.raises(SaveError, match="update_and_allocate"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.base_model.update_and_allocate(0)
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"init_weights": "zeros"}, "init_weights"), ({"r": 0}, "`r`"), ({"use_asa": True, "mask_interval": 0}, "mask_interval"),
        ({"use_asa": True, "init_warmup": 10, "final_warmup": 10}, "init_warmup"),
        ({"use_asa": True, "asa_target_subspaces": 0}, "asa_target_subspaces"), ({"use_asa": True, "asa_schedule_exponent": 0}, "exponent"),
    ],
)  # fmt: skip
def test_wrong_options(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        veneer.AdamssConfig(**fields)
    assert veneer.AdamssConfig(init_weights=False).init_weights is None
