"""The fused functions: every gradient against finite differences, and what they keep for the backward against a budget."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.kernels import reference, rowwise
from veneer.kernels.derived import derived_linear
from veneer.kernels.dropout import dropped, survivors
from veneer.kernels.lowrank import lowrank_linear
from veneer.kernels.norms import row_norm_sq
from veneer.kernels.packed import packed_linear


def _tensors(dtype: torch.dtype, rows: int = 5, n_in: int = 7, n_out: int = 6, r: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (2, rows, n_in), "w": (n_out, n_in), "b": (n_out,), "a": (r, n_in), "up": (n_out, r), "gain": (n_out,)}
    return {k: torch.randn(s, dtype=dtype) for k, s in shapes.items()}


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(gained: bool, biased: bool, dropout: float) -> None:
    t = _tensors(torch.float64)
    names = ["x", "a", "up"] + (["b"] if biased else []) + (["gain"] if gained else [])

    def run(*values: Tensor) -> Tensor:
        v = dict(zip(names, values, strict=True))
        return lowrank_linear(
            v["x"], t["w"], v.get("b"), v["a"], v["up"], 1.7, dropout=dropout, gain=v.get("gain"), seed=3 if dropout else None
        )

    assert torch.autograd.gradcheck(run, [t[n].requires_grad_() for n in names])
    assert torch.autograd.gradgradcheck(run, [t[n] for n in names])


def test_a_scale_that_is_a_tensor_is_the_number() -> None:
    """As in a model that is prepared for hot-swapping."""
    grads = []
    for scale in (1.7, torch.tensor(1.7, dtype=torch.float64)):
        t = _tensors(torch.float64)
        leaves = [t[n].requires_grad_() for n in ("x", "a", "up", "gain")]
        y = lowrank_linear(t["x"], t["w"], t["b"], t["a"], t["up"], scale, gain=t["gain"])
        grads.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
        with torch.no_grad():
            grads[-1].append(lowrank_linear(t["x"], t["w"], t["b"], t["a"], t["up"], scale, gain=t["gain"]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 64)])
def test_odd_sizes_equal_the_reference(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows, n_in = shape
    t = {k: v.to(dtype) for k, v in _tensors(torch.float32, rows, n_in, n_out=3, r=1).items()}
    a, up = t["a"].float(), t["up"].float()  # master weights in float32, whatever the input's dtype
    for gain in (None, t["gain"]):
        got = lowrank_linear(t["x"], t["w"], t["b"], a, up, 0.5, gain=gain)
        want = reference.lowrank_linear(t["x"], t["w"], t["b"], a, up, 0.5, gain=gain)
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, atol=5e-2 if dtype == torch.bfloat16 else 1e-5, rtol=2e-2)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
def test_a_few_rows_are_no_less_exact_where_the_adapter_has_fewer_bits_than_the_base(config: Any) -> None:
    torch.manual_seed(0)
    model = veneer.get_peft_model(nn.Sequential(nn.Linear(64, 64)), veneer.LoraConfig(r=8, target_modules=["0"], **config)).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data = (p + torch.randn_like(p) * 0.3).bfloat16()
    x, exact = torch.randn(3, 64), copy.deepcopy(model).double()
    want = exact(x.double())
    with torch.no_grad():
        again = model(x), model(x)  # the second is answered from the first
        mixed = model(x, adapter_names=["default", "__base__", "default"])[::2]
    for got, expected in ((again[0], want), (again[1], want), (mixed, want[::2])):
        assert got.dtype == torch.float32
        assert (got - expected).abs().max() < 2e-6 * want.abs().max()


GAINS: dict[str, Any] = {
    "ia3_l": veneer.IA3Config(feedforward_modules=[]),
    "lora_magnitude_vector": veneer.LoraConfig(use_dora=True),
    "boft_s": veneer.BOFTConfig(),
    "road_alpha": veneer.RoadConfig(variant="road_2"),
    "glora_A": veneer.GloraConfig(config_A_B="vector"),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", GAINS)
def test_gains_near_one_survive_in_bfloat16(name: str, grad: bool) -> None:
    """The scaled output is rounded, once, and not what it is scaled by, though 1.003 is 1 in bfloat16."""
    torch.manual_seed(0)
    config = copy.deepcopy(GAINS[name])
    config.target_modules = ["0"]
    base = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    model, x = veneer.get_peft_model(base, config).eval(), torch.randn(50, 64, dtype=torch.bfloat16)
    with torch.set_grad_enabled(grad):
        before = model(x).detach().double()
        with torch.no_grad():
            for n, p in model.named_parameters():
                if name in n:
                    p.add_(0.003 * (1 if name != "lora_magnitude_vector" else p))
        after = model(x).detach()
    expected = (before * 1.003).bfloat16()
    assert (expected != before).double().mean() > 0.2
    assert (after == expected).double().mean() > 0.99


def test_dropout_is_that_of_a_mask_and_keeps_the_mean() -> None:
    t = _tensors(torch.float32)
    one = lowrank_linear(t["x"], t["w"], None, t["a"], t["up"], 1.0, dropout=0.5, seed=1)
    again = lowrank_linear(t["x"], t["w"], None, t["a"], t["up"], 1.0, dropout=0.5, seed=1)
    other = lowrank_linear(t["x"], t["w"], None, t["a"], t["up"], 1.0, dropout=0.5, seed=2)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    many = torch.stack([lowrank_linear(t["x"], t["w"], None, t["a"], t["up"], 1.0, dropout=0.5, seed=i) for i in range(2000)]).mean(0)
    whole = lowrank_linear(t["x"], t["w"], None, t["a"], t["up"], 1.0)
    assert (many - whole).abs().max() < 0.15 * whole.abs().max()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.003])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (1000, 1000)])
def test_a_mask_drops_entries_at_its_rate_each_by_itself(rate: float, shape: tuple[int, int]) -> None:
    x = torch.ones(shape)
    many = shape[0] * shape[1]
    kept = torch.stack([survivors(x, rate, seed).flatten() for seed in range(max(1, 4000 // many))])
    assert set(kept.unique().tolist()) <= {0, 1}
    off = kept - (1 - rate)
    assert abs(off.mean()) < 5 * (rate * (1 - rate) / kept.numel()) ** 0.5
    if many > 1000:
        for far in (1, 2, shape[1], many // 2 - 1, many // 2, many // 2 + 1):
            assert abs((off[0, far:] * off[0, :-far]).mean()) < 0.008 * rate * (1 - rate), far


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
def test_tokens_share_random_numbers_and_no_one_can_tell(rate: float) -> None:
    square, n = 32, 2048
    off = (survivors(torch.ones(square * square, n), rate, 7) - (1 - rate)).view(square, square, n)
    one = (rate * (1 - rate)) ** 0.5
    bound = 5 / n**0.5  # a mean of n products of independent unit numbers, five times its deviation

    def together(*corners: Tensor) -> float:
        return float((torch.stack(corners) / one).prod(0).mean().abs())

    def most(*corners: Tensor) -> float:
        return float((torch.stack(corners) / one).prod(0).mean(-1).abs().max())

    # tokens of a row, of a column and of neither, rows and columns of the square apart, and the corners of a rectangle, of which each is a function of three
    assert most(off[:, :-1], off[:, 1:]) < bound * 1.2
    assert most(off[:-1], off[1:]) < bound * 1.2
    assert most(off[:-1, :-1], off[1:, 1:]) < bound * 1.2
    assert together(off[:-1, :-1], off[:-1, 1:], off[1:, :-1]) < 0.02
    assert together(off[:-1, :-1], off[:-1, 1:], off[1:, :-1], off[1:, 1:]) < 0.02
    # how many tokens keep a feature varies as in as many throws
    counts = off.sum((0, 1)) / square / one
    assert abs(float(counts.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float(counts.pow(4).mean() / counts.var() ** 2) - 3) < 5 * (24 / n) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropped_is_the_input_scaled_or_nothing_and_its_gradient_too(dtype: torch.dtype) -> None:
    x = torch.randn(3, 50, 7, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.manual_seed(3)
    y = dropped(x, 0.3)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, x / 0.7, 0), rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    torch.testing.assert_close(grad, kept / torch.tensor(0.7, dtype=dtype), rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert 0.6 < float(kept.double().mean()) < 0.8
    assert not torch.equal(y, dropped(x, 0.3))
    torch.manual_seed(3)
    assert torch.equal(y, dropped(x, 0.3))


def test_dropout_follows_the_global_seed() -> None:
    t = _tensors(torch.float32)
    torch.manual_seed(5)
    one = lowrank_linear(t["x"], t["w"], None, t["a"], t["up"], 1.0, dropout=0.5)
    torch.manual_seed(5)
    assert torch.equal(one, lowrank_linear(t["x"], t["w"], None, t["a"], t["up"], 1.0, dropout=0.5))
    assert not torch.equal(one, lowrank_linear(t["x"], t["w"], None, t["a"], t["up"], 1.0, dropout=0.5))


def _saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storages that autograd keeps for the backward, parameters of the model aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(kept.values())


class _Three(nn.Module):
    """Three projections that read the same x."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(n, n, bias=False, dtype=dtype) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.q(x) + self.k(x) + self.v(x)
        return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_lora_layer_keeps_its_input_once_and_the_thin_product(dtype: torch.dtype, dropout: float) -> None:
    """The budget: x, shared by all that read it, and h = x Aᵀ of each. Full fine-tuning keeps x too; PEFT a float32 copy per layer."""
    n, rows, r = 256, 64, 8
    config = veneer.LoraConfig(r=r, lora_dropout=dropout, target_modules=["q", "k", "v"])
    model = veneer.get_peft_model(_Three(n, dtype), config).train()
    x = torch.randn(rows, n, dtype=dtype, requires_grad=True)
    width = x.element_size()
    assert _saved_bytes(model, x) == rows * n * width + 3 * rows * r * width


