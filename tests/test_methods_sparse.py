"""Changes of single entries: the kernel, SHiRA and Super-Tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer
from veneer.errors import ConfigError
from veneer.kernels import reference, sparse
from veneer.kernels.sparse import sparse_linear
from veneer.ops import Rows, Sparse
from veneer.testing.laws import move


def _some(n_out: int = 6, n_in: int = 5, k: int = 4, dtype: torch.dtype = torch.float64, rows: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    at = torch.randperm(n_out * n_in)[:k].int()
    shapes = {"x": (2, rows, n_in), "w": (n_out, n_in), "b": (n_out,), "values": (k,)}
    return {"index": at, **{n: torch.randn(s, dtype=dtype) for n, s in shapes.items()}}


SHAPES = {"few rows": (6, 5, 4, 3), "dense": (6, 5, 4, 10), "thin": (14, 12, 5, 10)}  # n_out, n_in, k, rows: each takes a way of its own


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("based", [False, True])
def test_gradients_are_those_of_finite_differences(biased: bool, based: bool, shape: tuple[int, ...]) -> None:
    n_out, n_in, k, rows = shape
    t, size = _some(n_out, n_in, k, rows=rows), (n_out, n_in)
    names = ["x", "values"] + ["b"] * biased

    def run(*values: Tensor) -> Tensor:
        v = dict(zip(names, values, strict=True))
        return sparse_linear(v["x"], t["w"] if based else None, v.get("b"), t["index"], v["values"], size)

    inputs = [t[n].requires_grad_() for n in names]
    assert torch.autograd.gradcheck(run, inputs)
    v = dict(zip(names, inputs, strict=True))
    want = reference.sparse_linear(v["x"], t["w"] if based else None, v.get("b"), t["index"], v["values"], size)
    torch.testing.assert_close(run(*inputs), want)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bfloat16_equals_the_reference(shape: tuple[int, ...]) -> None:
    n_out, n_in, k, rows = shape
    t, size = _some(n_out, n_in, k, torch.bfloat16, rows), (n_out, n_in)
    for w in (t["w"], None):
        grads = []
        for run in (sparse_linear, reference.sparse_linear):
            x, values = t["x"].clone().requires_grad_(), t["values"].float().requires_grad_()
            y = run(x, w, t["b"], t["index"], values, size)
            assert y.dtype == torch.bfloat16
            grads.append((y, *torch.autograd.grad(y.float().square().sum(), (x, values))))
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, atol=0.06 * float(want.detach().float().abs().max()), rtol=0)


@pytest.mark.parametrize("sorted_", [False, True])
@pytest.mark.parametrize("rows", [10, 11, 12])
def test_parts_of_the_tokens_and_what_is_left_over(rows: int, sorted_: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_PART", 4)
    monkeypatch.setattr(sparse, "_PARTS", 2)
    t = _some(14, 12, 5, rows=rows)
    index = t["index"].sort().values if sorted_ else t["index"]
    found = []
    for run in (sparse_linear, reference.sparse_linear):
        for w in (t["w"], None):
            x, values = t["x"].mT.contiguous().mT.requires_grad_(), t["values"].clone().requires_grad_()
            y = run(x, w, t["b"], index, values, (14, 12))
            found.append((y, *torch.autograd.grad(y.square().sum(), (x, values))))
    torch.testing.assert_close(found[:2], found[2:])


@pytest.mark.parametrize("rows", [1, 20])
def test_small_values_survive_in_bfloat16(rows: int) -> None:
    """Added to a weight of one they would be rounded away; the two products are kept apart."""
    x, w = torch.ones(rows, 4, dtype=torch.bfloat16), torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.bfloat16)
    values = torch.tensor([1e-3])
    got = sparse_linear(x, w, None, torch.tensor([0]), values, (1, 4))
    torch.testing.assert_close(got.float(), torch.full((rows, 1), 1e-3), rtol=1e-2, atol=0)


def test_no_entries_and_no_rows() -> None:
    t = _some(30, 20, 0)
    assert not sparse_linear(t["x"].repeat(1, 9, 1), None, None, t["index"], t["values"], (30, 20)).any()
    assert sparse_linear(t["x"][:0], t["w"], t["b"], t["index"], t["values"], (30, 20)).shape == (0, 3, 30)


@pytest.mark.parametrize("config", [veneer.ShiraConfig(r=1, target_modules=["0"]), veneer.SupertuningConfig(target_modules=["0"])])
def test_nothing_of_the_weights_size_is_kept(config: Any) -> None:
    base = nn.Sequential(nn.Linear(64, 64))
    veneer.get_peft_model(base, config).train()
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(0 if isinstance(t, nn.Parameter) else t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        base(torch.randn(2, 64))
    assert max(sizes) < 64 * 64 // 4


def test_as_a_matrix() -> None:
    t = _some()
    op = Sparse(t["index"], t["values"], (6, 5))
    m = op.dense()
    assert int((m != 0).sum()) == 4
    torch.testing.assert_close(op.rows(t["x"], Rows()), t["x"] @ m.T)
    torch.testing.assert_close(op.left(torch.eye(5, dtype=m.dtype)), m)


def _base() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6))


def _config(**fields: Any) -> Any:
    return veneer.SupertuningConfig(**{"sparsity": 0.75, "target_modules": ["0", "2"], **fields})


@pytest.mark.parametrize("top", [True, False])
def test_the_largest_or_smallest_entries_train(top: bool, tmp_path: Path) -> None:
    base, x = _base(), torch.randn(3, 10)
    weights = [base[i].weight.detach().clone() for i in (0, 2)]
    model = veneer.get_peft_model(base, _config(select_top=top))
    move(model)
    for layer, w in zip((base[0], base[2]), weights, strict=True):
        moved = layer.get_delta_weight("default") != 0
        assert int(moved.sum()) == int(w.numel() * 0.25)
        if top:
            assert float(w.abs()[moved].min()) >= float(w.abs()[~moved].max())
        else:
            assert float(w.abs()[moved].max()) <= float(w.abs()[~moved].min())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {k.rpartition("_")[2]: t.dtype for k, t in tensors.items()} == {"values": torch.float32, "indices": torch.int32}
    torch.testing.assert_close(veneer.PeftModel.from_pretrained(_base(), tmp_path)(x), model(x), atol=0, rtol=0)


def test_values_are_float32_on_any_base() -> None:
    model = veneer.get_peft_model(_base().bfloat16(), _config(r=2), autocast_adapter_dtype=False)
    assert model.get_base_model()[0].supertuning_values["default"].dtype == torch.float32


def test_with_a_lora_beside(tmp_path: Path) -> None:
    base, x = _base(), torch.randn(3, 10)
    model = veneer.get_peft_model(base, _config(r=2, save_precomputed_indices=False))
    assert model.peft_config["default"].lora_alpha == 4
    move(model)
    layer = base[0]
    d = torch.zeros(80).index_put((layer.supertuning_indices["default"].long(),), layer.supertuning_values["default"]).view(8, 10)
    d = d + 2 * layer.supertuning_lora_B["default"].weight @ layer.supertuning_lora_A["default"].weight
    torch.testing.assert_close(layer.get_delta_weight("default"), d)
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + d).T + layer.base_layer.bias)
    model.save_pretrained(tmp_path)
    assert not [k for k in load_file(tmp_path / "adapter_model.safetensors") if "indices" in k]
    torch.testing.assert_close(veneer.PeftModel.from_pretrained(_base(), tmp_path)(x), model(x), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"sparsity": 1.0}, "sparsity"), ({"lora_alpha": 4}, "give `r`"), ({"r": 0}, "`r`"), ({"r": 2, "lora_dropout": 1.0}, "lora_dropout")],
)
def test_wrong_options(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        _config(**fields)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves no entry"):
        veneer.get_peft_model(_base(), _config(sparsity=0.999))
