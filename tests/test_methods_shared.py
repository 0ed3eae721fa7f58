"""Methods whose layers share tensors: PVeRA, RandLoRA, TinyLoRA, UniLoRA, VB-LoRA, against their formulas and against what PEFT 0.21.2 draws."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import veneer
from veneer.errors import ConfigError, LoadError, MergeError
from veneer.methods.unilora import balanced
from veneer.testing.laws import move


class Mlp(nn.Module):
    def __init__(self, n: int = 12, hidden: int = 16, out: int = 8) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(n, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin1(torch.relu(self.lin0(x)))
        return y


class Deep(nn.Module):
    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


BOTH = ["lin0", "lin1"]
CONFIGS: dict[str, Callable[..., Any]] = {
    "pvera": lambda **f: veneer.PveraConfig(**{"r": 3, "target_modules": BOTH, **f}),
    "randlora": lambda **f: veneer.RandLoraConfig(**{"r": 3, "randlora_alpha": 6, "target_modules": BOTH, **f}),
    "tinylora": lambda **f: veneer.TinyLoraConfig(**{"u": 5, "target_modules": BOTH, **f}),
    "unilora": lambda **f: veneer.UniLoraConfig(**{"theta_d_length": 30, "target_modules": BOTH, **f}),
    "vblora": lambda **f: veneer.VBLoRAConfig(**{"num_vectors": 10, "vector_length": 4, "target_modules": BOTH, **f}),
    "frod": lambda **f: veneer.FrodConfig(**{"sparse_rate": 0.1, "progressbar": False, "target_modules": BOTH, **f}),
}
OTHER: dict[str, dict[str, Any]] = {
    "pvera": {"r": 5, "projection_prng_key": 7, "save_projection": False},
    "randlora": {"r": 5, "projection_prng_key": 7, "save_projection": False},
    "tinylora": {"r": 3, "projection_seed": 7, "weight_tying": 1.0},
    "unilora": {"r": 2, "proj_seed": 7, "save_indices": True},
    "vblora": {"r": 2, "num_vectors": 7, "topk": 3},
    "frod": {"sparse_rate": 0.3, "projection_prng_key": 7, "save_projection": False},
}


def _base(seed: int = 0, **sizes: int) -> Mlp:
    torch.manual_seed(seed)
    return Mlp(**sizes)


def _model(config: Any, base: nn.Module | None = None) -> Any:
    torch.manual_seed(1)
    model = veneer.get_peft_model(base or _base(), config)
    move(model)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_two_adapters_of_other_seeds_and_ranks(name: str, tmp_path: Path) -> None:
    """Each gives what it gives alone, from its own file; deleting one leaves the other as it was."""
    x = torch.randn(4, 12)
    model = _model(CONFIGS[name]())
    model.add_adapter("second", CONFIGS[name](**OTHER[name]))
    model.set_adapter("second")
    move(model, seed=9)
    outputs = {}
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        outputs[adapter] = model(x)
    assert not torch.allclose(outputs["default"], outputs["second"])
    model.save_pretrained(tmp_path)
    for adapter, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        alone = veneer.PeftModel.from_pretrained(_base(), folder).eval()
        torch.testing.assert_close(alone(x), outputs[adapter], atol=1e-6, rtol=1e-5)
    model.delete_adapter("default")
    torch.testing.assert_close(model(x), outputs["second"], atol=0, rtol=0)
    assert not [k for k in model.state_dict() if ".default" in k]
    model.load_adapter(tmp_path, "default")
    model.set_adapter("default")
    torch.testing.assert_close(model(x), outputs["default"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "randlora"])
def test_bare_models_are_refused(name: str) -> None:
    base = _base()
    with pytest.raises(ConfigError, match="needs get_peft_model"):
        veneer.inject_adapter_in_model(CONFIGS[name](), base)
    assert type(base.lin0) is nn.Linear


@pytest.mark.parametrize("name", CONFIGS)
def test_convertibility_is_told(name: str) -> None:
    assert _model(CONFIGS[name]()).base_model.supports_lora_conversion()


# -------------------------------------------------------------------- PVeRA


def test_pvera_draws_from_the_gaussian_it_says() -> None:
    """In training mean and variance are those of the formula; in eval the mean itself."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 4))
    model = veneer.get_peft_model(base, veneer.PveraConfig(r=3, target_modules=["0"], d_initial=0.7))
    layer: Any = base[0]
    with torch.no_grad():
        layer.pvera_lambda_b["default"].copy_(torch.tensor([1.0, -2.0, 0.5, 0.0]))
    a, b = model.base_model.pvera_A["default"], model.base_model.pvera_B["default"]
    x = torch.randn(6)
    mean, log_variance = (0.7 * a @ x).chunk(2)
    gain = layer.pvera_lambda_b["default"].unsqueeze(1) * b
    expected = layer.base_layer(x) + gain @ mean
    torch.testing.assert_close(model.eval()(x), expected)
    many = model.train()(x.expand(20000, 6)).detach()
    torch.testing.assert_close(many.mean(0), expected.detach(), atol=0.1, rtol=0)
    torch.testing.assert_close(many.var(0), gain.square() @ log_variance.exp(), rtol=0.05, atol=1e-3)
    merged = model.train().merge_and_unload()  # the mean, in training mode too
    torch.testing.assert_close(merged(x), expected)


