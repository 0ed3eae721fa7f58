"""BOFT, LoKr, MiSS, WaveFT, GraLoRA and DEFT against dense formulas of their own, and their operations against what they stand for."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import veneer as V
from veneer.errors import ConfigError, PeftWarning
from veneer.methods.lokr import factorization
from veneer.methods.waveft import taps
from veneer.ops import BlockDiag, Deflated, Diag, Kron, Op, Product, Rows, Shuffle, Tiled

from .one_layer import adapted, frozen, leaf, rand, weight

GEO = Rows()


# ---------------------------------------------------------------------------------------------------------------------- the operations


OPS: dict[str, Op] = {
    **{f"kron{s}": Kron(rand(*s[:2]), rand(*s[2:], seed=1)) for s in ((2, 3, 4, 5), (6, 2, 2, 7), (1, 4, 5, 3), (5, 1, 1, 6))},
    "kron of low rank": Kron(rand(2, 3), rand(4, 2, seed=1), rand(2, 5, seed=2)),
    "tiled": Tiled(rand(4, 6), 6, 12),
    "tiled, ragged": Tiled(rand(5, 6), 6, 12),
    "tiled both ways": Tiled(rand(5, 2), 6, 12),
    "swap": Shuffle(2, 3, 2, 24, rand(1)),
    "swap of all": Shuffle(4, 3, 2, 24, rand(1)),
    "blocks": BlockDiag(rand(3, 2, 4)),
    "deflated": Deflated(rand(8, 2), rand(2, 8, seed=1)),
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_op_is_its_matrix(op: Op) -> None:
    m = op.dense()
    x, y = rand(3, 5, m.shape[1]), rand(3, 5, m.shape[0], seed=3)
    torch.testing.assert_close(op.rows(x, GEO), x @ m.T)
    torch.testing.assert_close(op.add_to(y, x, GEO), y + x @ m.T)
    torch.testing.assert_close(op.left(x[0].T), m @ x[0].T)
    torch.testing.assert_close(op.right(y[0]), y[0] @ m)
    assert op.rows(x.float(), GEO).dtype == torch.float32


def test_swap_exchanges_two_axes() -> None:
    x = rand(2, 24)
    torch.testing.assert_close(Shuffle(3, 4, 2, 24, x).rows(x, GEO), x.view(2, 3, 4, 2).transpose(1, 2).reshape(2, 24))
    turn = Product([Shuffle(4, 3, 2, 24, x), Shuffle(3, 4, 2, 24, x)])
    torch.testing.assert_close(turn.dense(), torch.eye(24, dtype=torch.float64))


def test_right_of_a_grouped_weight_is_that_of_the_whole() -> None:
    w = rand(6, 4)  # two groups of 4 inputs and 3 outputs
    whole = torch.block_diag(w[:3], w[3:])
    for op in (BlockDiag(rand(4, 2, 2), groups=2), BlockDiag(rand(1, 2, 2), 4, groups=2), Diag(rand(8), groups=2)):
        got = op.right(w)
        torch.testing.assert_close(torch.block_diag(got[:3], got[3:]), whole @ op.dense())


def test_kron_costs_less_than_its_matrix() -> None:
    """The order of the two products is the cheaper one, and the Kronecker product is never formed."""
    x = torch.randn(10, 4 * 6)
    for l, m, k, n in ((2, 4, 3, 6), (8, 4, 3, 6), (2, 4, 12, 6)):  # noqa: E741
        with FlopCounterMode(display=False) as flops:
            Kron(torch.randn(l, m), torch.randn(k, n)).rows(x, GEO)
        assert flops.get_total_flops() == 2 * 10 * min(m * n * k + l * m * k, l * m * n + l * n * k)
    with FlopCounterMode(display=False) as flops:
        Kron(torch.randn(2, 4), torch.randn(3, 1), torch.randn(1, 6)).rows(x, GEO)
    assert flops.get_total_flops() == 2 * 10 * (4 * 6 + 2 * 4 + 2 * 3)


# ---------------------------------------------------------------------------------------------------------------------------- BOFT


def butterfly(r: Tensor) -> Tensor:
    """B_m … B₁ from its definition: permutation matrices, block-diagonal ones, exact Cayley."""
    m, count, b, _ = r.shape
    n, eye = count * b, torch.eye(b, dtype=r.dtype)
    out = torch.eye(n, dtype=r.dtype)
    for k in range(m):
        s = (r[k] - r[k].mT) / 2
        turns = torch.block_diag(*[(eye - q) @ torch.linalg.inv(eye + q) for q in s])
        pieces = torch.arange(n).view(-1, b // 2) if k else torch.arange(n).view(-1, b)
        runs = pieces.view(-1, 2 * 2**k, b // 2) if k else pieces.unsqueeze(1)
        order = torch.cat([runs[:, 0::2], runs[:, 1::2]], 1).flatten() if k else torch.arange(n)
        p = torch.eye(n, dtype=r.dtype)[order]
        out = p @ turns @ p.T @ out
    return out


@pytest.mark.parametrize("fields", [{"boft_block_size": 4}, {"boft_block_size": 4, "boft_n_butterfly_factor": 2}])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_boft(fields: dict[str, int], m: int) -> None:
    _, layer = adapted(V.BOFTConfig(**{**fields, "boft_n_butterfly_factor": m}), 32, 8)
    r = butterfly(leaf(layer, "boft_R"))
    torch.testing.assert_close(r @ r.T, torch.eye(32, dtype=torch.float64))
    torch.testing.assert_close(weight(layer), leaf(layer, "boft_s") * (frozen(layer) @ r.T))
    torch.testing.assert_close(layer(torch.zeros(1, 32, dtype=torch.float64))[0], layer.base_layer.bias)  # which is not scaled


def test_boft_numbers_of_blocks_and_convolutions() -> None:
    _, layer = adapted(V.BOFTConfig(boft_block_size=0, boft_block_num=6, boft_n_butterfly_factor=2), 4, 8, conv=True)
    assert leaf(layer, "boft_R").shape == (2, 6, 6, 6)
    assert leaf(layer, "boft_s").shape == (1, 8)
    x = rand(2, 4, 5, 5)
    w = leaf(layer, "boft_s").T * (frozen(layer) @ butterfly(leaf(layer, "boft_R")).T)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, w.view(8, 4, 3, 3), layer.base_layer.bias))


def test_boft_reads_a_file_of_one_factor_as_what_it_is(tmp_path: Any) -> None:
    """PEFT without CUDA makes one factor, and writes the number that was asked for into the config."""
    one, layer = adapted(V.BOFTConfig(boft_block_size=4), 16)
    one.peft_config["default"].boft_n_butterfly_factor = 2
    one.save_pretrained(tmp_path)
    torch.manual_seed(0)
    two = V.PeftModel.from_pretrained(nn.ModuleDict({"lin": nn.Linear(16, 8)}).double(), tmp_path).get_base_model().lin
    assert leaf(two, "boft_R").shape == (2, 4, 4, 4)
    torch.testing.assert_close(weight(two), weight(layer), atol=1e-6, rtol=0)


def test_boft_refuses_what_makes_no_butterfly() -> None:
    for fields, text in (
        ({"boft_block_size": 5}, "boft_block_size.*does not divide the 12"),
        ({"boft_block_size": 0, "boft_block_num": 7}, "boft_block_num.*does not divide"),
        ({"boft_block_size": 4, "boft_n_butterfly_factor": 2}, "3 blocks of 4.*no butterfly of 2"),
        ({"boft_block_size": 3, "boft_n_butterfly_factor": 2}, "4 blocks of 3.*no butterfly of 2"),
    ):
        with pytest.raises(ConfigError, match=text):
            adapted(V.BOFTConfig(**fields))  # type: ignore[arg-type]
    for fields in ({"boft_block_num": 3}, {"boft_block_size": 0}, {"boft_n_butterfly_factor": 0}):
        with pytest.raises(ConfigError):
            V.BOFTConfig(**fields)
    with pytest.raises(ConfigError, match="groups"):
        adapted(V.BOFTConfig(), 8, conv=True, groups=2)


# ---------------------------------------------------------------------------------------------------------------------------- LoKr


def test_factorization() -> None:
    for n in range(1, 130):
        pairs = [(m, n // m) for m in range(1, n + 1) if n % m == 0 and m * m <= n]
        assert factorization(n) == pairs[-1]
        for factor in range(1, 20):
            wanted = (factor, n // factor) if n % factor == 0 else [p for p in pairs if p[0] <= factor][-1]
            assert factorization(n, factor) == wanted
    assert (factorization(256), factorization(128, 4), factorization(127)) == ((16, 16), (4, 32), (1, 127))


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"r": 4}, {"w1": (4, 4), "w2": (5, 6)}),
        ({"r": 1}, {"w1": (4, 4), "w2_a": (5, 1), "w2_b": (1, 6)}),
        ({"r": 1, "decompose_both": True}, {"w1_a": (4, 1), "w1_b": (1, 4), "w2_a": (5, 1), "w2_b": (1, 6)}),
        ({"r": 1, "decompose_factor": 2}, {"w1": (2, 2), "w2_a": (10, 1), "w2_b": (1, 12)}),
    ],
)
def test_lokr(fields: dict[str, Any], names: dict[str, tuple[int, ...]]) -> None:
    _, layer = adapted(V.LoKrConfig(alpha=3, **fields), 24, 20)
    p = {k.removeprefix("lokr_"): leaf(layer, k) for k in layer.attached["default"].leaves}
    assert {k: tuple(t.shape) for k, t in p.items()} == names
    w1 = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
    w2 = p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"]
    torch.testing.assert_close(weight(layer), frozen(layer) + 3 / fields["r"] * torch.kron(w1, w2))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tucker", [False, True])
def test_lokr_of_a_convolution(tucker: bool, groups: int) -> None:
    _, layer = adapted(V.LoKrConfig(r=1, alpha=2, use_effective_conv2d=tucker), 12, 8, conv=True, groups=groups)
    w1, a, b = (leaf(layer, f"lokr_{k}") for k in ("w1", "w2_a", "w2_b"))
    channels = 12 // groups
    w2 = torch.einsum("ijhw,ip,jq->pqhw", leaf(layer, "lokr_t2"), a, b) if tucker else (a @ b).view(4, -1, 3, 3)
    d = torch.einsum("ac,bdhw->abcdhw", w1, w2).reshape(8, channels, 3, 3)
    x = rand(2, 12, 5, 5)
    w = frozen(layer).view(8, channels, 3, 3) + 2 * d
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, w, layer.base_layer.bias, groups=groups))


def test_lokr_starts() -> None:
    zeros = {True: "lokr_w1", "lycoris": "lokr_w2_b"}
    for kind, zero in zeros.items():
        _, layer = adapted(V.LoKrConfig(r=1, init_weights=kind), 24, 20, moved=0)
        assert {n for n in layer.attached["default"].leaves if not leaf(layer, n).any()} == {zero}
    _, layer = adapted(V.LoKrConfig(r=1, init_weights=False), 24, 20, moved=0)
    assert all(leaf(layer, n).all() for n in layer.attached["default"].leaves)
    with pytest.raises(ConfigError, match="lycoris"):
        V.LoKrConfig(init_weights="lykoris")


# ---------------------------------------------------------------------------------------------------------------------------- MiSS


@pytest.mark.parametrize("r", [1, 4, 5, 12])
@pytest.mark.parametrize("mini_r", [0, 2, 8])
def test_miss(r: int, mini_r: int) -> None:
    _, layer = adapted(V.MissConfig(r=r, mini_r=mini_r or 1, init_weights="mini" if mini_r else True))
    m = leaf(layer, "miss_block")
    assert m.shape == (r, mini_r or 8)
    d = torch.stack([torch.stack([m[j % r, i % m.shape[1]] for j in range(12)]) for i in range(8)])
    torch.testing.assert_close(weight(layer), frozen(layer) + d)


def test_miss_bat() -> None:
    _, layer = adapted(V.MissConfig(r=4, init_weights="bat"))
    m, w = leaf(layer, "miss_block"), frozen(layer)
    assert m.shape == (2, 4, 4)
    wanted = w.clone()
    for a, c in itertools.product(range(2), range(3)):
        block = w[4 * a : 4 * a + 4, 4 * c : 4 * c + 4]
        wanted[4 * a : 4 * a + 4, 4 * c : 4 * c + 4] = block + block @ m[a] + m[a]
    torch.testing.assert_close(weight(layer), wanted)


def test_miss_refuses_what_does_not_divide() -> None:
    for fields, text in (
        ({"r": 13}, "more than the 12"), ({"r": 5, "init_weights": "bat"}, "bat"), ({"r": 4, "mini_r": 3, "init_weights": "mini"}, "mini_r=3"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            adapted(V.MissConfig(**fields))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'bat', 'mini'"):
        V.MissConfig(init_weights="bet")


# -------------------------------------------------------------------------------------------------------------------------- WaveFT


@pytest.mark.parametrize("wavelet", ["db1", "db2", "db38", "sym4", "coif1", "coif17"])
@pytest.mark.parametrize(("n_in", "n_out"), [(12, 8), (13, 7)])
def test_waveft_is_the_inverse_wavelet_transform(wavelet: str, n_in: int, n_out: int) -> None:
    import pywt

    _, layer = adapted(V.WaveFTConfig(n_frequency=20, scaling=3.0, wavelet_family=wavelet), n_in, n_out, moved=1.0)
    places = torch.randperm(n_in * n_out, generator=torch.Generator().manual_seed(777))[:20]
    length = pywt.Wavelet(wavelet).rec_len
    h, w = (n + length - 2 + n % 2 for n in (n_out, n_in))
    s = np.zeros((h, w))
    s[places // n_in + (h - n_out) // 2, places % n_in + (w - n_in) // 2] = leaf(layer, "waveft_spectrum")
    quarters = s[: h // 2, : w // 2], (s[: h // 2, w // 2 :], s[h // 2 :, : w // 2], s[h // 2 :, w // 2 :])
    d = torch.from_numpy(pywt.idwt2(quarters, wavelet, mode="zero"))[:n_out, :n_in]
    torch.testing.assert_close(weight(layer), frozen(layer) + 3 * d)


def test_waveft_without_the_transform_is_sparse() -> None:
    _, layer = adapted(V.WaveFTConfig(n_frequency=20, scaling=3.0, use_idwt=False))
    d = weight(layer) - frozen(layer)
    places = torch.randperm(96, generator=torch.Generator().manual_seed(777))[:20]
    torch.testing.assert_close(d.flatten()[places], 3 * leaf(layer, "waveft_spectrum"))
    assert int((d.abs() > 1e-12).sum()) == 20


def test_waveft_shares_out_in_proportion() -> None:
    model = nn.ModuleDict({"a": nn.Linear(10, 10), "b": nn.Linear(10, 30), "c": nn.Linear(2, 1)})
    config = V.WaveFTConfig(target_modules=["a", "b", "c"], n_frequency=50, proportional_parameters=True, n_frequency_pattern={"c": 9})
    layers = dict(V.get_peft_model(model, config).get_base_model().items())
    assert {k: len(leaf(m, "waveft_spectrum")) for k, m in layers.items()} == {"a": 37, "b": 112, "c": 1}


def test_a_waveft_pattern_may_be_an_expression_for_a_whole_name() -> None:
    model = V.get_peft_model(nn.Sequential(nn.Linear(10, 10)), V.WaveFTConfig(target_modules=["0"], n_frequency_pattern={".*0": 9}))
    assert len(leaf(model.get_base_model()[0], "waveft_spectrum")) == 9


def test_waveft_names_wavelets_and_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("db39", "sym1", "bior2.2", "haar", "coif"):
        with pytest.raises(ConfigError, match="wavelet_family"):
            V.WaveFTConfig(wavelet_family=wrong)
    with pytest.raises(ConfigError, match="Lower it"):
        adapted(V.WaveFTConfig(n_frequency=97))
    monkeypatch.setitem(sys.modules, "pywt", None)
    assert taps("db1")[0][0] == pytest.approx(0.5**0.5)
    model = nn.ModuleDict({"lin": nn.Linear(12, 8)})
    with pytest.raises(ImportError, match="pip install PyWavelets"):
        V.get_peft_model(model, V.WaveFTConfig(target_modules=["lin"], n_frequency=9, wavelet_family="db2"))
    assert type(model["lin"]) is nn.Linear  # nothing has changed


# ------------------------------------------------------------------------------------------------------------------------- GraLoRA


@pytest.mark.parametrize(("k", "hybrid"), [(1, 0), (2, 0), (4, 3)])
def test_gralora(k: int, hybrid: int) -> None:
    r, s = 4, 6 / (4 + hybrid)
    _, layer = adapted(V.GraloraConfig(r=r, alpha=6, gralora_k=k, hybrid_r=hybrid))
    a, b = leaf(layer, "gralora_A"), leaf(layer, "gralora_B")
    d, part = torch.zeros(8, 12, dtype=torch.float64), r // k
    for j, n in itertools.product(range(k), range(k)):  # outputs' block j gets part j of what inputs' block n has, as its part n
        own = b[j, n * part : n * part + part].T @ a[n, :, j * part : j * part + part].T
        assert torch.linalg.matrix_rank(own) <= part
        d[j * 8 // k : (j + 1) * 8 // k, n * 12 // k : (n + 1) * 12 // k] = own
    if hybrid:
        d += leaf(layer, "gralora_B_general") @ leaf(layer, "gralora_A_general")
    torch.testing.assert_close(weight(layer), frozen(layer) + s * d)


def test_gralora_costs_what_loras_rank_costs() -> None:
    x = torch.randn(10, 32)
    _, layer = adapted(V.GraloraConfig(r=8, gralora_k=4), 32, 64)
    add = layer.change("default").add
    with FlopCounterMode(display=False) as flops:
        add.rows(x.double(), GEO)
    assert flops.get_total_flops() == 2 * 10 * 8 * (32 + 64)
    for fields in ({"r": 5}, {"r": 0}, {"gralora_k": 0}, {"hybrid_r": -1}):
        with pytest.raises(ConfigError):
            V.GraloraConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="both sides"):
        adapted(V.GraloraConfig(r=8, gralora_k=8))


# ---------------------------------------------------------------------------------------------------------------------------- DEFT


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("para", [False, True])
@pytest.mark.parametrize("how", ["relu", "qr"])
def test_deft(how: Any, para: bool, conv: bool) -> None:
    _, layer = adapted(V.DeftConfig(r=3, decomposition_method=how, para=para, alpha=None if para else 6), 6 if conv else 12, conv=conv)
    p, w = leaf(layer, "deft_P"), frozen(layer)
    q, v = (p, p.clamp(min=0)) if how == "relu" else (torch.linalg.qr(p).Q,) * 2
    wanted = w - q @ v.T @ w + (0 if para else 2 * q @ leaf(layer, "deft_R"))
    if how == "qr" and para:
        torch.testing.assert_close(p.T @ wanted, torch.zeros(3, wanted.shape[1], dtype=torch.float64))  # the space is gone
    if conv:
        x = rand(2, 6, 5, 5)
        torch.testing.assert_close(layer(x), nn.functional.conv2d(x, wanted.view(8, 6, 3, 3), layer.base_layer.bias))
    else:
        torch.testing.assert_close(weight(layer), wanted)


def test_deft_starts() -> None:
    for fields in ({}, {"alpha": 5}, {"decomposition_method": "qr", "r": 12}):
        _, layer = adapted(V.DeftConfig(**fields), moved=0)  # type: ignore[arg-type]
        torch.testing.assert_close(weight(layer), frozen(layer))
        assert leaf(layer, "deft_P").shape == (8, 8)  # no more directions than outputs
    _, layer = adapted(V.DeftConfig(init_weights=False, init_scale=50.0), 200, moved=0)
    assert leaf(layer, "deft_R").std() == pytest.approx(1, rel=0.1)


def test_deft_says_what_has_no_effect() -> None:
    for fields in ({"init_scale": 2.0}, {"para": True, "alpha": 4}, {"para": True, "deft_dropout": 0.1}):
        with pytest.warns(PeftWarning, match="no effect"):
            V.DeftConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'relu', 'qr'"):
        V.DeftConfig(decomposition_method="svd")  # type: ignore[arg-type]
