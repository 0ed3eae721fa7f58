"""The variants of LoRA: what each does beside the laws."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import veneer as V
from veneer.errors import ConfigError
from veneer.variants.monteclora import _dirichlet_kl, _weights

FORMS: dict[str, Any] = {
    "use_dora": True,
    "use_bdlora": V.BdLoraConfig(["lin"], None, 2),
    "velora_config": V.VeloraConfig(num_groups=4),
    "monteclora_config": V.MontecloraConfig(num_samples=3),
    "kasa_config": V.KasaConfig(),
    "use_qalora": True,
}


def adapted(seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("lin", nn.Linear(12, 8))
    model = V.get_peft_model(model, V.LoraConfig(target_modules=["lin"], r=4, lora_alpha=8, qalora_group_size=3, **fields))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.3)
    return model


def layer(model: Any) -> Any:
    return model.get_base_model().lin


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(FORMS, 2)))
def test_variants_do_not_go_together(one: str, other: str) -> None:
    with pytest.raises(ConfigError, match=f"{one}.*{other}|{other}.*{one}"):
        V.LoraConfig(**{one: FORMS[one], other: FORMS[other]})


@pytest.mark.parametrize("name", FORMS)
def test_a_variant_is_read_from_its_file_and_refuses_other_sites(name: str, tmp_path: Path) -> None:
    model = adapted(**{name: FORMS[name]})
    model.save_pretrained(tmp_path)
    assert getattr(V.PeftConfig.from_pretrained(tmp_path), name) == FORMS[name]
    with pytest.raises(ConfigError, match=r"acts on|cannot act"):
        V.get_peft_model(
            nn.ModuleDict({"lin": nn.MultiheadAttention(8, 2)}),
            V.LoraConfig(target_modules=["lin"], **{name: FORMS[name]}),  # type: ignore[arg-type]
        )


def test_dora_takes_rows_of_zeros() -> None:
    """The rows that pad a head's vocabulary, and pruned outputs: they have no direction until B gives them one."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(20, 6)
    with torch.no_grad():
        base[0].weight[2:] = 0
    expected = base(x)
    model = V.get_peft_model(base, V.LoraConfig(target_modules=["0"], r=2, use_dora=True))
    torch.testing.assert_close(model(x), expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
    got = model.eval()(x)
    assert (got - expected)[:, 2:].abs().min(0).values.all()
    torch.testing.assert_close(model.merge_and_unload()(x), got)


@pytest.mark.parametrize("order", [["default", "dora"], ["dora", "default"]])
def test_dora_scales_what_the_adapters_before_it_give(order: list[str]) -> None:
    model = adapted()
    model.add_adapter("dora", V.LoraConfig(target_modules=["lin"], r=2, lora_alpha=4, use_dora=True))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".dora." in name:
                p.add_(torch.randn(p.shape) * 0.3)
    w, x = layer(model).base_layer.weight.detach().clone(), torch.randn(3, 12)
    plain, own = (layer(model).lora_B[n].weight @ layer(model).lora_A[n].weight * 2 for n in ("default", "dora"))
    gain = layer(model).lora_magnitude_vector["dora"].weight / (w + own).norm(dim=1)
    expected = gain.unsqueeze(1) * (w + plain + own) if order[-1] == "dora" else gain.unsqueeze(1) * (w + own) + plain
    model.base_model.set_adapter(order)
    torch.testing.assert_close(model(x), x @ expected.T + layer(model).base_layer.bias)
    model.merge_adapter()
    torch.testing.assert_close(layer(model).base_layer.weight.detach(), expected.detach())


def test_bdlora_has_blocks() -> None:
    for side, blocks in (("target_modules_bd_a", (2, 6)), ("target_modules_bd_b", (4, 2))):
        low = layer(adapted(use_bdlora=V.BdLoraConfig(nblocks=2, **{side: ["lin"]}))).change("default").add
        m = low.down if side.endswith("a") else low.up
        h, w = blocks
        assert not m[:h, w:].any() and not m[h:, :w].any() and m[:h, :w].all() and m[h:, w:].all()
    with pytest.raises(ConfigError, match="divisible"):
        adapted(use_bdlora=V.BdLoraConfig(["lin"], None, 5))
    with pytest.raises(ConfigError, match="neither"):
        adapted(use_bdlora=V.BdLoraConfig(["other"]))
    with pytest.raises(ConfigError, match="One factor"):
        adapted(use_bdlora=V.BdLoraConfig(["lin"], ["li"]))


def test_kasa_keeps_the_base_and_trains_its_terms(tmp_path: Path) -> None:
    options = V.KasaConfig(beta=0.3, gamma=0.7)
    model, x = adapted(kasa_config=options), torch.randn(5, 12)
    lin = layer(model)
    w, p = lin.base_layer.weight, {n: lin.leaf("default", n) for n in ("lora_A", "lora_B", "lora_diag")}
    u, s, v = torch.linalg.svd(w)
    kept = (u[:, :4] * s[:4]) @ v[:4]  # 8 components less r
    wanted = kept + 2 * p["lora_B"] @ p["lora_diag"].diag() @ p["lora_A"]
    torch.testing.assert_close(model(x), nn.functional.linear(x, wanted, lin.base_layer.bias), atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(x), nn.functional.linear(x, w, lin.base_layer.bias))  # the frozen weight was never cut
    term = 0.3 * p["lora_diag"].square().sum() + 0.7 * sum((q @ q.T - torch.eye(4)).norm() for q in (p["lora_A"], p["lora_B"].T))
    wanted_grads = torch.autograd.grad(term, list(p.values()))
    model(x).sum().mul(0).backward()
    torch.optim.SGD(list(p.values()), lr=0.0).step()
    for t, g in zip(p.values(), wanted_grads, strict=True):
        torch.testing.assert_close(t.grad, g, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert {k.rpartition("lin.")[2] for k in load_file(tmp_path / "adapter_model.safetensors")} == {
        "lora_A.weight", "lora_B.weight", "lora_diag"
    }  # fmt: skip
    with pytest.raises(ConfigError, match="smaller than"):
        V.get_peft_model(nn.ModuleDict({"lin": nn.Linear(4, 4)}), V.LoraConfig(target_modules=["lin"], r=4, kasa_config=options))


@pytest.mark.parametrize("follow", ["random", "batch_average", "batch_average_once"])
def test_velora_keeps_one_direction_of_each_group(follow: Any) -> None:
    model = adapted(velora_config=V.VeloraConfig(num_groups=5, scale=1.5, init_type=follow)).train()  # groups of 3, one of them empty
    lin = layer(model)
    a, b = lin.leaf("default", "lora_A"), lin.leaf("default", "lora_B")
    first = lin.leaf("default", "lora_velora_embed").clone()
    seen = []
    for i in range(2):
        model.zero_grad()
        x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(i), requires_grad=True)
        y = model(x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
        y.backward(dy)
        v = lin.leaf("default", "lora_velora_embed")
        seen.append(v.clone())
        groups = x.detach().view(-1, 4, 3)
        rebuilt = (1.5 * (groups @ v).unsqueeze(-1) * v).flatten(1)
        torch.testing.assert_close(a.grad, (2 * dy.view(-1, 8) @ b).T @ rebuilt)
        torch.testing.assert_close(x.grad, dy @ (lin.base_layer.weight + 2 * b @ a))  # all else is exact
        torch.testing.assert_close(b.grad, 2 * dy.view(-1, 8).T @ (x.view(-1, 12) @ a.T))
        mean = nn.functional.normalize(groups.mean((0, 1)), dim=0)
        assert torch.allclose(v, mean, atol=1e-5) == (follow == "batch_average" or (follow == "batch_average_once" and i == 0))
    assert torch.equal(seen[0], seen[1]) == (follow != "batch_average")
    assert torch.equal(first, seen[0]) == (follow == "random")


def test_velora_keeps_less_for_the_backward() -> None:
    def kept(**fields: Any) -> int:
        model, sizes = adapted(**fields).train(), []
        x = torch.randn(1000, 12)  # as behind a frozen layer: nothing else keeps it

        def pack(t: torch.Tensor) -> torch.Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x)
        return sum(n for n in sizes if n >= 1000)

    assert kept() == 1000 * (12 + 4)  # x and h
    assert kept(velora_config=V.VeloraConfig(num_groups=2)) == 1000 * (2 + 4)


def test_qalora_changes_all_inputs_of_a_group_alike() -> None:
    model, x = adapted(use_qalora=True), torch.randn(5, 12)
    lin = layer(model)
    delta = lin.get_delta_weight("default").view(8, 4, 3)
    assert lin.leaf("default", "lora_A").shape == (4, 4)
    assert torch.equal(delta, delta[..., :1].expand_as(delta))
    pooled = x.view(5, 4, 3).mean(-1) * 4
    wanted = (
        nn.functional.linear(x, lin.base_layer.weight, lin.base_layer.bias)
        + 2 * pooled @ (lin.leaf("default", "lora_B") @ lin.leaf("default", "lora_A")).T
    )
    torch.testing.assert_close(model(x), wanted)
    with pytest.raises(ConfigError, match="divisible"):
        V.get_peft_model(
            nn.ModuleDict({"lin": nn.Linear(10, 4)}), V.LoraConfig(target_modules=["lin"], use_qalora=True, qalora_group_size=3)
        )


def test_monteclora_draws_in_training_only() -> None:
    options = V.MontecloraConfig(num_samples=5, sample_scaler=0.1)
    model, x = adapted(monteclora_config=options), torch.randn(3, 12)
    lin = layer(model)
    assert torch.equal(model.eval()(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    with torch.no_grad():
        draws = torch.stack([lin.change("default").add.down - lin.leaf("default", "lora_A") for _ in range(4000)])
        w = torch.stack([_weights(lin.leaf("default", "monteclora_expert_weights_prior")) for _ in range(4000)])
        c = lin.leaf("default", "monteclora_std_prior").exp()
    # Σ has the mean r c², and the mixture of five Gaussians the variance Σ E‖w‖²
    wanted = 0.01 * 4 * c.square() * w.square().sum(1).mean()
    torch.testing.assert_close(draws.square().mean((0, 2)), wanted, rtol=0.1, atol=0)
    assert draws.mean((0, 2)).abs().max() < 0.02


def test_monteclora_adds_its_divergences() -> None:
    model = adapted(monteclora_config=V.MontecloraConfig(num_samples=5, kl_loss_weight=0.5)).train()
    lin = layer(model)
    c, e = lin.leaf("default", "monteclora_std_prior"), lin.leaf("default", "monteclora_expert_weights_prior")
    dirichlet = torch.distributions.Dirichlet
    wanted_kl = torch.distributions.kl_divergence(dirichlet(e.exp()), dirichlet(torch.full((5,), 0.1)))
    torch.testing.assert_close(_dirichlet_kl(e.exp(), 0.1), wanted_kl)
    v = (2 * c).exp()  # of one Wishart and five Gaussians whose covariance has the mean 4 v
    wanted = torch.autograd.grad(0.5 * (2 * (v - 2 * c).sum() + 2.5 * (4 * v - 2 * c).sum() + wanted_kl), [c, e])
    model(torch.randn(3, 12)).sum().mul(0).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0).step()
    for t, g in zip((c, e), wanted, strict=True):
        torch.testing.assert_close(t.grad, g, atol=1e-5, rtol=1e-5)
