"""The starts of LoRA: their mathematics on bare matrices, the data-driven ones on small models, and the engine around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import veneer
from veneer import inits
from veneer.errors import ConfigError, LoadError
from veneer.inits import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, Start
from veneer.inits.base import singular, sketched, split
from veneer.inits.eva import Spectrum, deal
from veneer.inits.loftq import int8, nf4

SHAPES = [(20, 12), (12, 20), (16, 16)]


def matrix(n_out: int, n_in: int) -> Tensor:
    """A random matrix whose singular values fall from 3 to 0.1, evenly: every cut is well defined."""
    k = min(n_out, n_in)
    u, v = torch.linalg.qr(torch.randn(n_out, k))[0], torch.linalg.qr(torch.randn(n_in, k))[0]
    return (u * torch.linspace(3, 0.1, k)) @ v.T


def begin(kind: bool | str, w: Tensor, r: int = 4, scaling: float = 2.0, config: Any = None, context: Any = None, **more: Any) -> Start:
    return inits.start(kind, lambda: w, r, scaling, n_out=w.shape[0], n_in=w.shape[1], config=config, context=context, **more)


def best(w: Tensor, r: int) -> Tensor:
    u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    return ((u[:, :r] * s[:r]) @ v[:r]).float()


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


# ---------------------------------------------------------------- the two decompositions that all share


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("last", [False, True])
def test_singular_triples(shape: tuple[int, int], last: bool) -> None:
    w = matrix(*shape)
    u, s, v = singular(w, 5, last)
    values = torch.linalg.svdvals(w)
    close(s, values[-5:] if last else values[:5])
    close(u.T @ u, torch.eye(5))
    close(v @ v.T, torch.eye(5))
    close(u.T @ w, s.unsqueeze(1) * v)  # they are a triple, signs included


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_triples_of_a_matrix_without_full_rank(shape: tuple[int, int]) -> None:
    w = best(matrix(*shape), 2)
    u, s, v = singular(w, 5)
    close((u * s) @ v, w)
    close(u.T @ u, torch.eye(5))
    close(v @ v.T, torch.eye(5))
    assert float(s[2:].max()) < 1e-5


def test_sketch_finds_the_same_directions_always_and_leaves_the_generator_alone() -> None:
    w = matrix(40, 30)
    state = torch.get_rng_state()
    u, s, v = sketched(w, 4, 16)
    assert torch.equal(torch.get_rng_state(), state)
    close((u * s) @ v, best(w, 4), atol=2e-3)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip((u, s, v), sketched(w, 4, 16), strict=True))
    rough, fine = (float(((x[0] * x[1]) @ x[2] - best(w, 4)).norm()) for x in (sketched(w, 4, 1), sketched(w, 4, 8)))
    assert fine < rough


# ---------------------------------------------------------------- without data


def test_default_start_is_kaiming_and_zero() -> None:
    s = begin(True, torch.zeros(300, 400), r=16)
    bound = 400**-0.5
    assert s.A.abs().max() <= bound and s.A.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not s.B.any() and s.A0 is None


def test_false_starts_with_a_change() -> None:
    s = begin(False, torch.zeros(300, 400), r=16)
    assert (s.B @ s.A).norm() > 0.1
    assert s.B.std() == pytest.approx(16**-0.5 / 3**0.5, rel=0.05)


def test_gaussian_start_has_deviation_one_over_r() -> None:
    s = begin("gaussian", torch.zeros(300, 400), r=16)
    assert s.A.std() == pytest.approx(1 / 16, rel=0.05) and not s.B.any()


@pytest.mark.parametrize("kind", [True, "gaussian", "pissa", "olora", "orthogonal", "corda", "lora_ga", "eva"])
def test_embeddings_start_the_other_way_round(kind: bool | str) -> None:
    s = begin(kind, torch.randn(300, 400), r=16, embedding=True)
    assert not s.A.any() and s.B.std() == pytest.approx(1, rel=0.1) and s.A0 is None


def test_data_free_starts_do_not_read_the_weight() -> None:
    def unread() -> Tensor:
        raise AssertionError("the weight was read")

    for kind in (True, False, "gaussian", "orthogonal", "eva"):
        inits.start(kind, unread, 4, 1.0, n_out=6, n_in=5, config=None)


@pytest.mark.parametrize("r", [2, 6, 16])
def test_orthogonal_start_is_the_identity_with_full_factors(r: int) -> None:
    s = begin("orthogonal", torch.zeros(40, 30), r=r)
    assert (s.B @ s.A).abs().max() < 1e-6
    assert torch.linalg.matrix_rank(s.A) == torch.linalg.matrix_rank(s.B) == r // 2
    assert (s.A.norm(dim=1) > 0).all() and (s.B.norm(dim=0) > 0).all()


# ---------------------------------------------------------------- from the weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaling", [0.25, 2.0, -1.0])
def test_pissa_is_the_best_approximation_of_its_rank(shape: tuple[int, int], scaling: float) -> None:
    w = matrix(*shape)
    s = begin("pissa", w, scaling=scaling)
    close(scaling * s.B @ s.A, best(w, 4))
    close(s.A.norm(dim=1), s.B.norm(dim=0))  # the singular value is shared evenly
    assert s.A0 is not None and s.B0 is not None and torch.equal(s.A0, s.A) and torch.equal(s.B0, s.B)
    assert s.A0.data_ptr() != s.A.data_ptr()


def test_pissa_by_iterations_comes_near() -> None:
    w = matrix(20, 12)
    s = begin("pissa_niter_16", w)
    assert (2 * s.B @ s.A - best(w, 4)).norm() < 1e-2 * w.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["pissa", "olora", "mica", "pissa_niter_2"])
def test_low_precision_weights_are_decomposed_in_float32(dtype: torch.dtype, kind: str) -> None:
    w = matrix(20, 12).to(dtype)
    s = begin(kind, w)
    assert s.A.dtype == s.B.dtype == torch.float32
    close(s.B @ s.A, (t := begin(kind, w.float())).B @ t.A)


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_is_an_orthonormal_basis_times_what_it_sees(shape: tuple[int, int]) -> None:
    w = matrix(*shape)
    s = begin("olora", w)
    close(s.B.T @ s.B, torch.eye(4))
    close(s.B.T @ w, s.A)
    close((s.B @ s.A)[:, :4], w[:, :4])  # the first columns are spanned whole
    assert s.A0 is not None


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_2", "olora", "mica", "loftq"])
def test_weights_that_are_not_finite_have_no_start(kind: str) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    net[1].weight.data[2, 3] = float("nan")
    with pytest.raises(ConfigError, match=f"weight of '1' holds numbers that are not finite, so init_lora_weights='{kind}'"):
        veneer.get_peft_model(net, veneer.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=kind, loftq_config=LoftQConfig()))
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize("shape", SHAPES)
def test_mica_takes_the_directions_that_the_weight_writes_least(shape: tuple[int, int]) -> None:
    w = matrix(*shape)
    s = begin("mica", w)
    close(s.B.T @ s.B, torch.eye(4))
    assert not s.A.any()
    close((w.T @ s.B).norm(dim=0), torch.linalg.svdvals(w)[-4:])


@pytest.mark.parametrize("kind", ["pissa", "olora", "mica", "loftq", "pissa_niter_2"])
def test_more_directions_than_the_weight_has(kind: str) -> None:
    with pytest.raises(ConfigError, match="Lower r"):
        begin(kind, matrix(5, 3), r=4, config=SimpleNamespace(loftq_config=LoftQConfig()))


# ---------------------------------------------------------------- LoftQ


def test_nf4_is_within_half_a_level_of_every_number() -> None:
    even = torch.linspace(-1, 1, 63 * 50).view(50, 63)
    levels = nf4(torch.cat([torch.ones(50, 1), even], 1)).unique()  # each block's largest is 1
    assert len(levels) == 16 and {-1.0, 0.0, 1.0} <= set(levels.tolist())
    w = torch.randn(7, 50)
    q = nf4(w)
    assert torch.equal(nf4(q), q)  # what is on the levels stays
    flat = torch.nn.functional.pad(w.flatten(), (0, -w.numel() % 64)).view(-1, 64)
    top = flat.abs().amax(1, keepdim=True)
    widest = float((levels[1:] - levels[:-1]).max()) / 2
    error = torch.nn.functional.pad((q - w).flatten(), (0, -w.numel() % 64)).view(-1, 64).abs()
    assert (error <= widest * top + 1e-6).all()
    nearest = (flat.unsqueeze(-1) - top.unsqueeze(-1) * levels).abs().amin(-1)
    assert (error <= nearest + 1e-5).all()
    assert not nf4(torch.zeros(3, 5)).any()


def test_int8_is_within_half_a_step() -> None:
    w = torch.randn(30, 50)
    step = w.abs().amax(1, keepdim=True) / 127
    assert ((int8(w) - w).abs() <= step / 2 + 1e-6).all()
    assert not int8(torch.zeros(3, 5)).any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scaling", [0.5, 4.0])
def test_loftq_makes_up_for_what_quantising_lost(bits: int, scaling: float) -> None:
    w, quantise = torch.randn(60, 64), nf4 if bits == 4 else int8

    def after(iterations: int) -> tuple[Start, float]:
        s = begin("loftq", w, r=8, scaling=scaling, config=SimpleNamespace(loftq_config=LoftQConfig(bits, iterations)))
        assert s.base is not None
        return s, float((w - s.base - scaling * s.B @ s.A).norm())

    (first, one), (_, five) = after(1), after(5)
    plain = float((w - quantise(w)).norm())
    assert torch.equal(first.base, quantise(w))  # type: ignore[arg-type]
    assert one < 0.9 * plain and five < one
    close(scaling * first.B @ first.A, best(w - quantise(w), 8))


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_on_what_is_quantised_already_trains(bits: int) -> None:
    base, options = nn.Sequential(nn.Linear(12, 16)), {"r": 4, "target_modules": ["0"], "init_lora_weights": "loftq"}
    for _ in range(2):  # the second time, nothing is lost that the factors could make up for
        model = veneer.get_peft_model(base, veneer.LoraConfig(loftq_config=LoftQConfig(bits), **options))  # type: ignore[arg-type]
        y = model(torch.randn(5, 12))
        y.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert any(g is not None and float(g.norm()) > 1e-3 for g in grads)
        base = model.unload()


@pytest.mark.parametrize("options", [LoftQConfig(2), LoftQConfig(4, 0)])
def test_loftq_refuses_what_it_cannot(options: LoftQConfig) -> None:
    with pytest.raises(ConfigError, match="4 or 8 bits"):
        begin("loftq", matrix(20, 12), config=SimpleNamespace(loftq_config=options))


# ---------------------------------------------------------------- names


def test_unknown_start_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'pissa'"):
        inits.check_kind("pisa")
    for wrong in ("pissa_niter_", "pissa_niter_x", "pissa_niter_[number of iters]", "", 7):
        with pytest.raises(ConfigError, match="Known ones"):
            inits.check_kind(wrong)  # type: ignore[arg-type]
    for number in (1, 0):
        with pytest.raises(ConfigError, match="Known ones"):
            veneer.LoraConfig(init_lora_weights=number)  # type: ignore[arg-type]
    for right in (True, False, "gaussian", "pissa_niter_12", "lora_ga"):
        inits.check_kind(right)


@pytest.mark.parametrize("fields", [{"lora_alpha": 0}, {"alpha_pattern": {"k": 0}}])
def test_a_scaling_of_zero_trains_nothing(fields: dict[str, Any]) -> None:
    for kind in (True, "pissa"):
        with pytest.raises(ConfigError, match=r"'[qk]'.* zero"):
            veneer.get_peft_model(Net(), veneer.LoraConfig(target_modules=["q", "k"], init_lora_weights=kind, **fields))
    veneer.get_peft_model(
        Net(), veneer.LoraConfig(target_modules=["q", "k"], **fields, inference_mode=True)
    )  # an adapter that is switched off


def test_odd_rank_is_refused_by_orthogonal() -> None:
    with pytest.raises(ConfigError, match="even rank, got 3"):
        begin("orthogonal", matrix(20, 12), r=3)


@pytest.mark.parametrize(("kind", "call"), [("corda", "preprocess_corda"), ("lora_ga", "preprocess_loraga")])
def test_starts_from_data_say_what_has_to_be_called(kind: str, call: str) -> None:
    with pytest.raises(ConfigError, match=call):
        begin(kind, matrix(20, 12), config=SimpleNamespace(lora_ga_config=LoraGAConfig()), context=nn.Linear(12, 20))


def test_split_gives_back_the_product() -> None:
    u, s, v = singular(matrix(20, 12), 3)
    a, b = split(u, s, v, -0.5)
    close(-0.5 * b @ a, (u * s) @ v)
    a, b = split(u, s * torch.tensor([1.0, 1, 0]), v, 2.0)
    assert torch.equal(a[2], v[2]) and not b[:, 2].any()  # one of the two trains


# ---------------------------------------------------------------- a small model


class Net(nn.Module):
    """`q` and `k` read the same tensor, `out` another one."""

    def __init__(self, n_in: int = 16, n_mid: int = 20, n_out: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(n_in, n_mid), nn.Linear(n_in, n_mid), nn.Linear(n_mid, n_out)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(torch.tanh(self.q(x) + 0.5 * self.k(input=x))))


NAMES = ["q", "k", "out"]


def batches(n: int = 6, rows: int = 64, mean: float = 2.0, fall: float = 0.7) -> list[dict[str, Tensor]]:
    """Inputs far from the origin, with deviations 3 · fall^i."""
    g = torch.Generator().manual_seed(1)
    return [{"x": mean + torch.randn(rows, 16, generator=g) * 3 * fall ** torch.arange(16)} for _ in range(n)]


def even_batches() -> list[dict[str, Tensor]]:
    """All directions of the inputs matter the same, those behind the tanh do not: so EVA moves ranks there."""
    return batches(30, fall=1.0)


def config(kind: str, r: int = 4, **more: Any) -> veneer.LoraConfig:
    more.setdefault("target_modules", NAMES)
    return veneer.LoraConfig(r=r, lora_alpha=2 * r, init_lora_weights=kind, **more)


def factors(model: Any, name: str) -> tuple[Tensor, Tensor]:
    layer = model.get_base_model().get_submodule(name)
    return layer.leaf("default", "lora_A").detach(), layer.leaf("default", "lora_B").detach()


# ---------------------------------------------------------------- CorDA


def run_over(model: nn.Module, data: list[dict[str, Tensor]]) -> Callable[[], None]:
    def run() -> None:
        for batch in data:
            model(**batch)

    return run


def covariance(data: list[dict[str, Tensor]]) -> Tensor:
    scaled = [b["x"] / b["x"].abs().max() for b in data]
    c = sum((x.T @ x for x in scaled), torch.zeros(16, 16)) / len(scaled)
    return c + 0.01 * c.diagonal().mean() * torch.eye(16)


def weighted(error: Tensor, c: Tensor) -> float:
    return float((error.double() @ c.double()).norm())


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_optimal_as_the_data_see_it(method: str) -> None:
    model, data = Net().eval(), batches()
    w, c = model.q.weight.detach().clone(), covariance(data)
    cfg = config("corda", corda_config=CordaConfig(corda_method=method))  # type: ignore[arg-type]
    inits.preprocess_corda(model, cfg, run_over(model, data))
    s = begin("corda", w, context=model.q)
    part = 2 * s.B @ s.A
    values = torch.linalg.svdvals(w.double() @ c.double())
    if method == "ipm":  # no matrix of this rank leaves less of W C: what is left are the other singular values
        assert weighted(w - part, c) == pytest.approx(float(values[4:].norm()), rel=1e-3)
        assert weighted(w - best(w, 4), c) > 1.01 * weighted(w - part, c)
    else:  # and none means less to the data
        assert weighted(part, c) == pytest.approx(float(values[-4:].norm()), rel=1e-3)
    assert torch.linalg.matrix_rank(part) == 4
    assert torch.equal(model.q.weight, w)


def test_corda_copes_with_a_covariance_without_inverse() -> None:
    model, data = Net().eval(), batches(n=1, rows=3)
    inits.preprocess_corda(model, config("corda"), run_over(model, data))
    s = begin("corda", model.q.weight.detach(), context=model.q)
    assert torch.isfinite(s.A).all() and torch.isfinite(s.B).all()
    c = covariance(data)
    w = model.q.weight.detach()
    assert weighted(w - 2 * s.B @ s.A, c) == pytest.approx(float(torch.linalg.svdvals(w.double() @ c.double())[4:].norm()), rel=1e-3)


def test_corda_model_starts_as_the_identity_and_leaves_the_base_alone() -> None:
    model, data = Net().eval(), batches()
    x, before = data[0]["x"], {n: p.detach().clone() for n, p in model.named_parameters()}
    y = model(x)
    cfg = config("corda")
    inits.preprocess_corda(model, cfg, run_over(model, data))
    assert not any(m._forward_hooks for m in model.modules())
    adapted = veneer.get_peft_model(model, cfg)
    close(adapted(x), y)
    assert all(torch.equal(model.get_submodule(n).base_layer.weight, before[f"{n}.weight"]) for n in NAMES)
    assert factors(adapted, "q")[1].abs().max() > 1e-3


def test_corda_files_take_the_place_of_the_run(tmp_path: Path) -> None:
    def fresh(**options: Any) -> tuple[Net, Any]:
        torch.manual_seed(0)
        return Net().eval(), config("corda", corda_config=CordaConfig(**options))

    paths = {"covariance_file": str(tmp_path / "c" / "cov.pt"), "cache_file": str(tmp_path / "cache.pt")}
    model, cfg = fresh(**paths)
    inits.preprocess_corda(model, cfg, run_over(model, batches()))
    assert set(torch.load(paths["covariance_file"], weights_only=True)) == set(NAMES)
    for field, path in paths.items():
        again, cfg = fresh(**{field: path})
        inits.preprocess_corda(again, cfg)  # no run_model
        for name in NAMES:
            close(again.get_submodule(name).eigens.U_WC, model.get_submodule(name).eigens.U_WC)
            close(again.get_submodule(name).eigens.V_WC, model.get_submodule(name).eigens.V_WC)
    torch.save({"q.eigens.S_WC": torch.ones(4)}, paths["cache_file"])
    again, cfg = fresh(cache_file=paths["cache_file"])
    with pytest.raises(LoadError, match=r"q\.eigens\.U_WC"):
        inits.preprocess_corda(again, cfg)
    assert not hasattr(again.q, "eigens")


def test_corda_files_are_read_as_tensors_only(tmp_path: Path) -> None:
    class Loaded:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"q": Loaded()}, tmp_path / "evil.pt")
    with pytest.raises(LoadError, match="no file of tensors"):
        inits.preprocess_corda(Net(), config("corda", corda_config=CordaConfig(covariance_file=str(tmp_path / "evil.pt"))))
    assert not (tmp_path / "ran").exists()


def test_corda_hooks_a_wrapper_or_a_twin_of_the_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    found = []
    for twin in (False, True):
        torch.manual_seed(0)
        model = Net().eval()
        other: nn.Module = Net().eval() if twin else Wrapper(model)
        if twin:
            other.load_state_dict(model.state_dict())
        inits.preprocess_corda(model, config("corda"), run_over(other if twin else model, batches()), hooked_model=other)
        found.append(begin("corda", model.q.weight, context=model.q))
    close(found[0].B @ found[0].A, found[1].B @ found[1].A)


@pytest.mark.parametrize("half", [False, True])
def test_corda_refuses_data_that_say_nothing(half: bool) -> None:
    cfg = config("corda", corda_config=CordaConfig(use_float16_for_covariance=half))
    model = Net().eval()
    with pytest.raises(ConfigError, match="run_model must be specified"):
        inits.preprocess_corda(model, cfg)
    with pytest.raises(ConfigError, match="never ran 'q'"):
        inits.preprocess_corda(model, cfg, lambda: None)
    with pytest.raises(ConfigError, match="not finite"):
        inits.preprocess_corda(model, cfg, run_over(model, [{"x": torch.full((2, 16), float("nan"))}]))
    with pytest.raises(ConfigError, match="all zero"):
        inits.preprocess_corda(model, cfg, run_over(model, [{"x": torch.zeros(2, 16)}]))
    assert not hasattr(model.q, "eigens") and not any(m._forward_hooks for m in model.modules())


def test_corda_in_float16_is_near() -> None:
    parts = []
    for half in (False, True):
        torch.manual_seed(0)
        model = Net().eval()
        cfg = config("corda", corda_config=CordaConfig(use_float16_for_covariance=half, prune_temporary_fields=not half))
        inits.preprocess_corda(model, cfg, run_over(model, batches()))
        s = begin("corda", model.q.weight, context=model.q)
        parts.append(s.B @ s.A)
        assert hasattr(model.q, "covariance_matrix") is half
    assert (parts[0] - parts[1]).norm() < 0.02 * parts[0].norm()


# ---------------------------------------------------------------- LoRA-GA


def loss_steps(model: nn.Module, data: list[dict[str, Tensor]]) -> Callable[[], None]:
    def step() -> None:
        for batch in data:
            model(**batch).square().mean().backward()

    return step


def mean_gradient(model: Net, data: list[dict[str, Tensor]]) -> Tensor:
    (g,) = torch.autograd.grad(sum(model(**b).square().mean() for b in data) / len(data), [model.q.weight])
    return g


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_takes_the_gradients_directions(direction: Any, scale: Any) -> None:
    model, data = Net().eval(), batches()
    options = LoraGAConfig(direction=direction, scale=scale)
    cfg = config("lora_ga", lora_ga_config=options)
    inits.preprocess_loraga(model, cfg, loss_steps(model, data))
    u, _, v = torch.linalg.svd(mean_gradient(model, data).double(), full_matrices=False)
    w = model.q.weight.detach()
    s = begin("lora_ga", w, config=cfg, context=model.q)
    factor = {
        "stable": 20**0.25 / 16**0.5,
        "weight_svd": float((torch.linalg.svdvals(w)[:4] / 2).sqrt().mean()),
        "gd_scale": 0.5,
        "unit": 1.0,
    }[scale]
    torch.testing.assert_close(s.A @ s.A.T, factor**2 * torch.eye(4), atol=1e-3, rtol=2e-3)
    torch.testing.assert_close(s.B.T @ s.B, factor**2 * torch.eye(4), atol=1e-3, rtol=2e-3)
    to_a = (s.A.double() @ v.T).abs().argmax(1).tolist()
    to_b = (u.T @ s.B.double()).abs().argmax(0).tolist()
    expected = {"ArBr": ([1, 3, 5, 7], [0, 2, 4, 6]), "A2rBr": ([4, 5, 6, 7], [0, 1, 2, 3]), "ArB2r": ([0, 1, 2, 3], [4, 5, 6, 7])}
    if direction == "random":
        assert sorted(to_a + to_b) == list(range(8))
    else:
        assert (to_a, to_b) == expected[direction]
    assert s.A0 is not None and torch.equal(s.A0, s.A)


def test_lora_ga_first_step_follows_the_full_gradient_best() -> None:
    """With ArB2r the first step changes W by the best rank-2r approximation of the full gradient (theorem 3.1 of the paper)."""
    model, data = Net().eval(), batches()
    cfg = config("lora_ga", lora_ga_config=LoraGAConfig(scale="unit"))
    inits.preprocess_loraga(model, cfg, loss_steps(model, data))
    g = mean_gradient(model, data)
    s = begin("lora_ga", model.q.weight, config=cfg, context=model.q)
    first_step = g @ s.A.T @ s.A + s.B @ s.B.T @ g
    torch.testing.assert_close(first_step, best(g, 8), atol=1e-3 * float(g.norm()), rtol=0)


def test_lora_ga_leaves_flags_gradients_and_the_base_as_they_were(tmp_path: Path) -> None:
    model, data = Net().eval(), batches()
    model.k.bias.requires_grad_(False)
    model.q.weight.grad = kept = torch.ones_like(model.q.weight)
    x, before = data[0]["x"], model.q.weight.detach().clone()
    y = model(x)
    cfg, cache = config("lora_ga", lora_ga_config=LoraGAConfig()), str(tmp_path / "g.pt")
    inits.preprocess_loraga(model, cfg, loss_steps(model, data), cache_file=cache)
    assert model.q.weight.grad is kept and model.k.weight.grad is None
    assert not model.k.bias.requires_grad and model.q.bias.requires_grad
    stored = torch.load(cache, weights_only=True)
    close(stored["q._peft_loraga_grad"], mean_gradient(model, data))
    first = begin("lora_ga", before, config=cfg, context=model.q)
    del model.q._peft_loraga_grad
    inits.preprocess_loraga(model, cfg, lambda: None, cache_file=cache)
    assert torch.equal(begin("lora_ga", before, config=cfg, context=model.q).A, first.A)
    adapted = veneer.get_peft_model(model, cfg)
    close(adapted(x), y)
    assert torch.equal(model.q.base_layer.weight, before)  # type: ignore[union-attr]


def test_lora_ga_refuses_silent_steps_and_too_high_ranks() -> None:
    model = Net().eval()
    with pytest.raises(ConfigError, match="'q' and 2 more"):
        inits.preprocess_loraga(model, config("lora_ga", lora_ga_config=LoraGAConfig()), lambda: None)
    assert model.q.bias.requires_grad
    cfg = config("lora_ga", r=4, lora_ga_config=LoraGAConfig())
    inits.preprocess_loraga(model, cfg, loss_steps(model, batches(1)))
    with pytest.raises(ConfigError, match="Run it again"):
        begin("lora_ga", model.q.weight, r=6, config=cfg, context=model.q)
    with pytest.raises(ConfigError, match="Lower r"):
        begin("lora_ga", model.q.weight, r=9, config=cfg, context=model.q)
    with pytest.raises(ConfigError, match="Did you mean 'ArBr'"):
        LoraGAConfig(direction="ArBrr")  # type: ignore[arg-type]


# ---------------------------------------------------------------- EVA: the running decomposition


@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_spectrum_of_all_directions_is_that_of_all_data(mean: float) -> None:
    x = torch.cat([b["x"] for b in batches(5, 30, mean=mean)])
    s = Spectrum(16)
    for part in x.split([7, 1, 30, 64, 48]):
        s.update(part)
    assert s.v is not None and s.s is not None and s.mean is not None
    centred = x - x.mean(0)
    _, values, v = torch.linalg.svd(centred, full_matrices=False)
    close(s.s, values, atol=1e-3)
    close((s.v @ v.T).abs(), torch.eye(16), atol=2e-3)
    close(s.mean, x.mean(0))
    assert s.energy == pytest.approx(float(centred.square().sum()), rel=1e-5)
    assert s.shares() == pytest.approx((values.square() / values.square().sum()).tolist(), rel=1e-3)


def test_cut_spectrum_explains_nearly_what_the_full_one_does() -> None:
    data = [b["x"] for b in batches(8, 32)]
    s = Spectrum(5)
    for part in data:
        s.update(part)
    x = torch.cat(data)
    values = torch.linalg.svdvals(x - x.mean(0)).square()
    true = float(values[:5].sum() / values.sum())
    assert 0.9 < true - 0.01 < sum(s.shares()) <= true + 1e-6


def test_spectrum_settles_on_steady_data_only() -> None:
    data = [b["x"] for b in batches(2, 64)]
    s = Spectrum(3)
    s.update(data[0])
    assert not s.settled(3, 0.0)  # one batch proves nothing
    s.update(data[0])
    assert s.settled(3, 0.999)
    s.update(30 * data[1].flip(1))
    assert not s.settled(3, 0.99)


def test_ranks_go_to_the_largest_shares_within_the_budget() -> None:
    def flat(shares: list[float]) -> Spectrum:
        return Spectrum(len(shares), torch.tensor(shares).sqrt(), torch.eye(len(shares)), energy=1.0)

    spectra = {"steep": flat([0.9, 0.05, 0.01, 0.01]), "even": flat([0.2, 0.2, 0.2, 0.2]), "none": flat([0.001] * 4)}
    assert deal(spectra, {"steep": 2, "even": 2, "none": 2}, 2.0) == {"steep": 2, "even": 4, "none": 0}
    assert deal(spectra, {"steep": 2, "even": 2, "none": 2}, 1.0) == {"steep": 2, "even": 2, "none": 2}


# ---------------------------------------------------------------- EVA on a model

RAW = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}


def eva_model(r: int = 4, eva: EvaConfig | None = None, low_cpu_mem_usage: bool = False, **more: Any) -> Any:
    torch.manual_seed(0)
    return veneer.get_peft_model(Net(), config("eva", r=r, eva_config=eva or EvaConfig(), **more), low_cpu_mem_usage=low_cpu_mem_usage)


def test_eva_finds_the_principal_directions_of_each_layers_inputs() -> None:
    data = batches(30, mean=3.0)
    model = eva_model(eva=EvaConfig(rho=1.0, tau=0.999))
    found = veneer.get_eva_state_dict(model, data, **RAW)
    assert set(found) == {f"base_model.model.{n}" for n in NAMES}
    x = torch.cat([b["x"] for b in data])
    v = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:4]
    a = found["base_model.model.q"]
    assert torch.linalg.svdvals(a @ v.T).min() > 0.99  # the same subspace
    close(a @ a.T, torch.eye(4))
    assert torch.equal(a, found["base_model.model.k"])  # the same input


def test_eva_gives_a_model_its_start_and_its_ranks() -> None:
    data = even_batches()
    model = eva_model(r=3, eva=EvaConfig(rho=2.0))
    x = data[0]["x"]
    model.eval()
    model.get_base_model().drop.train()  # each module's mode is its own
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    veneer.initialize_lora_eva_weights(model, data, **RAW)
    assert model.get_base_model().drop.training and not model.training
    model.eval()
    with model.disable_adapter():
        y = model(x)
    assert torch.equal(model(x), y)  # B is zero
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    cfg = model.peft_config["default"]
    ranks = {n: factors(model, n)[0].shape[0] for n in NAMES}
    assert sum(ranks.values()) == 9 and max(ranks.values()) <= 6
    assert ranks["out"] > ranks["q"]
    for name, r in ranks.items():
        layer = model.get_base_model().get_submodule(name)
        assert cfg.at(name).r == r and layer.leaf("default", "lora_B").shape[1] == r
        assert layer.scaling["default"] == pytest.approx(2.0) and cfg.at(name).scale() == pytest.approx(2.0)
        assert layer.leaf("default", "lora_A").requires_grad
    model(x).square().sum().backward()
    assert all(factors_grad(model, n) > 0 for n in NAMES)


def factors_grad(model: Any, name: str) -> float:
    return float(model.get_base_model().get_submodule(name).leaf("default", "lora_B").grad.norm())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("adjust", [False, True])
def test_eva_keeps_the_scaling_if_asked(adjust: bool, rslora: bool) -> None:
    model = eva_model(r=3, eva=EvaConfig(adjust_scaling_factors=adjust), use_rslora=rslora)
    before = {n: model.get_base_model().get_submodule(n).scaling["default"] for n in NAMES}
    veneer.initialize_lora_eva_weights(model, even_batches(), **RAW)
    after = {n: model.get_base_model().get_submodule(n).scaling["default"] for n in NAMES}
    assert (after == pytest.approx(before)) is adjust
    assert bool(model.peft_config["default"].alpha_pattern) is adjust


def test_eva_fills_an_adapter_that_was_made_without_memory() -> None:
    """`low_cpu_mem_usage`, as PEFT's guide has it; until then the model cannot run, where torch would multiply by noise."""
    model, data = eva_model(r=3, low_cpu_mem_usage=True), even_batches()
    with pytest.raises(veneer.LoadError, match="holds nothing"):
        model(data[0]["x"])
    with model.disable_adapter():
        y = model.eval()(data[0]["x"])
    veneer.initialize_lora_eva_weights(model, data, **RAW)
    assert torch.equal(model.eval()(data[0]["x"]), y)  # B is zero
    assert not any(p.is_meta for p in model.parameters())


