"""What the options of the weight methods do, one by one: dropout of all kinds, starts, forms, refusals."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import veneer as V
from veneer.errors import ConfigError, PeftWarning
from veneer.method import Method, load_methods

from .one_layer import adapted, frozen, leaf, rand, weight

X = rand(3, 12, seed=5)

# ------------------------------------------------------------------------------------------------------------------------- dropout

INPUTS: dict[str, Any] = {  # dropout of the inputs of the change
    "lora": lambda p: V.LoraConfig(r=4, lora_dropout=p),
    "vera": lambda p: V.VeraConfig(r=4, vera_dropout=p),
    "psoft": lambda p: V.PsoftConfig(r=4, psoft_dropout=p),
    "hira": lambda p: V.HiraConfig(r=4, hira_dropout=p),
    "miss": lambda p: V.MissConfig(r=4, miss_dropout=p),
    "miss bat": lambda p: V.MissConfig(r=4, miss_dropout=p, init_weights="bat"),
    "gralora": lambda p: V.GraloraConfig(r=4, hybrid_r=2, gralora_dropout=p),
    "adalora": lambda p: V.AdaLoraConfig(init_r=4, total_step=10, lora_dropout=p),
}
MODULES: dict[str, Any] = {  # the whole change left out
    "loha": lambda p: V.LoHaConfig(r=4, module_dropout=p),
    "lokr": lambda p: V.LoKrConfig(r=4, module_dropout=p),
    "delora": lambda p: V.DeloraConfig(r=4, module_dropout=p),
}
BLOCKS: dict[str, Any] = {  # blocks of rotations left out
    "boft": lambda p: V.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, boft_dropout=p),
    "oft": lambda p: V.OFTConfig(oft_block_size=4, module_dropout=p),
    "oft shared": lambda p: V.OFTConfig(oft_block_size=4, module_dropout=p, block_share=True),
}
ROWS: dict[str, Any] = {
    "loha": lambda p: V.LoHaConfig(r=4, rank_dropout=p),
    "lokr": lambda p: V.LoKrConfig(r=4, rank_dropout=p),
    "lokr scaled": lambda p: V.LoKrConfig(r=4, rank_dropout=p, rank_dropout_scale=True),
}
ALL = {
    f"{kind} {name}": make
    for kind, table in (("inputs", INPUTS), ("module", MODULES), ("blocks", BLOCKS), ("rows", ROWS))
    for name, make in table.items()
}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_dropout_is_of_training_alone(make: Any) -> None:
    """In training outputs differ from call to call; evaluated, merged or asked for its ΔW the adapter is what it is without dropout."""
    model, layer = adapted(make(0.5))
    plain = adapted(make(0.0))[1]
    torch.testing.assert_close(layer(X), plain(X))
    model.train()
    assert len({layer(X).sum().item() for _ in range(20)}) > 1
    torch.testing.assert_close(layer.get_delta_weight("default"), plain.get_delta_weight("default"))
    model.merge_adapter()
    model.eval()
    torch.testing.assert_close(layer(X), plain(X))


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_inputs_are_dropped_for_the_change_alone(make: Any) -> None:
    """The mean over the masks is the output without them: what is kept is scaled up, and the base reads all of x."""
    model, layer = adapted(make(0.25), moved=0.2)
    wanted = layer(X)
    model.train()
    with torch.no_grad():
        got = torch.stack([layer(X) for _ in range(1000)])
    spread = got.std(0) / 1000**0.5
    assert ((got.mean(0) - wanted).abs() < 5 * spread + 1e-9).all()


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_modules_are_left_out(make: Any) -> None:
    """A call has the whole change or nothing of it, with the probability asked for; no gradient is missing."""
    model, layer = adapted(make(0.3))
    base, whole = layer.base_layer(X), layer(X)
    assert not torch.allclose(base, whole)
    model.train()
    seen = []
    for _ in range(300):
        y = layer(X)
        assert torch.allclose(y, base) or torch.allclose(y, whole)
        seen.append(torch.allclose(y, base))
    assert 0.2 < sum(seen) / 300 < 0.4
    layer(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("make", [MODULES["loha"], BLOCKS["boft"], ROWS["lokr"]])
def test_dropout_compiles_whole(make: Any) -> None:
    model, _ = adapted(make(0.5))
    model.train()
    try:
        torch.compile(model.get_base_model().lin, backend="aot_eager", fullgraph=True)(X).sum().backward()
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_blocks_are_the_identity(make: Any) -> None:
    model, layer = adapted(make(0.4))
    model.train()
    with torch.no_grad():
        rotations = [layer.change("default").right for _ in range(400)]
    still, count = 0, 0
    for right in rotations:
        blocks = torch.stack([f.blocks for f in right.factors if hasattr(f, "blocks")]) if hasattr(right, "factors") else right.blocks[None]
        eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
        gone = (blocks == eye).all(-1).all(-1)
        assert int(gone.any(1).sum()) <= 1  # those of one factor
        still, count = still + int(gone.sum()), count + gone.shape[1]
    assert 0.33 < still / count < 0.47


@pytest.mark.parametrize(("name", "scaled"), [("loha", True), ("lokr", False), ("lokr scaled", True)])
def test_rows_are_dropped(name: str, scaled: bool) -> None:
    model, layer = adapted(ROWS[name](0.5))
    d = weight(layer) - frozen(layer)
    model.train()
    for _ in range(20):
        got = weight(layer) - frozen(layer)
        kept = got.abs().sum(1) > 1e-9
        share = kept.double().mean().clamp(min=1 / 8) if scaled else 1
        torch.testing.assert_close(got[kept], d[kept] / share)


def test_dropout_that_cannot_act_is_told() -> None:
    class Halved(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) / 2

    model = nn.ModuleDict({"a": Halved(4, 4), "b": nn.Embedding(4, 4), "c": nn.Linear(4, 4)})
    with pytest.warns(PeftWarning, match=r"dropout.*does not act on 'a' and 1 more"):
        V.get_peft_model(model, V.LoraConfig(target_modules=["a", "b", "c"], r=2, lora_dropout=0.1))


# ----------------------------------------------------------------------------------------------------------------------------- OFT


def turned(flat: Tensor, b: int, exact: bool) -> Tensor:
    """The block-diagonal rotation that x is multiplied by from the right, from its definition."""
    i, j = torch.triu_indices(b, b, 1)
    blocks = []
    for row in flat:
        q = torch.zeros(b, b, dtype=flat.dtype)
        q[i, j] = row
        q = q - q.T
        eye = torch.eye(b, dtype=flat.dtype)
        blocks.append((eye - q) @ torch.linalg.inv(eye + q) if exact else eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_oft(exact: bool, share: bool) -> None:
    _, layer = adapted(V.OFTConfig(oft_block_size=4, use_cayley_neumann=not exact, block_share=share), moved=0.1)
    flat = leaf(layer, "oft_R")
    assert flat.shape == (1 if share else 3, 6)
    torch.testing.assert_close(weight(layer), frozen(layer) @ turned(flat.expand(3, 6), 4, exact).T)


def test_oft_rotates_what_an_embedding_gives() -> None:
    config = V.OFTConfig(oft_block_size=4, target_modules=["lin"], use_cayley_neumann=False)
    model = V.get_peft_model(nn.ModuleDict({"lin": nn.Embedding(10, 12)}).double(), config, autocast_adapter_dtype=False)
    layer = model.get_base_model().lin
    with torch.no_grad():
        layer.leaf("default", "oft_embedding_R").normal_()
    x, r = torch.arange(10), turned(leaf(layer, "oft_embedding_R"), 4, True)
    torch.testing.assert_close(layer(x), layer.base_layer(x) @ r)
    torch.testing.assert_close(model.merge_and_unload().lin(x), layer.base_layer(x))


@pytest.mark.parametrize("groups", [1, 2])
def test_oft_of_a_convolution(groups: int) -> None:
    """Also where PEFT's forward differs from its merge: kernels wider than one."""
    _, layer = adapted(V.OFTConfig(oft_block_size=6, use_cayley_neumann=False), 4, 8, conv=True, groups=groups, padding=1, stride=2)
    x = rand(2, 4, 6, 6)
    r = turned(leaf(layer, "oft_R"), 6, True)  # over the 36 inputs of both groups
    w = torch.cat(
        [
            part @ r[i * 36 // groups : (i + 1) * 36 // groups, i * 36 // groups : (i + 1) * 36 // groups].T
            for i, part in enumerate(frozen(layer).chunk(groups))
        ]
    )
    wanted = nn.functional.conv2d(x, w.view(8, -1, 3, 3), layer.base_layer.bias, stride=2, padding=1, groups=groups)
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("share", [False, True])
def test_constrained_oft_stays_in_its_ball(share: bool) -> None:
    model, layer = adapted(V.OFTConfig(oft_block_size=4, coft=True, eps=0.3, block_share=share, use_cayley_neumann=False), moved=1.0)
    flat, radius = layer.leaf("default", "oft_R"), 0.3 / (1 if share else 3) ** 0.5
    held = flat.detach() * (radius / (2**0.5 * flat.detach().norm(dim=1, keepdim=True))).clamp(max=1)
    torch.testing.assert_close(weight(layer), frozen(layer) @ turned(held.expand(3, 6), 4, True).T)
    optimizer = torch.optim.SGD([flat], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.get_base_model().lin(X).square().sum().backward()
        optimizer.step()
        assert (2**0.5 * flat.norm(dim=1) <= radius * (1 + 1e-9)).all()


def test_oft_takes_the_nearest_size_and_says_so() -> None:
    with pytest.warns(PeftWarning, match=r"`oft_block_size`=5 does not divide.*3 blocks of 4"):
        adapted(V.OFTConfig(oft_block_size=5))
    with pytest.raises(ConfigError, match="cannot be rotated"):
        adapted(V.OFTConfig(oft_block_size=4), 13)
    with pytest.raises(ConfigError, match="over the groups"):
        adapted(V.OFTConfig(oft_block_size=12), 4, 8, conv=True, groups=2)


# ----------------------------------------------------------------------------------------------------------------- HRA, C³A, RoAd


def test_hra_with_orthogonal_vectors() -> None:
    _, layer = adapted(V.HRAConfig(r=3, apply_GS=True))
    q: list[Tensor] = []
    for u in leaf(layer, "hra_u").T:  # Gram and Schmidt
        for done in q:
            u = u - (done @ u) * done
        q.append(u / u.norm())
    o = torch.stack(q, 1)
    torch.testing.assert_close(weight(layer), frozen(layer) @ (torch.eye(12, dtype=torch.float64) - 2 * o @ o.T))
    _, fresh = adapted(V.HRAConfig(r=4, apply_GS=True), moved=0)
    fresh(X).sum().backward()
    assert fresh.leaf("default", "hra_u").grad.abs().max() < 1e3  # equal columns would have no bounds


def test_hra_is_a_product_of_reflections() -> None:
    _, layer = adapted(V.HRAConfig(r=4))
    h = torch.eye(12, dtype=torch.float64)
    for u in leaf(layer, "hra_u").T:
        h = h - 2 * (h @ u).unsqueeze(1) * u / (u @ u)
    torch.testing.assert_close(weight(layer), frozen(layer) @ h)
    with pytest.warns(PeftWarning, match="odd"):
        V.HRAConfig(r=3)


@pytest.mark.parametrize("b", [1, 2, 3, 5])
def test_c3a_is_circular_correlation(b: int) -> None:
    """Of odd sizes too, and in bfloat16, for which there is no Fourier transform."""
    model, layer = adapted(V.C3AConfig(block_size=b, init_weights="gaussian"), 30, 30)
    x, k = rand(4, 30), torch.fft.fft(leaf(layer, "c3a_kernel"))
    y = torch.einsum("tnf,mnf->tmf", torch.fft.fft(x.view(4, -1, b)), k.conj())
    torch.testing.assert_close(layer(x), layer.base_layer(x) + torch.fft.ifft(y).real.flatten(1) / 30)
    half = model.to(torch.bfloat16).get_base_model().lin
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).double(), layer.double()(x), atol=0.1, rtol=0.05)


