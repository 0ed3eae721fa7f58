"""OSF: what is frozen stays frozen, whatever the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer


def test_a_step_leaves_the_large_directions_alone() -> None:
    """After steps of plain SGD, U and V have gained nothing in the span of the k large singular directions."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16))
    u, _, v = torch.linalg.svd(base[0].weight.detach(), full_matrices=False)
    model = veneer.get_peft_model(base, veneer.OSFConfig(target_modules=["0"], effective_rank=4))
    layer = model.get_base_model()[0]  # type: ignore[index]
    start = {n: layer.leaf("default", n).detach().clone() for n in ("U_low", "V_low")}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
    moved = {n: layer.leaf("default", n).detach() - t for n, t in start.items()}
    assert all(float(t.abs().max()) > 1e-3 for t in moved.values())
    assert float((u[:, :4].T @ moved["U_low"]).abs().max()) < 1e-6
    assert float((moved["V_low"] @ v[:4].T).abs().max()) < 1e-6


def test_the_frozen_rank_as_a_number_a_share_and_a_pattern() -> None:
    def sizes(**fields: object) -> list[int]:
        base = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 6), nn.Linear(6, 9))
        model = veneer.get_peft_model(base, veneer.OSFConfig(target_modules=["0", "1", "2"], **fields))  # type: ignore[arg-type]
        return [min(m.site.n_out, m.site.n_in) - m.leaf("default", "S_low").numel() for m in model.get_base_model()]  # type: ignore[union-attr, attr-defined]

    assert sizes() == [6, 3, 3]
    assert sizes(effective_rank=0.3) == [3, 1, 1]
    assert sizes(effective_rank=4, rank_pattern={"0": 2}) == [2, 4, 4]
    assert sizes(effective_rank=4, rank_pattern={"0": 0.25}) == [3, 4, 4]


def test_a_pattern_is_searched_for_anywhere_in_a_name() -> None:
    base = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12))})
    model = veneer.get_peft_model(base, veneer.OSFConfig(target_modules=["0", "1"], effective_rank=4, rank_pattern={"ers.0": 2}))
    assert [tuple(layer.leaf("default", "S_low").shape) for layer in model.get_base_model()["layers"]] == [(10,), (8,)]  # type: ignore[index]


@pytest.mark.parametrize(("n_out", "rank"), [(1, None), (6, 1.0), (6, 8)])
def test_a_layer_of_which_nothing_would_train_is_refused(n_out: int, rank: float | None) -> None:
    with pytest.raises(veneer.ConfigError, match="nothing of it trains"):
        veneer.get_peft_model(nn.Sequential(nn.Linear(8, n_out)), veneer.OSFConfig(target_modules=["0"], effective_rank=rank))
