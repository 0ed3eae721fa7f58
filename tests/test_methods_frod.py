"""FRoD: its decomposition, its files, and what it makes of a basis that comes from elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from veneer.errors import ConfigError, PeftWarning
from veneer.methods.frod import category
from veneer.testing.laws import move


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


def _base() -> Any:
    torch.manual_seed(7)
    return Deep()


def _config(**fields: Any) -> Any:
    return veneer.FrodConfig(**{"sparse_rate": 0.1, "progressbar": False, "target_modules": ["up", "down"], **fields})


def _trained(**fields: Any) -> Any:
    model = veneer.get_peft_model(_base(), _config(**fields))
    move(model)
    return model.eval()


def _weight(w: Tensor, v: Tensor, values: Tensor, at: Tensor, length: Tensor) -> Tensor:
    """U (S + diag(l)) Vᵀ from the weight and what a file holds."""
    u = w.double() @ torch.linalg.inv(v.double()).T
    u = u / u.norm(dim=0)
    s = torch.diag(length.double())
    for (i, j), value in zip(at.T.tolist(), values.double(), strict=True):
        s[i, j] += value
    return u @ s @ v.double().T


@pytest.mark.parametrize("rebuilt", [True, False])
def test_the_weight_is_rebuilt_from_the_basis_of_the_file(rebuilt: bool, tmp_path: Path) -> None:
    """U follows from the file's own V, wherever that was computed: here its columns have other signs and sizes."""
    model = _trained()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    if not rebuilt:
        for role in ("up", "down"):
            v = tensors[f"base_model.frod_V.{role}"]
            v *= torch.linspace(0.5, 2, len(v)) * (-1.0) ** torch.arange(len(v))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    again = veneer.PeftModel.from_pretrained(_base(), tmp_path)
    for i, block in enumerate(again.get_base_model().layers):
        for role in ("up", "down"):
            layer, at = getattr(block, role), f"base_model.model.layers.{i}.{role}.frod_lambda_"
            v, places = tensors[f"base_model.frod_V.{role}"], tensors[f"base_model.frod_s_indices.{role}"]
            want = _weight(layer.base_layer.weight, v, tensors[f"{at}s_values"], places, tensors[f"{at}l"])
            got = layer.base_layer.weight + layer.get_delta_weight("default")
            torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)


def test_a_fresh_adapter_changes_nothing_in_any_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 12, dtype=dtype)
        model = veneer.get_peft_model(_base().to(dtype), _config())
        assert torch.equal(model(x), _base().to(dtype)(x))
        layer = model.get_base_model().layers[0].up
        assert layer.frod_U["default"].dtype == dtype  # as large as the weight, and no larger
        torch.testing.assert_close(layer.frod_U["default"].float().norm(dim=0), torch.ones(12), atol=1e-2, rtol=0)


def test_places_are_those_of_peft() -> None:
    model = _trained(sparse_rate=0.03, projection_prng_key=2)
    held = model.base_model.frod_s_indices["default"]
    assert held.get_parameter("down").tolist() == [[11, 5, 13, 0, 1, 5, 7], [3, 4, 0, 7, 8, 15, 10]]
    assert held.get_parameter("up").tolist() == [[6, 10, 9, 6], [2, 1, 8, 8]]


def test_layers_of_a_role_share_a_basis_that_fits_them_all() -> None:
    """Where all their weights are diagonal in one basis, V finds it: each W Vᵀ⁻¹ has orthogonal columns."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12))[0]
    base = _base()
    with torch.no_grad():
        for block in base.layers:
            block.up.weight.copy_(torch.linalg.qr(torch.randn(16, 12))[0] @ torch.diag(torch.rand(12) + 0.5) @ basis.T)
    model = veneer.get_peft_model(base, _config(target_modules=["up"]))
    for block in base.layers:
        u = block.up.frod_U["default"]
        torch.testing.assert_close(u.T @ u, torch.eye(12), atol=1e-4, rtol=0)
    v = model.base_model.frod_V["default"].get_parameter("up")
    assert ((basis.T @ (v / v.norm(dim=0))).abs() > 1 - 1e-4).sum() == 12  # the same directions, in some order


def test_without_projections_the_file_holds_what_trains(tmp_path: Path) -> None:
    model, x = _trained(save_projection=False), torch.randn(3, 12)
    model.save_pretrained(tmp_path)
    assert {k.rpartition(".")[2] for k in load_file(tmp_path / "adapter_model.safetensors")} == {"frod_lambda_l", "frod_lambda_s_values"}
    torch.testing.assert_close(veneer.PeftModel.from_pretrained(_base(), tmp_path)(x), model(x), atol=1e-6, rtol=0)


def test_no_places_at_all(tmp_path: Path) -> None:
    """PEFT writes an empty tensor there; it is passed over."""
    model, x = _trained(sparse_rate=0.0), torch.randn(3, 12)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not [k for k in tensors if "s_values" in k]
    tensors |= {f"base_model.model.layers.{i}.{r}.frod_lambda_s_values": torch.empty(0) for i in range(4) for r in ("up", "down")}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(veneer.PeftModel.from_pretrained(_base(), tmp_path)(x), model(x), atol=0, rtol=0)


def test_singular_weights_are_no_matter() -> None:
    base, x = _base(), torch.randn(3, 12)
    with torch.no_grad():
        for block in base.layers:
            block.up.weight[:, 3] = 0
    frozen = base(x)
    model = veneer.get_peft_model(base, _config())
    torch.testing.assert_close(model(x), frozen)
    move(model)
    assert bool(model(x).isfinite().all())


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("lin0", "lin0"), ("layers.3.up", "up"), ("model.layers.0.self_attn.q_proj", "self_attn_q_proj"),
        ("encoder.layer.0.attention.self.query", "self_query"), ("encoder.layer.0.attention.output.dense", "attention_output"),
        ("encoder.layer.0.output.dense", "output_dense"),
    ],
)  # fmt: skip
def test_roles(name: str, role: str) -> None:
    assert category(name) == role


def test_one_role_has_one_width() -> None:
    base = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(4, 4)}), "b": nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(6, 4)})})})
    with pytest.raises(ConfigError, match="4 and 6 inputs"):
        veneer.get_peft_model(base, _config(target_modules=["q"]))


def test_options_that_cannot_act_say_so() -> None:
    with pytest.warns(PeftWarning, match="runtime_offload_base_weight"):
        _config(runtime_offload_base_weight=True)
    with pytest.raises(ConfigError, match="sparse_rate"):
        _config(sparse_rate=1.5)


def test_progress_is_shown_if_wanted(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    veneer.get_peft_model(_base(), _config(progressbar=True))
    assert "2/2" in capfd.readouterr().err
    veneer.get_peft_model(_base(), _config())
    assert not capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    veneer.get_peft_model(_base(), _config(progressbar=True))  # without it, it just takes its time


def test_dropout_acts_on_the_change_alone() -> None:
    model = _trained(frod_dropout=0.5, target_modules=["layers.0.up"])
    layer, x = model.get_base_model().layers[0].up, torch.randn(12)
    still, frozen = layer(x).detach(), layer.base_layer(x).detach()
    many = layer.train()(x.expand(20000, 12)).detach()
    torch.testing.assert_close(many.mean(0), still, atol=0.05, rtol=0)
    d = layer.get_delta_weight("default")
    torch.testing.assert_close((many - frozen).var(0), (d * x).square().sum(1).detach(), rtol=0.1, atol=1e-3)