def test_c3a_starts() -> None:
    for kind, bound in (("xavier_uniform", 0.1), ("kaiming_uniform", 200**-0.5), (False, 0.1), (True, 0.0)):
        _, layer = adapted(V.C3AConfig(block_size=50, init_weights=kind), 200, 400, moved=0)
        assert leaf(layer, "c3a_kernel").abs().max().item() == pytest.approx(bound, rel=0.01)
    for wrong in (None, "xavier"):
        with pytest.raises(ConfigError, match="init_weights"):
            V.C3AConfig(init_weights=wrong)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_turns_pairs_of_outputs(variant: Any) -> None:
    _, layer = adapted(V.RoadConfig(variant=variant, group_size=4))
    theta, alpha = leaf(layer, "road_theta"), leaf(layer, "road_alpha")
    y = layer.base_layer(X)
    wanted = torch.empty_like(y)
    for group in range(2):
        for pair in range(2):
            one, two = group * 4 + pair, group * 4 + pair + 2  # a group's first half with its second
            if variant == "road_1":
                at = [group * 2 + pair] * 4
            elif variant == "road_2":
                at = [one, one, two, two]
            else:  # two numbers an output: for itself, and for what comes from its partner
                at = [group * 8 + pair, group * 8 + 4 + pair, group * 8 + 4 + pair + 2, group * 8 + pair + 2]
            c1, s1, s2, c2 = (alpha[i] * (theta[i].cos() if n in (0, 3) else theta[i].sin()) for n, i in enumerate(at))
            wanted[:, one] = c1 * y[:, one] - s1 * y[:, two]
            wanted[:, two] = s2 * y[:, one] + c2 * y[:, two]
    torch.testing.assert_close(layer(X), wanted)  # the bias is turned too


