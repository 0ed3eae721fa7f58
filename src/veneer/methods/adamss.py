"""AdaMSS: the rows of the weight in clusters, each with a small change of its own. Long, since clusters compete, and files may not tell them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..change import Change
from ..errors import ConfigError, LoadError
from ..inits.base import wide
from ..inits.clusters import clusters, principal, starting_directions
from ..method import Leaf
from ..ops import LowRank
from ..schedules import Allocating, Importance
from ..schedules.clusters import AdamssAsaCallback, cluster_of, compete, means, parted, whole

__all__ = ["AdamssAsaCallback", "AdamssConfig"]


@dataclass
class AdamssConfig(Allocating, peft_type="ADAMSS"):
    """[W' | b'] = [W | b] + D,  D_i = B_i A_c V for every row i, c its cluster.   openreview 8ZdWmpYxT0.

    [W | b] ≈ U V, V (r, n_in + 1) its first right singular vectors, frozen (`adamss_newB`); the rows of U are put into `num_subspaces` clusters by k-means.
    A_c (subspace_rank, r) starts as the main directions of the cluster's rows, B_i (subspace_rank,) as zeros. A layer without bias has no column for it.
    In memory the A_c are one tensor (clusters, subspace_rank, r), the B_i another, cluster after cluster; both are cut to the rank of small clusters.
    With `use_dynamic_rank` a cluster's rank is the number of its squared singular values above `svd_threshold` times the largest.

    Files of PEFT do not tell which rows are in which cluster: PEFT finds the clusters again in W, with scikit-learn, and so does this when it reads one.
    Files of veneer have the rows beside them, in a file that PEFT passes over, and need neither.

    `use_asa` lets clusters compete: from step `init_warmup` to `final_warmup`, every `mask_interval` steps, those that matter least stop to train, so that
    of all T clusters asa_target_subspaces + (T - asa_target_subspaces) · (share of steps left)^asa_schedule_exponent do, counted over all layers. What
    matters is the mean of |p · ∂loss/∂p|, smoothed, times its deviation, since the last such step. This happens by itself when an optimizer steps;
    `model.base_model.update_and_allocate(step)` after a step takes it over. Unlike in PEFT just so many clusters stay, there is a last cut at
    `final_warmup`, and loading an adapter keeps what has stopped.
    """

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: Any = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0

    prefix: ClassVar[str] = "adamss_"
    positive: ClassVar[Any] = ("r", "num_subspaces", "subspace_rank", "mask_interval", "asa_target_subspaces", "asa_schedule_exponent")
    choices: ClassVar[Any] = {"init_weights": ("orthogonal", None)}
    stacking: ClassVar[Any] = "sum"
    first: ClassVar[int] = 0
    weighed: ClassVar[tuple[str, ...]] = ("adamss_A", "adamss_B")
    examples: ClassVar[Any] = ({"r": 6, "num_subspaces": 2, "subspace_rank": 2}, {"r": 6, "num_subspaces": 3, "use_asa": True})

    def __post_init__(self) -> None:
        self.init_weights = None if self.init_weights is False else self.init_weights
        super().__post_init__()
        if self.use_asa and self.init_warmup >= self.final_warmup:
            raise ConfigError(f"`init_warmup` ({self.init_warmup}) must be smaller than `final_warmup` ({self.final_warmup}).")

    @property
    def starts_as_identity(self) -> bool:
        return self.init_weights is not None

    def _sizes(self, site: Any) -> tuple[int, int, int, int]:
        """(clusters, rank of a cluster, r, columns of V)."""
        columns = site.n_in + (site.bias() is not None)
        r = min(self.r, site.n_out, columns)
        return min(self.num_subspaces, site.n_out), min(self.subspace_rank, r), r, columns

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        k, q, r, columns = self._sizes(site)
        return {
            "adamss_A": Leaf((k, q, r), torch.nn.init.zeros_),
            "adamss_B": Leaf((site.n_out, q), torch.nn.init.zeros_),
            "adamss_newB": Leaf((r, columns), torch.nn.init.zeros_, trainable=False),
            # rows and rank of each cluster; a file tells them by the shapes of its tensors
            "adamss_sizes": Leaf((k, 2), torch.nn.init.zeros_, trainable=False, dtype=torch.int32),
            # which row of W each row of B belongs to, and which clusters still train
            "adamss_rows": Leaf((site.n_out,), torch.nn.init.zeros_, trainable=False, dtype=torch.int32, saved="start"),
            "adamss_live": Leaf((k,), torch.nn.init.ones_, trainable=False, dtype=torch.bool, saved="start"),
        }

    def start(self, site: Any, *, only_frozen: bool = False) -> Mapping[str, Tensor]:
        k, q, _, _ = self._sizes(site)
        live = torch.ones(k, dtype=torch.bool)
        if only_frozen:
            return {"adamss_rows": torch.full((site.n_out,), -1), "adamss_live": live}  # to be found again, unless the file knows
        u, v = self._principal(site)
        rows, counts = clusters(u, k)
        a, ranks = starting_directions(u, rows, counts, q, self.svd_threshold if self.use_dynamic_rank else 0.0)
        b = torch.randn_like(u[:, :q]) * 0.01 if self.init_weights is None else torch.zeros_like(u[:, :q])
        sizes = torch.tensor([counts, ranks]).T
        return {"adamss_A": a, "adamss_B": b, "adamss_newB": v, "adamss_sizes": sizes, "adamss_rows": rows, "adamss_live": live}

    def _principal(self, site: Any) -> tuple[Tensor, Tensor]:
        w, b = wide(site.weight()).float(), site.bias()
        if b is not None:
            w = torch.cat([w, b.detach().unsqueeze(1).to(w)], 1)
        return principal(w, self._sizes(site)[2], self.random_seed)

    def settle(self, here: Sequence[tuple[Any, Any]], loaded: bool) -> None:
        for site, p in here:
            if int(p.adamss_rows[0]) < 0:
                p.adamss_rows.copy_(self._found_again(site, p.adamss_sizes[:, 0].tolist()))

    def _found_again(self, site: Any, counts: Sequence[int]) -> Tensor:
        rows, found = clusters(self._principal(site)[0], len(counts))
        if found != counts:
            raise LoadError(
                f"The file does not say which rows of {site.name!r} are in which cluster, as files of PEFT never do, and k-means finds clusters of {found} "
                f"rows here where the file has {counts}. Load it on the base model it was trained on, in its dtype; another scikit-learn may differ too."
            )
        return rows

    def change(self, p: Any, site: Any) -> Change:
        (k, q, _), n = p.adamss_A.shape, site.n_out
        cluster = cluster_of(p.adamss_sizes, n)
        there = torch.arange(q, device=cluster.device) < p.adamss_sizes[:, 1:]  # small clusters have fewer ranks
        a, b = p.adamss_A * there.unsqueeze(-1), p.adamss_B * there[cluster]
        up = b.new_zeros(n, k, q).index_put((p.adamss_rows.long(), cluster), b).flatten(1)
        down = a.flatten(0, 1) @ p.adamss_newB.to(a.dtype)
        shift = up @ down[:, site.n_in] * site.scaling if down.shape[1] > site.n_in else None
        return Change(add=LowRank(up, down[:, : site.n_in], site.scaling), shift=shift)

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return parted(tensors)

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return whole(tensors, self.subspace_rank)

    # ---------------------------------------------------------------- the schedule

    def acts(self) -> bool:
        return self.use_asa

    def before_step(self, sites: Sequence[Any], step: int) -> None:
        """Remember what has stopped to train, which optimizers with a memory would move on."""
        for s in sites:
            stopped = ~s.tensor("adamss_live")
            tensors = [(s.tensor("adamss_A"), stopped), (s.tensor("adamss_B"), stopped[cluster_of(s.tensor("adamss_sizes"), s.n_out)])]
            s.memory["stopped"] = [(t, at, t.detach()[at]) for t, at in tensors] if bool(stopped.any()) else []
            for t, at, _ in s.memory["stopped"]:
                if t.grad is not None:
                    t.grad[at] = 0

    def after_step(self, sites: Sequence[Any], step: int) -> None:
        """Put back what has stopped before anything is measured."""
        for s in sites:
            for t, at, values in s.memory.pop("stopped", ()):
                t.detach()[at] = values
        super().after_step(sites, step)

    def snapshot(self, sites: Sequence[Any]) -> Any:
        return [s.tensor("adamss_live").clone() for s in sites]

    def restore(self, sites: Sequence[Any], before: Any) -> None:
        for s, live in zip(sites, before, strict=True):
            s.tensor("adamss_live").copy_(live)

    def importance(self) -> Importance:
        return Importance(self.asa_importance_beta, self.asa_uncertainty_beta)

    def measure(self, sites: Sequence[Any], step: int) -> bool:
        return self.init_warmup <= step <= self.final_warmup and self.weigh(sites)

    def allocate(self, sites: Sequence[Any], step: int) -> None:
        if not self.init_warmup <= step <= self.final_warmup or (step % self.mask_interval and step != self.final_warmup):
            return
        importance, n = sites[0].memory.pop("importance", None), len(sites)
        scores = importance.scores() if importance is not None else []
        sites[0].memory.pop("measured", None)  # it is used up
        if scores:
            each = [means(a, b, s.tensor("adamss_sizes")) for s, a, b in zip(sites, scores[:n], scores[n:], strict=True)]
            left = 1 - (step - self.init_warmup) / (self.final_warmup - self.init_warmup)
            compete(each, [s.tensor("adamss_live") for s in sites], self.asa_target_subspaces, left**self.asa_schedule_exponent)

    def check_saving(self, sites: Sequence[Any], step: int) -> None:
        moved = any(s.tensor("adamss_B").grad is not None and bool(s.tensor("adamss_B").any()) for s in sites)
        if moved and not step and "asked" not in sites[0].memory:
            raise self.never_advanced("with use_asa=True, and all clusters still train, since its schedule never advanced")
