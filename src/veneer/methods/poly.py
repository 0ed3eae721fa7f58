"""Poly: every task mixes skills, low-rank changes that all tasks share, in proportions of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError, RouteError
from ..method import Leaf, Targeted
from ..ops import Between, per_row


@dataclass
class PolyConfig(Targeted, peft_type="POLY"):
    """y += x A_t B_t / r,  A_t = Σ_s w_ts A_s, B_t = Σ_s w_ts B_s,  t the task of the row.   Ponti et al. 2022, arXiv:2202.13914.

    A (splits, skills, n_in / splits, r), B (splits, skills, r, n_out / splits): each split of the inputs and of the outputs mixes on its own
    (Caccia et al. 2022, arXiv:2211.03831). w = σ(logits) of the task's row of `module_logits` (tasks, splits · skills), its sum over the skills
    one; in training a relaxed Bernoulli draw takes the place of σ. `forward` and `generate` take `task_ids` (batch,).
    """

    r: int = 8
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    prefix: ClassVar[str] = "poly_"
    positive: ClassVar[Any] = ("r", "n_tasks", "n_skills", "n_splits")
    choices: ClassVar[Any] = {"poly_type": ("poly",)}
    stacking: ClassVar[Any] = "sum"
    unmergeable: ClassVar[str] = "each task has a change of its own"
    routes: ClassVar[bool] = True
    takes: ClassVar[tuple[str, ...]] = ("task_ids",)
    examples: ClassVar[Any] = ({"r": 3, "n_tasks": 2, "n_skills": 3}, {"r": 3, "n_skills": 2, "n_splits": 4})

    def check(self, site: Any) -> None:
        if site.n_in % self.n_splits or site.n_out % self.n_splits:
            raise ConfigError(f"n_splits={self.n_splits} does not divide the sides of {site.name!r} ({site.n_out} x {site.n_in}).")

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        q, s, r = self.n_splits, self.n_skills, self.r
        logits = Leaf((self.n_tasks, q * s), lambda t: nn.init.uniform_(t, -1e-3, 1e-3), container="poly_router", attr="module_logits")
        return {
            "poly_lora_A": Leaf((q, s, site.n_in // q, r), _uniform),
            "poly_lora_B": Leaf((q, s, r, site.n_out // q), nn.init.zeros_ if self.init_weights else _uniform),
            "module_logits": logits,
        }

    def facts(self, call: Any) -> Mapping[str, Tensor]:
        ids = call.given.get("task_ids")
        if ids is None:
            raise RouteError("Poly needs the task of each row of the batch: pass task_ids=torch.tensor([...]).")
        mine = ids if call.mine is None else per_row(ids, len(call.mine))[torch.tensor(call.mine, device=ids.device)]
        if (wrong := mine[(mine < 0) | (mine >= self.n_tasks)]).numel():
            raise RouteError(f"Only {self.n_tasks} tasks available. Found task id = {int(wrong[0])}.")
        return {"task_ids": ids}

    def example_call(self, rows: int) -> dict[str, Tensor]:
        return {"task_ids": torch.arange(rows) % self.n_tasks}

    def change(self, p: Any, site: Any) -> Change:
        q, s, r = self.n_splits, self.n_skills, self.r
        logits = p.module_logits[site.fact("task_ids").to(p.module_logits.device)].unflatten(1, (q, s))
        if site.training:  # a relaxed Bernoulli draw of temperature one
            u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = logits + u.log() - (-u).log1p()
        w = torch.sigmoid(logits)
        w = w / (w.sum(-1, keepdim=True) + 1e-12)

        def mix(h: Tensor, x: Tensor) -> Tensor:
            here = per_row(w, len(h)).to(h.dtype).view(len(h), *[1] * (h.ndim - 2), q, s)
            z = torch.einsum("...qsr,...qs->...r", h.unflatten(-1, (q, s, r)), here)
            return torch.einsum("...r,...qs->...qsr", z, here).flatten(-3)

        down = _spread(p.poly_lora_A.permute(0, 1, 3, 2).flatten(1, 2))  # (q · s · r, n_in)
        up = _spread(p.poly_lora_B.flatten(1, 2)).mT  # (n_out, q · s · r)
        return Change(add=Between(up, down, mix, 1 / r, why=self.unmergeable))


def _spread(blocks: Tensor) -> Tensor:
    whole: Tensor = blocks[0] if len(blocks) == 1 else torch.block_diag(*blocks)
    return whole


def _uniform(t: Tensor) -> Tensor:
    """Each skill's matrix like a linear layer's, its inputs the last but one dimension."""
    return nn.init.uniform_(t, -1 / math.sqrt(t.shape[-2]), 1 / math.sqrt(t.shape[-2]))