def test_dora_keeps_one_output_more_for_its_magnitude() -> None:
    n, rows, r = 256, 64, 8
    config = veneer.LoraConfig(r=r, use_dora=True, target_modules=["q", "k", "v"])
    model = veneer.get_peft_model(_Three(n, torch.float32), config).train()
    x = torch.randn(rows, n, requires_grad=True)
    small = 3 * 4 * (n * 8)  # the magnitude's own small terms
    assert _saved_bytes(model, x) <= 4 * (rows * n + 3 * rows * r + 3 * rows * n) + small


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_row_norms_without_forming_the_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w, a, up = torch.randn(40, 30, dtype=dtype), torch.randn(4, 30), torch.randn(40, 4)
    torch.testing.assert_close(row_norm_sq(w, a, up, 0.3), reference.row_norm_sq(w, a, up, 0.3), rtol=2e-5, atol=1e-5)


def test_no_weight_sized_tensor_is_made_in_a_step() -> None:
    """Neither forward nor backward of a LoRA layer allocates anything of the weight's size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not func.is_view:
                self.largest = max(self.largest, out.numel())
            return out

    model = veneer.get_peft_model(nn.Sequential(nn.Linear(512, 512)), veneer.LoraConfig(r=4, target_modules=["0"])).train()
    x = torch.randn(16, 512)
    with Sizes() as sizes:
        model(x).sum().backward()
    assert sizes.largest == 16 * 512


def _made(a: Tensor, up: Tensor) -> Tensor:
    return torch.tanh(up @ a)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("biased", [False, True])
def test_a_derived_matrix_has_the_gradients_of_finite_differences(biased: bool, wide: bool) -> None:
    """Added to W for one product, and, for a W of fewer bits, with a product of its own."""
    t = _tensors(torch.float64)
    w = t["w"] if wide else t["w"].float()
    names = ["x", "a", "up"] + ["b"] * biased
    if wide:

        def run(*values: Tensor) -> Tensor:
            v = dict(zip(names, values, strict=True))
            return derived_linear(v["x"], w, v.get("b"), _made, (v["a"], v["up"]))

        assert torch.autograd.gradcheck(run, [t[n].requires_grad_() for n in names])
        assert torch.autograd.gradgradcheck(run, [t[n] for n in names])
    t = {k: v.detach().float() if k in "xb" else v.detach().requires_grad_() for k, v in t.items()}
    t["x"].requires_grad_()
    results = []
    for linear in (derived_linear, reference.derived_linear):
        y = linear(t["x"], w.float(), t["b"] if biased else None, _made, (t["a"], t["up"]))
        results.append([y, *torch.autograd.grad(y.square().sum(), [t["x"], t["a"], t["up"]])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_part_without_gradient_gets_none_and_none_is_needed() -> None:
    t = _tensors(torch.float32)
    up = t["up"].requires_grad_()
    derived_linear(t["x"], t["w"], t["b"], _made, (t["a"], up)).sum().backward()
    assert up.grad is not None and t["a"].grad is None and t["x"].grad is None
    with torch.no_grad():
        torch.testing.assert_close(
            derived_linear(t["x"], t["w"], t["b"], _made, (t["a"], up)),
            reference.derived_linear(t["x"], t["w"], t["b"], _made, (t["a"], up)),
        )


@pytest.mark.parametrize("config", [
    veneer.LoHaConfig(r=4), veneer.HiraConfig(r=4), veneer.C3AConfig(block_size=32), veneer.FourierFTConfig(n_frequency=50),
    veneer.WaveFTConfig(n_frequency=50), veneer.MissConfig(r=8, init_weights="bat"),
], ids=lambda c: type(c).__name__)  # fmt: skip
def test_a_dense_change_is_not_kept(config: Any) -> None:
    """Between forward and backward there is nothing of the weight's size but the weight."""
    config.target_modules = {"lin"}
    model = veneer.get_peft_model(nn.ModuleDict({"lin": nn.Linear(256, 256)}), config)
    lin, kept = model.get_base_model().lin, {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.numel() if t.data_ptr() != lin.base_layer.weight.data_ptr() else 0
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lin(torch.randn(16, 256))
    assert sum(kept.values()) < 256 * 256 / 4


@pytest.mark.parametrize("shape", [(4, 7, 6, 6), (4, 5, 9, 5)])
def test_high_ranks_and_many_tokens_form_the_change(shape: tuple[int, int, int, int]) -> None:
    """Another order of products, the same value and gradients; nothing of the tokens' size but x is kept."""
    rows, n_in, n_out, r = shape
    t = {k: v.requires_grad_(k != "w") for k, v in _tensors(torch.float64, 10 * rows, n_in, n_out, r).items()}

    def run(x: Tensor, b: Tensor, a: Tensor, up: Tensor) -> Tensor:
        return lowrank_linear(x, t["w"], b, a, up, 1.7)

    given = (t["x"], t["b"], t["a"], t["up"])
    y = run(*given)
    assert _kept_sizes(lambda: run(*given)) == []
    assert torch.autograd.gradcheck(run, given)
    torch.testing.assert_close(y, reference.lowrank_linear(t["x"], t["w"], t["b"], t["a"], t["up"], 1.7))
    low = {k: v.detach().bfloat16() for k, v in t.items()}
    got = lowrank_linear(low["x"], low["w"], low["b"], low["a"], low["up"], 1e-3)
    torch.testing.assert_close(got, reference.lowrank_linear(low["x"], low["w"], low["b"], low["a"], low["up"], 1e-3), atol=5e-2, rtol=2e-2)


def _kept_sizes(run: Callable[[], Tensor]) -> list[int]:
    """The sizes of what is kept for the backward, beside leaves."""
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if not t.is_leaf:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return kept


@pytest.mark.parametrize("grad", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("owner", [[0, 0, 1, 1], [1, 0, 1, 0], [0, -1, 2, 0], [-1, -1, 2, -1], [-1] * 4, [2, 2, 2, 2]], ids=str)
@pytest.mark.parametrize("scales", [(2.0, 2.0, 2.0), (2.0, 0.5, -1.0)], ids=["one scale", "scales"])
def test_rows_with_adapters_of_their_own(owner: list[int], scales: tuple[float, ...], grad: bool) -> None:
    """In value and in every gradient, whatever the shares, the order and the ranks."""
    torch.manual_seed(0)
    factors = [
        (torch.randn(r, 6).requires_grad_(grad), torch.randn(5, r).requires_grad_(grad), s) for r, s in zip((2, 3, 2), scales, strict=True)
    ]
    leaves = [t for a, b, _ in factors for t in (a, b)]
    y, x = torch.randn(4, 3, 5), torch.randn(4, 3, 6).requires_grad_(grad)
    want = reference.add_rowwise(y, x, factors, owner)
    got = rowwise.add_rowwise(y.clone(), x, factors, owner)
    torch.testing.assert_close(got, want)
    if grad and max(owner) >= 0:
        probe = torch.randn_like(want)
        wanted = torch.autograd.grad(want, [x, *leaves], probe, allow_unused=True)
        for g, w in zip(torch.autograd.grad(got, [x, *leaves], probe, allow_unused=True), wanted, strict=True):
            assert (g is None) == (w is None)
            if w is not None:
                torch.testing.assert_close(g, w)


def test_a_packed_weight_s_gradients_have_gradients() -> None:
    t = _tensors(torch.float64)

    class Held:
        def times(self, x: Tensor) -> Tensor:
            return x @ t["w"].mT

        def whole(self, dtype: torch.dtype) -> Tensor:
            return t["w"].to(dtype)

    def run(x: Tensor, a: Tensor, up: Tensor) -> Tensor:
        return lowrank_linear(x, Held(), None, a, up, 1.7) + packed_linear(x.square(), Held())

    given = [t[n].requires_grad_() for n in ("x", "a", "up")]
    assert torch.autograd.gradcheck(run, given) and torch.autograd.gradgradcheck(run, given)