# ------------------------------------------------------------------------------------------------------------- SHiRA, GLoRA, others


def test_shira_takes_a_mask_of_ones_own(tmp_path: Path) -> None:
    calls = []

    def every_third(layer: nn.Module, r: int, **kwargs: Any) -> Tensor:
        calls.append((type(layer), r, kwargs))
        mask = torch.zeros(layer.weight.shape)  # type: ignore[union-attr]
        mask.view(-1)[: 3 * r * sum(mask.shape) : 3] = 1
        return mask

    config = V.ShiraConfig(r=1, mask_type="mine")
    with pytest.raises(ConfigError, match="mask_fn"):
        adapted(config)
    config.mask_fn = every_third
    model, layer = adapted(config)
    assert calls == [(nn.Linear, 1, {})]
    d = (weight(layer) - frozen(layer)).flatten()
    torch.testing.assert_close(d[:60:3], leaf(layer, "shira_weight"))
    assert int((d.abs() > 1e-12).sum()) == 20
    model.save_pretrained(tmp_path)  # the mask is in the file: reading it needs no function
    again = V.PeftModel.from_pretrained(nn.ModuleDict({"lin": layer.base_layer}), tmp_path)
    assert torch.equal(leaf(again.get_base_model().lin, "shira_indices"), leaf(layer, "shira_indices"))
    for mask, text in ((torch.ones(12, 8), "is \\(12, 8\\)"), (torch.ones(8, 12), "96 ones.*asks for .* with 20")):
        config = V.ShiraConfig(r=1)
        config.mask_fn = lambda layer, r, mask=mask, **kwargs: mask
        with pytest.raises(ConfigError, match=text):
            adapted(config)