def test_pvera_sampling_at_inference_cannot_be_merged() -> None:
    model = _model(CONFIGS["pvera"](sample_at_inference=True))
    x = torch.randn(4, 12)
    assert not torch.equal(model(x), model(x))
    with pytest.raises(MergeError, match="sample_at_inference=False"):
        model.merge_adapter()
    assert not model.base_model.supports_lora_conversion()


def test_pvera_with_a_seed_draws_what_peft_draws() -> None:
    torch.manual_seed(7)
    base = Mlp()
    model = veneer.get_peft_model(base, veneer.PveraConfig(r=2, generator_seed=11, d_initial=1.0, target_modules=BOTH)).train()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lambda_b" in n:
                p.fill_(1.0)
    x = torch.linspace(-1, 1, 12).view(1, 12)
    want = [[-2.5490856170654297, 1.1323796510696411, 4.803134918212891], [-0.8397637605667114, -1.4734950065612793, -6.202686309814453]]
    for row in want:
        torch.testing.assert_close(model(x).flatten()[:3], torch.tensor(row), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", [None, 5])
def test_pvera_recomputes_the_same_draw(seed: int | None) -> None:
    """A checkpointed layer sees in the backward the noise of its forward, also when another forward came in between."""

    def grads(checkpointed: bool) -> list[Tensor]:
        model = _model(CONFIGS["pvera"](generator_seed=seed)).train()
        torch.manual_seed(3)
        xs = [torch.randn(4, 12, requires_grad=True) for _ in range(2)]
        ys = [checkpoint(model, x, use_reentrant=False) if checkpointed else model(x) for x in xs]
        sum(y.square().sum() for y in ys).backward()  # type: ignore[union-attr]
        return [p.grad for p in model.parameters() if p.grad is not None]

    for a, b in zip(grads(True), grads(False), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_pvera_projections_are_pefts() -> None:
    model = _model(veneer.PveraConfig(r=2, projection_prng_key=5, target_modules=BOTH), _base(n=24, hidden=8, out=24))
    first = model.base_model.pvera_A["default"].flatten()[:3]
    torch.testing.assert_close(first, torch.tensor([0.33025187253952026, -0.37388908863067627, 0.4074696898460388]), atol=0, rtol=0)
    first = model.base_model.pvera_B["default"].flatten()[:3]
    torch.testing.assert_close(first, torch.tensor([-0.6390785574913025, -0.23925469815731049, 1.3609176874160767]), atol=0, rtol=0)


# -------------------------------------------------------------------- RandLoRA


def test_randlora_bases_are_pefts() -> None:
    model = _model(veneer.RandLoraConfig(r=3, projection_prng_key=5, target_modules=BOTH), _base(n=24, hidden=8, out=24))
    a, b = model.base_model.randlora_A["default"], model.base_model.randlora_B["default"]
    assert (a.shape, b.shape) == ((3, 1, 24), (24, 8, 3))
    assert a.flatten()[:4].tolist() == [1.046875, -1.1796875, 1.2890625, 1.015625]
    assert b[0].flatten()[:4].tolist() == [-0.26953125, 1.28125, 1.5546875, 0.2099609375]
    model = _model(veneer.RandLoraConfig(r=3, projection_prng_key=5, very_sparse=True, target_modules=BOTH), _base(n=24, hidden=8, out=24))
    a, b = model.base_model.randlora_A["default"], model.base_model.randlora_B["default"]
    torch.testing.assert_close(a.flatten()[:5], torch.tensor([0.0, 0.0, 1.8541289567947388, 0.0, 1.8541289567947388]))
    torch.testing.assert_close(b.sum(), torch.tensor(-39.59928512573242), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sizes", [{"n": 5, "hidden": 9, "out": 4}, {"n": 7, "hidden": 7, "out": 3}])
def test_randlora_is_a_sum_over_its_bases(sizes: dict[str, int]) -> None:
    model = _model(veneer.RandLoraConfig(r=2, randlora_alpha=6, target_modules=BOTH), _base(**sizes))
    a, b = model.base_model.randlora_A["default"], model.base_model.randlora_B["default"]
    for layer in (model.get_base_model().lin0, model.get_base_model().lin1):
        n_out, n_in = layer.weight.shape
        short, long = sorted((n_in, n_out))
        lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
        n = lam.shape[1]
        assert n == -(-short // 2)
        left = [b[:long, i // 2, i % 2] for i in range(2 * n)]
        right = [lam[i // n, i % n] * a[i // n, 0, :short] * gamma[i % n] for i in range(2 * n)]  # PEFT's pairing
        d = 3 * sum(torch.outer(u, v) for u, v in zip(left, right, strict=True))
        torch.testing.assert_close(layer.get_delta_weight("default"), d if n_in <= n_out else d.T, atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]


def test_randlora_keeps_its_bases_once(tmp_path: Path) -> None:
    """In memory they are one tensor; the file has them under every layer, as PEFT writes and reads it."""
    model = _model(CONFIGS["randlora"]())
    root, top = model.get_base_model(), model.base_model
    for n in ("randlora_A", "randlora_B"):
        assert getattr(root.lin0, n)["default"] is getattr(root.lin1, n)["default"] is getattr(top, n)["default"]
    assert not [n for n, p in model.named_parameters() if p.requires_grad and ("_A" in n or "_B" in n)]
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {f"base_model.{at}randlora_{x}" for at in ("", "model.lin0.", "model.lin1.") for x in "AB"} <= keys
    again = veneer.PeftModel.from_pretrained(_base(), tmp_path, low_cpu_mem_usage=True)
    assert again.get_base_model().lin0.randlora_B["default"] is again.base_model.randlora_B["default"]
    assert not any(p.is_meta for p in again.parameters())


def test_randlora_can_be_injected() -> None:
    """Each layer has the bases under its own name, so that a bare model can hold them."""
    base = _base()
    veneer.inject_adapter_in_model(CONFIGS["randlora"](), base)
    move(base)
    state, x = veneer.get_peft_model_state_dict(base), torch.randn(3, 12)
    assert {"lin0.randlora_A", "lin1.randlora_A", "lin0.randlora_lambda"} <= set(state)
    assert base.lin0.randlora_A["default"] is base.lin1.randlora_A["default"]  # type: ignore[index]
    other = _base()
    veneer.inject_adapter_in_model(CONFIGS["randlora"](projection_prng_key=3), other)
    veneer.set_peft_model_state_dict(other, state)
    torch.testing.assert_close(other(x), base(x), atol=0, rtol=0)
    veneer.inject_adapter_in_model(CONFIGS["randlora"](projection_prng_key=3), other, "second")
    for layer in (other.lin0, other.lin1):
        layer.delete_adapter("default")  # type: ignore[operator]
    assert [k for k in other.state_dict() if "second" in k]
    assert not [k for k in other.state_dict() if "default" in k]


def test_randlora_keeps_nothing_of_the_bases_size_for_the_backward() -> None:
    """Of Λ A Γ, as large as the weight, only one copy is there, which the product needs."""
    base = nn.Sequential(nn.Linear(64, 64, bias=False))
    veneer.get_peft_model(base, veneer.RandLoraConfig(r=4, target_modules=["0"])).train()
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        base(torch.randn(2, 64))
    frozen = base[0].randlora_B["default"].untyped_storage().data_ptr()  # type: ignore[index]
    assert sum(t.numel() >= 64 * 64 for at, t in kept.items() if at != frozen) == 1


# -------------------------------------------------------------------- TinyLoRA


@pytest.mark.parametrize(
    ("tying", "groups"), [(0.0, "01234567"), (0.2, "01234555"), (0.5, "00112233"), (0.7, "00001111"), (1.0, "00000000")]
)
def test_tinylora_shares_v_as_peft_does(tying: float, groups: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _model(veneer.TinyLoraConfig(u=3, weight_tying=tying, target_modules=[str(i) for i in range(8)]), Deep())
    shared = {k: p for k, p in model.named_parameters() if "tinylora_v" in k}
    assert set(shared) == {f"base_model.tinylora_v.default.{g}" for g in groups}
    model(torch.randn(2, 6)).sum().backward()
    with torch.no_grad():
        for i, g in enumerate(groups):
            layer = model.get_base_model().layers[i]
            before = layer.get_delta_weight("default")
            for k, p in shared.items():
                p.add_(float(k.endswith(f".{g}")))
            assert not torch.equal(layer.get_delta_weight("default"), before)
            for k, p in shared.items():
                p.sub_(float(k.endswith(f".{g}")))
    model.save_pretrained(tmp_path)
    assert {k for k in load_file(tmp_path / "adapter_model.safetensors") if "_v" in k} == {f"base_model.tinylora_v.{g}" for g in groups}


def test_tinylora_is_its_formula() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 5))
    weights = [base[0].weight.detach().clone(), base[1].weight.detach().clone()]  # type: ignore[union-attr]
    model = _model(veneer.TinyLoraConfig(r=2, u=3, target_modules=["0", "1"]), base)
    for i, (layer, w) in enumerate(zip(base, weights, strict=True)):
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        best = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
        held: Any = layer
        a, b, p = held.tinylora_A["default"], held.tinylora_B["default"], held.tinylora_P["default"]
        torch.testing.assert_close(b @ a, best, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a @ a.T, torch.diag(s[:2]), atol=1e-5, rtol=1e-5)
        drawn = torch.normal(0.0, 1 / 2**0.5, (3, 2, 2), generator=torch.Generator().manual_seed(42 + i))
        torch.testing.assert_close(p, drawn, atol=0, rtol=0)
        mixed = sum(x * m for x, m in zip(model.base_model.tinylora_v["default"].get_parameter(str(i)), p, strict=True))
        torch.testing.assert_close(held.get_delta_weight("default"), b @ mixed @ a, atol=1e-6, rtol=1e-5)


def test_tinylora_drops_what_a_table_looks_up() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(20, 6))
    model = _model(veneer.TinyLoraConfig(u=3, tinylora_dropout=0.5, target_modules=["0"]), base)
    tokens = torch.zeros(4000, dtype=torch.long)
    still = model(tokens)[0].detach()
    frozen = base[0].base_layer(tokens)[0]  # type: ignore[operator]
    drawn = model.train()(tokens).detach()
    assert len(drawn.unique(dim=0)) == 4  # two ranks, there or not
    torch.testing.assert_close(drawn.mean(0) - frozen, still - frozen, atol=0.1 * float((still - frozen).abs().max()), rtol=0)
    merged = model.train().merge_and_unload()
    torch.testing.assert_close(merged(tokens)[0], still)


def test_tinylora_refuses_what_it_cannot_mean() -> None:
    for fields in ({"r": 0}, {"u": 0}, {"weight_tying": 1.5}, {"init_weights": "gaussian"}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            veneer.TinyLoraConfig(**fields)  # type: ignore[arg-type]


# -------------------------------------------------------------------- UniLoRA


def test_unilora_indices_are_pefts() -> None:
    torch.manual_seed(7)
    model = _model(veneer.UniLoraConfig(r=1, theta_d_length=7, target_modules=BOTH), Mlp())
    root = model.get_base_model()
    assert root.lin0.unilora_indices_A["default"].flatten().tolist() == [4, 5, 2, 3, 1, 2, 3, 6, 1, 5, 6, 0]
    assert root.lin1.unilora_indices_A["default"].flatten().tolist() == [5, 1, 4, 3, 2, 0, 4, 1, 6, 0, 0, 5, 1, 5, 3, 2]
    drawn = torch.cat([getattr(m, f"unilora_indices_{x}")["default"].flatten() for m in (root.lin0, root.lin1) for x in "AB"])
    counts = drawn.bincount(minlength=7)
    assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(drawn.long(), veneer.UniLoraModel.generate_index(len(drawn), 7, 42))
    theta = model.base_model.unilora_theta_d["default"]
    entries = theta / counts.sqrt()
    a, b = (entries[getattr(root.lin1, f"unilora_indices_{x}")["default"].long()] for x in "AB")
    torch.testing.assert_close(root.lin1.get_delta_weight("default"), b @ a)


def test_unilora_without_numpy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The text says what to do; a file with indices loads all the same; and nothing has been changed."""
    model, x = _model(CONFIGS["unilora"](save_indices=True)), torch.randn(2, 12)
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "numpy", None)
    base = _base()
    with pytest.raises(ImportError, match="pip install numpy"):
        veneer.get_peft_model(base, CONFIGS["unilora"]())
    assert type(base.lin0) is nn.Linear
    torch.testing.assert_close(veneer.PeftModel.from_pretrained(base, tmp_path)(x), model(x), atol=0, rtol=0)


def test_unilora_draws_are_balanced() -> None:
    for count, length in ((10, 3), (3, 10), (12, 4)):
        counts = balanced(count, length, 0).bincount(minlength=length)
        assert int(counts.sum()) == count
        assert int(counts.max() - counts.min()) <= 1


# -------------------------------------------------------------------- VB-LoRA


def _only_best(folder: Path, **fields: Any) -> Any:
    model = _model(CONFIGS["vblora"](topk=3, save_only_topk_weights=True, **fields))
    model.save_pretrained(folder)
    return model


def test_vblora_is_its_formula() -> None:
    model = _model(CONFIGS["vblora"](topk=3, r=2))
    layer, bank = model.get_base_model().lin0, model.base_model.vblora_vector_bank["default"]

    def piece(logits: Tensor) -> Tensor:
        kept = torch.full_like(logits, float("-inf"))
        best = logits.argsort(descending=True)[:3]
        kept[best] = logits[best]
        return kept.softmax(0) @ bank

    a, b = layer.vblora_logits_A["default"], layer.vblora_logits_B["default"]
    rows = torch.stack([torch.cat([piece(z) for z in row]) for row in a])  # (r, n_in)
    columns = torch.stack([torch.cat([piece(b[i, j]) for i in range(len(b))]) for j in range(2)], 1)  # (n_out, r)
    torch.testing.assert_close(layer.get_delta_weight("default"), columns @ rows, atol=1e-6, rtol=1e-5)


def test_vblora_files_of_the_best_weights_alone(tmp_path: Path) -> None:
    model, x = _only_best(tmp_path), torch.randn(3, 12)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.lin0.vblora_logits_A_topk_indices"].dtype == torch.uint8
    assert tensors["base_model.model.lin0.vblora_logits_A_topk_weights"].shape == (4, 3, 2)
    assert not [k for k in tensors if k.endswith("logits_A")]
    again = veneer.PeftModel.from_pretrained(_base(), tmp_path)
    torch.testing.assert_close(again(x), model(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(again.train()(x), model(x), atol=1e-6, rtol=0)  # it is frozen, so training others is no matter
    torch.testing.assert_close(again.eval().merge_and_unload()(x), model(x), atol=1e-6, rtol=0)
    trainable = veneer.PeftModel.from_pretrained(_base(), tmp_path, is_trainable=True)
    torch.testing.assert_close(trainable.eval()(x), model(x), atol=1e-6, rtol=0)
    with pytest.raises(LoadError, match="save_only_topk_weights=False"):
        trainable.train()(x)


def test_vblora_of_one_vector_a_piece(tmp_path: Path) -> None:
    """With topk 1 no weight is stored: the one there is, is one. Rounding below zero is no NaN."""
    model = _model(CONFIGS["vblora"](topk=1, save_only_topk_weights=True))
    x = torch.randn(3, 12)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(veneer.PeftModel.from_pretrained(_base(), tmp_path)(x), model(x), atol=1e-6, rtol=0)
    config = CONFIGS["vblora"](topk=2, save_only_topk_weights=True)
    at, weights = torch.tensor([[[0, 1]]]), torch.tensor([[[1.0000001]]])
    logits = config.from_file({"vblora_logits_A_topk_indices": at, "vblora_logits_A_topk_weights": weights})["vblora_logits_A"]
    assert not logits.isnan().any()


def test_vblora_counts_what_it_saves(capsys: pytest.CaptureFixture[str]) -> None:
    model = _model(CONFIGS["vblora"](r=2))
    logits = 2 * (12 + 16 + 16 + 8) // 4 * 10
    assert model.base_model.get_nb_savable_parameters() == (logits + 10 * 4, 0)
    best = _model(CONFIGS["vblora"](r=2, save_only_topk_weights=True))
    pieces = logits // 10
    assert best.base_model.get_nb_savable_parameters() == (pieces + pieces * 2 // 4 + 10 * 4, 0)
    best.base_model.print_savable_parameters()
    assert "params to-be-saved" in capsys.readouterr().out


def test_vblora_refuses_layers_that_it_cannot_cut() -> None:
    with pytest.raises(ConfigError, match="divisible"):
        veneer.get_peft_model(_base(), CONFIGS["vblora"](vector_length=5))
    with pytest.raises(ConfigError, match="topk"):
        CONFIGS["vblora"](topk=11)


def test_configs_have_the_fields_of_peft_alone(tmp_path: Path) -> None:
    """What PEFT's class does not know stays out of the file at its default."""
    CONFIGS["vblora"]().save_pretrained(tmp_path)
    assert "init_weights" not in json.loads((tmp_path / "adapter_config.json").read_text())