def test_eva_whitening_divides_by_the_root_of_the_singular_value() -> None:
    data = batches(1)
    plain, white = (veneer.get_eva_state_dict(eva_model(eva=EvaConfig(rho=1.0, whiten=w)), data, **RAW) for w in (False, True))
    x = data[0]["x"]
    values = torch.linalg.svdvals(x - x.mean(0))[:4]
    close(white["base_model.model.q"] * values.sqrt().unsqueeze(1), plain["base_model.model.q"], atol=1e-4)


def test_eva_start_survives_saving(tmp_path: Path) -> None:
    model, data = eva_model(r=3), even_batches()
    veneer.initialize_lora_eva_weights(model, data, **RAW)
    with torch.no_grad():
        for name in NAMES:
            model.get_base_model().get_submodule(name).leaf("default", "lora_B").normal_()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = veneer.PeftModel.from_pretrained(Net(), tmp_path)
    x = data[0]["x"]
    assert torch.equal(model.eval()(x), again.eval()(x))


class Two(nn.Module):
    """`a` sees four directions only; `deep.a` sees noise in very many, so that none of them explains much."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.deep = nn.Linear(16, 8), nn.Module()
        self.deep.a = nn.Linear(300, 8)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.a(x) + self.deep.a(noise)


def two_batches() -> Iterator[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(2)
    for _ in range(5):
        x = torch.randn(64, 16, generator=g) * torch.tensor([9.0, 8, 7, 6] + [0.01] * 12)
        yield {"x": x, "noise": torch.randn(64, 300, generator=g)}


def test_eva_takes_the_adapter_off_layers_without_a_rank(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = veneer.get_peft_model(Two(), config("eva", r=2, target_modules=["a"]))
    veneer.initialize_lora_eva_weights(model, two_batches(), **RAW)
    cfg = model.peft_config["default"]
    assert cfg.rank_pattern == {"a": 4} and factors(model, "a")[0].shape == (4, 16)
    assert not any("deep" in n and "lora" in n for n, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = veneer.PeftModel.from_pretrained(Two(), tmp_path)  # the name `a` is the end of `deep.a`, and yet only `a` is hit
    assert not any("deep" in n and "lora" in n for n, _ in again.named_parameters())
    assert torch.equal(factors(again, "a")[0], factors(model, "a")[0])


def test_eva_patterns_hold_for_names_that_end_alike() -> None:
    torch.manual_seed(0)
    model = veneer.get_peft_model(Two(), config("eva", r=2, target_modules=["a"]))
    given = {"a": torch.randn(3, 16), "deep.a": torch.randn(2, 300)}
    veneer.initialize_lora_eva_weights(model, eva_state_dict=given, **RAW)
    cfg = model.peft_config["default"]
    assert (cfg.at("a").r, cfg.at("deep.a").r) == (3, 2)
    assert cfg.target_modules in (["a"], {"a"})  # nothing was dropped, so the user's spelling stays
    assert torch.equal(factors(model, "a")[0], given["a"])


def test_eva_state_of_a_bare_model_fits_the_adapted_one() -> None:
    torch.manual_seed(0)
    bare = Net()
    cfg = config("eva", eva_config=EvaConfig())
    found = veneer.get_eva_state_dict(bare, batches(), peft_config=cfg, **RAW)
    assert set(found) == set(NAMES)
    model = eva_model()
    veneer.initialize_lora_eva_weights(model, eva_state_dict=found, **RAW)
    assert all(torch.equal(factors(model, n)[0], found[n]) for n in NAMES)


def test_eva_is_the_same_every_time() -> None:
    one, two = (veneer.get_eva_state_dict(eva_model(), batches(), **RAW) for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_eva_looks_at_the_positions_that_count_only() -> None:
    class Lm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.lin = nn.Embedding(50, 16), nn.Linear(16, 50)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
            return self.lin(self.emb(input_ids))

    model = veneer.get_peft_model(Lm(), config("eva", eva_config=EvaConfig(rho=1.0), target_modules=["lin"]))
    ids = torch.randint(0, 50, (8, 10))
    mask = torch.ones(8, 10, dtype=torch.long)
    mask[:, 7:] = 0
    labels = ids.clone()
    labels[:, :3] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = veneer.get_eva_state_dict(model, [batch], show_progress_bar=False)["base_model.model.lin"]
    x = model.get_base_model().emb(ids[:, 3:7]).reshape(-1, 16).detach()
    v = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:4]
    assert torch.linalg.svdvals(found @ v.T).min() > 0.9999


def test_eva_leaves_trained_rows_of_a_table_alone() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 12))
    model = veneer.get_peft_model(base, config("eva", target_modules=["1"], eva_config=EvaConfig(), trainable_token_indices={"0": [3, 4]}))
    data = [torch.randint(0, 20, (9, 5)) for _ in range(3)]
    veneer.initialize_lora_eva_weights(model, data, forward_fn=lambda m, batch: m(batch), **RAW)
    a, b = factors(model, "1")
    close(a @ a.T, torch.eye(len(a)))
    assert not b.any() and any("trainable_tokens_delta" in n for n, p in model.named_parameters() if p.requires_grad)


def test_eva_refuses_what_cannot_work() -> None:
    model = eva_model()
    with pytest.raises(ConfigError, match="dataloader"):
        veneer.initialize_lora_eva_weights(model)
    with pytest.raises(ConfigError, match="input_ids"):
        veneer.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    with pytest.raises(ConfigError, match="5 rows to 'q'"):
        veneer.initialize_lora_eva_weights(model, batches(1, rows=5), **RAW)
    with pytest.raises(ConfigError, match="never reached 'q'"):
        veneer.initialize_lora_eva_weights(model, [], **RAW)
    with pytest.raises(ConfigError, match="not finite"):
        veneer.initialize_lora_eva_weights(model, [{"x": torch.full((9, 16), float("inf"))}], **RAW)
    good = {n: torch.randn(4, 20 if n == "out" else 16) for n in NAMES}
    for wrong in (good | {"q": torch.randn(4, 5)}, {n: good[n] for n in ("q", "k")}, good | {"r": torch.randn(4, 16)}):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with pytest.raises(ConfigError, match="eva_state_dict"):
            veneer.initialize_lora_eva_weights(model, eva_state_dict=wrong)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(ConfigError, match='init_lora_weights="eva"'):
        veneer.initialize_lora_eva_weights(veneer.get_peft_model(Net(), veneer.LoraConfig(target_modules=NAMES)), batches(), **RAW)
    assert not any(m._forward_hooks for m in model.modules())
    for bad in ({"rho": 0.5}, {"tau": 1.5}):
        with pytest.raises(ConfigError, match="eva_config"):
            EvaConfig(**bad)


# ---------------------------------------------------------------- through the engine


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "orthogonal", "mica"])
def test_models_start_as_the_identity_on_an_untouched_base(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Net().eval()
    x, before = batches(1)[0]["x"], base.q.weight.detach().clone()
    y = base(x)
    model = veneer.get_peft_model(base, config(kind)).eval()
    close(model(x), y)
    assert torch.equal(base.q.base_layer.weight, before)  # type: ignore[union-attr]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in n for n in trained) and any("lora_B" in n for n in trained) is (kind != "mica")
    with torch.no_grad():
        for n in NAMES:
            model.get_base_model().get_submodule(n).leaf("default", "lora_A").add_(0.1)
    changed = model(x)
    assert (changed - y).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = veneer.PeftModel.from_pretrained(Net().eval(), tmp_path).eval()
    close(again(x), changed)


# ---------------------------------------------------------------- LoftQ on a quantised model


class Packed:
    """A codec for weights that lie on the NF4 levels already."""

    plain = False

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def quantised(path: Path) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    base = Net()
    full = {n: p.detach().clone() for n, p in base.state_dict().items()}
    save_file({f"model.{n}": p for n, p in full.items()}, path / "model.safetensors")
    with torch.no_grad():
        for n in NAMES:
            base.get_submodule(n).weight.copy_(nf4(full[f"{n}.weight"]))  # type: ignore[operator]
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=4, lora_alpha=2, target_modules=NAMES))
    for n in NAMES:
        site = base.get_submodule(n).site
        site.codec = Packed(site.codec)  # type: ignore[union-attr]
    return model, full


def test_replacing_for_loftq_makes_up_for_the_quantised_base(tmp_path: Path) -> None:
    model, full = quantised(tmp_path)
    inits.replace_lora_weights_loftq(model, str(tmp_path))
    for n in NAMES:
        a, b = factors(model, n)
        w = full[f"{n}.weight"]
        close(0.5 * b @ a, best(w - nf4(w), 4))


def test_replacing_for_loftq_asks_the_callback(tmp_path: Path) -> None:
    model, _ = quantised(tmp_path)
    before = {n: factors(model, n)[0].clone() for n in NAMES}
    asked = []

    def keep(m: nn.Module, name: str) -> bool:
        assert m is model and factors(model, name)[1].any()
        asked.append(name)
        return name == "k"

    inits.replace_lora_weights_loftq(model, str(tmp_path / "model.safetensors"), callback=keep)
    assert asked == NAMES
    assert [torch.equal(factors(model, n)[0], before[n]) and not factors(model, n)[1].any() for n in NAMES] == [True, False, True]


def test_replacing_for_loftq_refuses_before_it_changes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantised"):
        inits.replace_lora_weights_loftq(eva_model(), str(tmp_path))
    model, full = quantised(tmp_path)
    with pytest.raises(LoadError, match="no safetensors files"):
        inits.replace_lora_weights_loftq(model, str(tmp_path / "nowhere"))
    with pytest.raises(LoadError, match="model_path"):
        inits.replace_lora_weights_loftq(model)
    for wrong in ({n: p for n, p in full.items() if n != "out.weight"}, full | {"out.weight": torch.zeros(3, 3)}):
        save_file(wrong, tmp_path / "model.safetensors")
        with pytest.raises(LoadError, match=r"out\.weight"):
            inits.replace_lora_weights_loftq(model, str(tmp_path))
        assert not any(factors(model, n)[1].any() for n in NAMES)
