"""Adapters turned into LoRAs: exact where the rank allows, the nearest where not, for every method with a ΔW and on every site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
from veneer.engine.layer import adapted_layers
from veneer.errors import ConfigError, ConversionError, PeftWarning, RouteError
from veneer.intruders import reduce_intruder_dimension
from veneer.method import Method, load_methods
from veneer.testing.laws import Case, cases, examples, move

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*are off by more than:veneer.errors.PeftWarning", "ignore:.*already a LoRA adapter:veneer.errors.PeftWarning"
)

METHODS = {n: m for n, m in sorted(load_methods().items()) if isinstance(m, type) and issubclass(m, Method)}
WITHOUT = {"BEFT": "changes no weight", "LN_TUNING": "", "POLY": "each task has a change of its own"}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_with_a_delta_is_converted_exactly(name: str, tmp_path: Path) -> None:
    done = 0
    configs = examples(METHODS[name])
    for i, case in enumerate([*cases(configs[:1]), *cases(configs[1:], ["linear", "conv2d"])]):
        if case.refused:
            continue
        model = case.trained()
        if case.config.unmergeable or name in WITHOUT:
            assert not model.supports_lora_conversion()
            with pytest.raises(ConversionError, match=WITHOUT.get(name) or "does not support LoRA conversion"):
                veneer.convert_to_lora(model, 1.0)
            done += 1
            continue
        assert model.supports_lora_conversion()
        report = veneer.save_as_lora(tmp_path / str(i), model, 1.0)
        assert all(c.error < 1e-6 for c in report.layers.values())
        again = veneer.PeftModel.from_pretrained(case.base(), tmp_path / str(i)).eval()
        assert again.peft_config["default"].peft_type == "LORA"
        case.close(case.run(again, case.inputs()), case.run(model))
        done += 1
    assert done


def _loha(**options: Any) -> Any:
    model = veneer.get_peft_model(net(), veneer.LoHaConfig(r=2, target_modules=["0", "2"], **options))
    move(model, size=0.5)
    return model.eval()


def test_an_int_is_the_rank_of_the_nearest_and_a_float_its_share() -> None:
    model = _loha()
    config, tensors = veneer.convert_to_lora(model, 3)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (3, 3, {})
    for path, layer in adapted_layers(model.get_base_model()):
        d = layer.get_delta_weight("default").detach().double()
        u, s, v = torch.linalg.svd(d, full_matrices=False)
        a, b = (tensors[f"base_model.model.{path}.{n}.weight"] for n in ("lora_A", "lora_B"))
        assert a.shape == (3, d.shape[1]) and b.shape == (d.shape[0], 3)
        torch.testing.assert_close((b @ a).double(), (u[:, :3] * s[:3]) @ v[:3], atol=1e-6, rtol=1e-5)
    made = veneer.convert_to_lora(model, 0.9)
    config, tensors = made
    for path, layer in adapted_layers(model.get_base_model()):
        energy = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double()).square()
        wanted = int((energy.cumsum(0) / energy.sum() < 0.9).sum()) + 1
        assert made.report.layers[path].rank == wanted == len(tensors[f"base_model.model.{path}.lora_A.weight"])
        assert config.at(path).r == config.at(path).lora_alpha == wanted
        assert made.report.layers[path].error == pytest.approx(float(energy[wanted:].sum() / energy.sum()) ** 0.5, rel=1e-4)


def test_what_is_lost_is_said() -> None:
    with pytest.warns(PeftWarning, match=r"2 of 2 layers are off by more than 10%.*Give a larger rank"):
        veneer.convert_to_lora(_loha(), 1)


class _Largest(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.size = max(self.size, t.numel() if isinstance(t, Tensor) else 0)
        return out


@pytest.mark.parametrize("config", [veneer.VeraConfig(r=8, target_modules=["0"]), veneer.DeloraConfig(r=8, target_modules=["0"])])
def test_thin_changes_are_never_formed(config: Any) -> None:
    n = 400
    model = veneer.get_peft_model(nn.Sequential(nn.Linear(n, n)), config)
    move(model)
    with _Largest() as largest:
        config, tensors = veneer.convert_to_lora(model, 8)
    assert largest.size < n * n / 8
    ((_, layer),) = adapted_layers(model.get_base_model())
    a, b = tensors["base_model.model.0.lora_A.weight"], tensors["base_model.model.0.lora_B.weight"]
    torch.testing.assert_close(b @ a, layer.get_delta_weight("default"), atol=1e-6, rtol=1e-4)


def test_large_dense_changes_take_no_whole_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 640
    model = veneer.get_peft_model(nn.Sequential(nn.Linear(n, n)), veneer.LoHaConfig(r=2, target_modules=["0"]))
    move(model)
    svd, sizes = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **k: (sizes.append(min(m.shape)), svd(m, **k))[1])
    made = veneer.convert_to_lora(model, 8)  # its true rank is 4
    assert max(sizes) < 100
    assert made.report.layers["0"].error < 1e-5
    _, tensors = made
    ((_, layer),) = adapted_layers(model.get_base_model())
    d = layer.get_delta_weight("default").detach()
    got = tensors["base_model.model.0.lora_B.weight"] @ tensors["base_model.model.0.lora_A.weight"]
    assert float((got - d).norm() / d.norm()) < 1e-5


def test_targets_copies_and_the_task_come_along(tmp_path: Path) -> None:
    config = veneer.LoHaConfig(r=2, target_modules=r"0|2", exclude_modules=["2"], modules_to_save=["1"], task_type="FEATURE_EXTRACTION")
    base = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 10))
    state = {k: v.clone() for k, v in base.state_dict().items()}
    model = veneer.get_peft_model(base, config)
    move(model)
    new, tensors = veneer.convert_to_lora(model.eval(), 1.0)
    assert (new.target_modules, new.exclude_modules, new.modules_to_save) == ("0|2", {"2"}, ["1"])
    assert new.task_type == "FEATURE_EXTRACTION"
    assert torch.equal(tensors["base_model.model.1.weight"], model.get_base_model()[1].modules_to_save["default"].weight)
    veneer.save_as_lora(tmp_path, model, 1.0)
    again = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 10))
    again.load_state_dict(state)
    loaded = veneer.PeftModel.from_pretrained(again, tmp_path).eval()
    x = torch.randn(3, 12)
    torch.testing.assert_close(loaded.get_base_model()(x), model.get_base_model()(x), atol=1e-5, rtol=1e-5)


def test_a_model_with_injected_adapters(tmp_path: Path) -> None:
    model = net()
    veneer.inject_adapter_in_model(veneer.LoHaConfig(r=2, target_modules=["0"]), model, "mine")
    move(model)
    _, tensors = veneer.convert_to_lora(model, 1.0, "mine")
    assert set(tensors) == {"0.lora_A.weight", "0.lora_B.weight"}  # as get_peft_model_state_dict of such a model has them
    veneer.save_as_lora(tmp_path, model, 1.0, "mine")
    x = torch.randn(3, 12)
    torch.testing.assert_close(veneer.PeftModel.from_pretrained(net(), tmp_path).eval()(x), model.eval()(x), atol=1e-5, rtol=1e-5)


def test_biases_that_an_adapter_trains_are_written(tmp_path: Path) -> None:
    model = veneer.get_peft_model(net(), veneer.C3AConfig(block_size=2, target_modules=["0"], bias="all"))
    move(model)
    config, tensors = veneer.convert_to_lora(model, 1.0)
    assert config.bias == "all" and torch.equal(tensors["base_model.model.2.bias"], model.get_base_model()[2].bias)


@pytest.mark.parametrize(
    ("rank", "text"),
    [(0, "rank of 0 doesn't make sense"), (1.2, "between 0 and 1"), (0.0, "between 0 and 1"), (99, "larger than the weight shape")],
)
def test_ranks_that_are_none(rank: float, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        veneer.convert_to_lora(_loha(), rank)


def test_what_cannot_be_converted() -> None:
    with pytest.raises(ConversionError, match="Could not detect any layer"):
        veneer.convert_to_lora(net(), 2)
    with pytest.raises(TypeError, match="Could not detect any layer"):  # PEFT's kind of error
        veneer.convert_to_lora(net(), 2)
    with pytest.raises(RouteError, match="no adapter 'q'"):
        veneer.convert_to_lora(_loha(), 2, "q")
    with pytest.warns(PeftWarning, match="compile_kwargs"):
        veneer.convert_to_lora(_loha(), 2, compile_kwargs={})
    assert not _loha().supports_lora_conversion("q")


def test_a_lora_is_recompressed_with_a_warning() -> None:
    model = veneer.get_peft_model(net(), veneer.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False))
    with torch.no_grad():
        model.get_base_model()[0].lora_A["default"].weight[2:] = 0  # of rank 2 in truth
    with pytest.warns(PeftWarning, match="already a LoRA"):
        config, _ = veneer.convert_to_lora(model, 1.0)
    assert config.r == 2


def test_converted_dora_scales_its_rows() -> None:
    """PEFT's conversion leaves DoRA's magnitude out."""
    case = Case(veneer.LoraConfig(r=4, use_dora=True), "linear")
    model = case.trained()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "magnitude" in n:
                p.mul_(2)
    _, tensors = veneer.convert_to_lora(model, 1.0)
    ((path, layer),) = adapted_layers(model.get_base_model())
    got = tensors[f"base_model.model.{path}.lora_B.weight"] @ tensors[f"base_model.model.{path}.lora_A.weight"]
    w = layer.frozen_weight()
    torch.testing.assert_close(got, layer.change("default").weight(w) - w, atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------- intruder dimensions


def _rotated() -> Any:
    """Weights with falling singular values, and a LoRA that brings one strong direction that is none of theirs."""
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(24, 16, bias=False), nn.Linear(16, 12, bias=False))
    for layer in base:
        u, _, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        layer.weight.data = (u * 0.7 ** torch.arange(u.shape[1])) @ v
    model = veneer.get_peft_model(
        base, veneer.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "1"], init_lora_weights=False, use_rslora=True)
    )
    move(model, size=0.1)
    return model.eval()


@pytest.mark.parametrize("top_k", [2, 8])
def test_intruders_are_made_smaller(top_k: int) -> None:
    model, lines = _rotated(), []
    old = {p: layer.get_delta_weight("default").detach().double() for p, layer in adapted_layers(model.get_base_model())}
    report = reduce_intruder_dimension(model, top_k=top_k, mitigation_lambda=0.25, threshold_epsilon=0.8, logging_sink=lines.append)
    assert model.active_adapter == "intruder_reduced" and lines[-1] == "Enabling new adapter intruder_reduced"
    for path, layer in adapted_layers(model.get_base_model()):
        w = layer.frozen_weight().double()
        own = torch.linalg.svd(w, full_matrices=False)[0]
        u, s, v = torch.linalg.svd(w + old[path], full_matrices=False)
        strange = [i for i in range(top_k) if float((u[:, i] @ own).abs().max()) < 0.8]
        assert strange and f"{path}: Intruders: {len(strange)}" in lines
        wanted = old[path] - 0.75 * sum(s[i] * torch.outer(u[:, i], v[i]) for i in strange)
        uu, ss, vv = torch.linalg.svd(wanted, full_matrices=False)
        torch.testing.assert_close(layer.get_delta_weight("intruder_reduced").double(), (uu[:, :3] * ss[:3]) @ vv[:3], atol=1e-5, rtol=1e-4)
        assert report.layers[path].error == pytest.approx(float(ss[3:].norm() / ss.norm()), rel=1e-4)


def test_without_intruders_nothing_changes() -> None:
    model = _rotated()
    y = model(torch.ones(2, 24))
    reduce_intruder_dimension(model, "default", "same", threshold_epsilon=0.0, logging_sink=None)
    torch.testing.assert_close(model(torch.ones(2, 24)), y)
    with pytest.raises(ConfigError, match="already an adapter 'same'"):
        reduce_intruder_dimension(model, "default", "same", logging_sink=None)
    with pytest.raises(ConfigError, match="not using LoRA"):
        reduce_intruder_dimension(_loha())


@pytest.mark.parametrize("site", ["embedding", "conv2d", "conv2d_groups", "attention", "parameter_3d"])
def test_intruders_on_every_kind_of_site(site: str) -> None:
    case = Case(veneer.LoraConfig(r=2), site)
    model = case.trained()
    report = reduce_intruder_dimension(model, threshold_epsilon=0.9, logging_sink=None)
    assert set(report.layers) == {p for p, _ in adapted_layers(model.get_base_model())}
    assert torch.isfinite(case.run(model)).all()