def test_shira_draws_by_its_seed() -> None:
    places = [leaf(adapted(V.ShiraConfig(r=2, random_seed=s))[1], "shira_indices") for s in (3, 3, 4)]
    assert torch.equal(places[0], places[1])
    assert not torch.equal(places[0], places[2])
    flat = places[0][0].long() * 12 + places[0][1]
    assert torch.equal(flat, torch.randperm(96, generator=torch.Generator().manual_seed(3))[:40].sort().values)


def test_glora_without_a_bias_leaves_it_alone() -> None:
    """As PEFT does it; so such a layer can be merged."""
    for kind in ("vector", "lora"):
        model, layer = adapted(V.GloraConfig(r=3, config_C=kind, config_D_E="vector"), bias=False)  # type: ignore[arg-type]
        assert {n for n, x in layer.attached["default"].leaves.items() if x.trainable} == {"Ad", "Au", "Bd", "Bu"}
        w = frozen(layer)
        wanted = w + w * (leaf(layer, "Ad") @ leaf(layer, "Au")) + leaf(layer, "Bd") @ leaf(layer, "Bu")
        torch.testing.assert_close(weight(layer), wanted)
        torch.testing.assert_close(model.merge_and_unload().lin.weight.detach(), wanted)


def test_glora_keeps_nothing_of_the_weights_size_and_small_changes() -> None:
    """In bfloat16 the change has a product of its own: 1 + A would be rounded to one."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    model = V.get_peft_model(base, V.GloraConfig(r=2, target_modules=["0"]))
    layer: Any = model.get_base_model()[0]
    with torch.no_grad():
        leaf(layer, "Ad").fill_(1.8e-3)
        leaf(layer, "Au").fill_(1.0)  # A is 0.0036 everywhere
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(0 if isinstance(t, nn.Parameter) else t.numel())
        return t

    x = torch.randn(20, 64).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        got = model(x).double()
    assert max(sizes) <= x.numel()
    with model.disable_adapter():
        before = model(x).double()
    assert (got == (before * 1.0036).bfloat16()).double().mean() > 0.95
    assert (got != before).double().mean() > 0.5


def test_hira_makes_nothing_of_a_tables_size() -> None:
    torch.manual_seed(0)
    model = V.get_peft_model(nn.Sequential(nn.Embedding(5000, 8, padding_idx=0)), V.HiraConfig(r=2, target_modules=["0"]))
    layer: Any = model.get_base_model()[0]
    with torch.no_grad():
        leaf(layer, "hira_embedding_A").normal_()
    x = torch.tensor([[1, 7, 7], [0, 4999, 3]])
    w = frozen(layer)
    expected = (w + w * (leaf(layer, "hira_embedding_B") @ leaf(layer, "hira_embedding_A"))).T[x]
    torch.testing.assert_close(model(x).detach(), expected)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x).detach(), expected)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model(x)
    assert max(abs(e.self_cpu_memory_usage) for e in found.key_averages()) < 5000 * 4


def test_two_scalings_of_a_grouped_convolutions_inputs_multiply() -> None:
    model, layer = adapted(V.IA3Config(target_modules=["lin"], feedforward_modules=["lin"]), 4, 8, conv=True, groups=2)
    model.add_adapter("other", V.IA3Config(target_modules=["lin"], feedforward_modules=["lin"]))
    with torch.no_grad():
        layer.leaf("other", "ia3_l").normal_()
    model.base_model.set_adapter(["default", "other"])
    x = rand(2, 4, 5, 5)
    both = layer.leaf("default", "ia3_l") * layer.leaf("other", "ia3_l")
    torch.testing.assert_close(layer(x), layer.base_layer(x * both))


def test_loha_starts_at_the_last_factor() -> None:
    _, layer = adapted(V.LoHaConfig(r=4), moved=0)
    assert {n for n in layer.attached["default"].leaves if not leaf(layer, n).any()} == {"hada_w2_b"}
    assert leaf(layer, "hada_w1_b").abs().max() <= 12**-0.5


@pytest.mark.parametrize("groups", [1, 2])
def test_loha_in_the_form_of_tucker(groups: int) -> None:
    _, layer = adapted(V.LoHaConfig(r=2, alpha=3, use_effective_conv2d=True), 4, 8, conv=True, groups=groups)
    one, two = (torch.einsum("ijhw,ip,jq->pqhw", *(leaf(layer, f"hada_{k}") for k in (f"t{i}", f"w{i}_a", f"w{i}_b"))) for i in (1, 2))
    x = rand(2, 4, 5, 5)
    w = frozen(layer).view(8, -1, 3, 3) + 1.5 * one * two
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, w, layer.base_layer.bias, groups=groups))


def test_osf_starts_at_random_on_demand() -> None:
    _, layer = adapted(V.OSFConfig(effective_rank=3, init_weights=False), 60, 50, moved=0)
    for name in ("U_low", "S_low", "V_low"):
        assert leaf(layer, name).std() == pytest.approx(1, rel=0.3)
    high = leaf(layer, "osf_U_high")
    w = frozen(layer)
    torch.testing.assert_close(w - high @ high.T @ w, w - torch.linalg.svd(w).U[:, :3] @ torch.linalg.svd(w).U[:, :3].T @ w)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_psoft_starts_at_random_on_demand(orthogonal: bool) -> None:
    _, layer = adapted(V.PsoftConfig(r=4, psoft_orth=orthogonal, init_weights=False), moved=0)
    assert float((weight(layer) - frozen(layer)).abs().max()) > 1e-3


def test_psoft_of_rank_one_has_no_rotation_and_is_saved_all_the_same(tmp_path: Path) -> None:
    x, base = rand(3, 8).float(), nn.Sequential(nn.Linear(8, 6))
    model = V.get_peft_model(copy.deepcopy(base), V.PsoftConfig(r=1, target_modules=["0"]))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 if p.requires_grad else 0)
    model.save_pretrained(tmp_path)
    again = V.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(again(x), model(x))
    assert (again(x) - base(x)).abs().max() > 1e-3


@pytest.mark.parametrize("method", [m for m in load_methods().values() if issubclass(m, Method)], ids=lambda m: m.__name__)
def test_a_dropout_is_a_probability(method: Any) -> None:
    """Found out when the config is made: later a model would have the adapter on some of its layers."""
    for name in (f.name for f in dataclasses.fields(method) if f.name.endswith("dropout")):
        for wrong in (1.5, -0.1, 1, "0.1", True, None):
            with pytest.raises(ConfigError, match=rf"`{name}` should lie in \[0, 1\), got {wrong!r}"):
                method(**{**method.examples[0], name: wrong})
        method(**{**method.examples[0], name: 0.5})


DEAD: list[Any] = [
    V.LoHaConfig(alpha=0), V.LoKrConfig(alpha=0), V.GraloraConfig(r=4, alpha=0), V.RandLoraConfig(r=2, randlora_alpha=0), V.PsoftConfig(r=4, psoft_alpha=0),
    V.FourierFTConfig(n_frequency=5, scaling=0.0), V.WaveFTConfig(n_frequency=5, scaling=0.0), V.PeanutConfig(r=2, scaling=0.0), V.LilyConfig(r=2, scaling=0.0),
    V.DeloraConfig(r=2, delora_lambda=0), V.VeraConfig(r=2, d_initial=0.0), V.GloraConfig(config_A_B="none", config_C="none", config_D_E="none"),
]  # fmt: skip


@pytest.mark.parametrize("config", DEAD, ids=lambda c: type(c).__name__)
def test_what_would_never_train_is_refused(config: Any) -> None:
    base = nn.Sequential(nn.Linear(8, 8))
    before = base.state_dict().keys()
    with pytest.raises(ConfigError, match=r"would act or train|would train|gets a gradient"):
        V.get_peft_model(base, dataclasses.replace(config, target_modules=["0"]))
    assert base.state_dict().keys() == before
    V.get_peft_model(base, dataclasses.replace(config, target_modules=["0"], inference_mode=True))  # PEFT's files of such are read


SEEDS: dict[Any, str] = {
    V.FourierFTConfig: "random_loc_seed", V.WaveFTConfig: "random_loc_seed", V.UniLoraConfig: "proj_seed", V.TinyLoraConfig: "projection_seed",
    V.VeraConfig: "projection_prng_key", V.PveraConfig: "projection_prng_key", V.RandLoraConfig: "projection_prng_key", V.FrodConfig: "projection_prng_key",
    V.PsoftConfig: "random_seed", V.AdamssConfig: "random_seed",
}  # fmt: skip


@pytest.mark.parametrize("config", SEEDS, ids=lambda c: c.__name__)
def test_a_seed_of_what_no_file_holds_is_given(config: Any) -> None:
    """Places drawn without one are others when the adapter is loaded."""
    for wrong in (None, 1.0, True):
        with pytest.raises(ConfigError, match=f"`{SEEDS[config]}` should be an integer, .* got {wrong!r}"):
            config(**{SEEDS[config]: wrong})
    assert V.ShiraConfig(random_seed=None).random_seed is V.PveraConfig(generator_seed=None).generator_seed is None


@pytest.mark.parametrize("config", [V.VeraConfig, V.ShiraConfig, V.PolyConfig, V.PsoftConfig, V.GloraConfig], ids=lambda c: c.__name__)
def test_a_rank_is_positive(config: Any) -> None:
    for r in (0, -1):
        with pytest.raises(ConfigError, match=f"`r` should be a positive integer value but the value passed is {r}"):
            config(r=r)


def test_bias_is_checked() -> None:
    assert V.BOFTConfig(bias="boft_only").bias == "boft_only"
    for config, as_documented in ((V.FourierFTConfig, "fourier_only"), (V.MissConfig, "MiSS_only")):  # PEFT's names for it
        model = V.get_peft_model(nn.Sequential(nn.Linear(64, 64)), config(target_modules=["0"], bias=as_documented))
        assert model.get_base_model()[0].base_layer.bias.requires_grad
    for wrong in ("lora_only", "All", "yes"):
        with pytest.raises(ConfigError, match="`bias` is one of none, all, oft_only"):
            V.OFTConfig(bias=wrong)


SCALED = [
    V.LoraConfig(r=4), V.AdaLoraConfig(init_r=4, total_step=10), V.VeraConfig(r=4), V.DeloraConfig(r=4), V.HiraConfig(r=4), V.LoHaConfig(r=4),
    V.LoKrConfig(r=4), V.MissConfig(r=4), V.MissConfig(r=4, init_weights="bat"), V.GraloraConfig(r=4), V.C3AConfig(block_size=4), V.ShiraConfig(r=1),
    V.FourierFTConfig(n_frequency=9), V.WaveFTConfig(n_frequency=9), V.PsoftConfig(r=4), V.PeanutConfig(r=4),
]  # fmt: skip


@pytest.mark.parametrize("config", SCALED, ids=lambda c: type(c).__name__)
def test_scale_of_an_added_change(config: Any) -> None:
    """Half the scale is half the change, and `scale_layer` multiplies it further."""
    _, layer = adapted(config)
    whole = layer.get_delta_weight("default")
    layer.set_scale("default", 0.5)
    layer.scale_layer(0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), whole / 4)
    layer.unscale_layer()
    torch.testing.assert_close(layer.get_delta_weight("default"), whole)
