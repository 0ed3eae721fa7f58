"""AdaMSS: the rows of the weight in clusters, each with a small change of its own within the weight's principal directions.

Longer than most: it finds the clusters, turns PEFT's files (one pair of tensors a cluster) into two tensors and back, and has a schedule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..change import Change
from ..errors import ConfigError, LoadError, SaveError
from ..inits.base import wide
from ..method import Leaf, Targeted, of_training
from ..ops import LowRank
from ..schedules import Importance

__all__ = ["AdamssAsaCallback", "AdamssConfig"]


@dataclass
class AdamssConfig(Targeted, peft_type="ADAMSS"):
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
    stacking: ClassVar[Any] = "sum"
    tuner_methods: ClassVar[Any] = {"update_and_allocate": of_training("update_and_allocate")}
    examples: ClassVar[Any] = ({"r": 6, "num_subspaces": 2, "subspace_rank": 2}, {"r": 6, "num_subspaces": 3, "use_asa": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init_weights = None if self.init_weights is False else self.init_weights
        if self.init_weights not in ("orthogonal", None):
            raise ConfigError(f"`init_weights` must be 'orthogonal' or None, got {self.init_weights!r}.")
        for name in ("r", "num_subspaces", "subspace_rank"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` should be a positive integer value, got {getattr(self, name)}.")
        if self.use_asa:
            for name in ("mask_interval", "asa_target_subspaces", "asa_schedule_exponent"):
                if getattr(self, name) <= 0:
                    raise ConfigError(f"`{name}` must be a positive number when `use_asa=True`, got {getattr(self, name)}.")
            if self.init_warmup >= self.final_warmup:
                raise ConfigError(
                    f"`init_warmup` ({self.init_warmup}) must be smaller than `final_warmup` ({self.final_warmup}) when `use_asa=True`."
                )

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
        k, q, r, _ = self._sizes(site)
        live = torch.ones(k, dtype=torch.bool)
        if only_frozen:
            return {"adamss_rows": torch.full((site.n_out,), -1), "adamss_live": live}  # to be found again, unless the file knows
        u, v = self._principal(site)
        rows, counts = _clusters(u, k)
        a, b, ranks = u.new_zeros(k, q, r), u.new_zeros(site.n_out, q), []
        for c, part in enumerate(rows.split(counts)):
            rank, main = min(len(part), q) or 1, a[c]
            if len(part):
                _, s, directions = torch.linalg.svd(u[part.to(u.device)], full_matrices=False)
                if self.use_dynamic_rank:
                    rank = max(1, min(rank, int((s.square() > self.svd_threshold * s[0].square()).sum())))
                main[:rank] = directions[:rank]
            ranks.append(rank)
        if self.init_weights is None:
            b = torch.randn_like(b) * 0.01
        sizes = torch.tensor([counts, ranks]).T
        return {"adamss_A": a, "adamss_B": b, "adamss_newB": v, "adamss_sizes": sizes, "adamss_rows": rows, "adamss_live": live}

    def _principal(self, site: Any) -> tuple[Tensor, Tensor]:
        """U (n_out, r) and V (r, columns), by torch's randomised method from a seed of its own, as in PEFT."""
        w, b = wide(site.weight()).float(), site.bias()
        if b is not None:
            w = torch.cat([w, b.detach().unsqueeze(1).to(w)], 1)
        kind = w.device.type
        with torch.random.fork_rng([] if kind == "cpu" else [w.device], device_type="cuda" if kind == "cpu" else kind):
            torch.manual_seed(self.random_seed)
            u, _, v = torch.svd_lowrank(w, q=self._sizes(site)[2], niter=2)
        return u, v.T

    def settle(self, here: Sequence[tuple[Any, Any]], loaded: bool) -> None:
        for site, p in here:
            if int(p.adamss_rows[0]) < 0:
                p.adamss_rows.copy_(self._found_again(site, p.adamss_sizes[:, 0].tolist()))

    def _found_again(self, site: Any, counts: Sequence[int]) -> Tensor:
        rows, found = _clusters(self._principal(site)[0], len(counts))
        if found != counts:
            raise LoadError(
                f"The file does not say which rows of {site.name!r} are in which cluster, as files of PEFT never do, and k-means finds clusters of {found} "
                f"rows here where the file has {counts}. Load it on the base model it was trained on, in its dtype; another scikit-learn may differ too."
            )
        return rows

    def change(self, p: Any, site: Any) -> Change:
        (k, q, _), n = p.adamss_A.shape, site.n_out
        cluster = _cluster(p.adamss_sizes, n)
        there = torch.arange(q, device=cluster.device) < p.adamss_sizes[:, 1:]  # small clusters have fewer ranks
        a, b = p.adamss_A * there.unsqueeze(-1), p.adamss_B * there[cluster]
        up = b.new_zeros(n, k, q).index_put((p.adamss_rows.long(), cluster), b).flatten(1)
        down = a.flatten(0, 1) @ p.adamss_newB.to(a.dtype)
        shift = up @ down[:, site.n_in] * site.scaling if down.shape[1] > site.n_in else None
        return Change(add=LowRank(up, down[:, : site.n_in], site.scaling), shift=shift)

    # ---------------------------------------------------------------- files

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = dict(tensors)
        for key in tensors:
            if not _SIZES.search(key):
                continue
            at = key.removesuffix("sizes")
            counts, ranks = out.pop(key).T.tolist()
            a, b = out.pop(f"{at}A"), out.pop(f"{at}B").split(counts)
            for c, rank in enumerate(ranks):
                out[f"{at}A.{c}"], out[f"{at}B.{c}"] = a[c, :rank].contiguous(), b[c][:, :rank].contiguous()
        return out

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {k: t for k, t in tensors.items() if not _PART.search(k)}
        for at in dict.fromkeys(k[: m.start()] for k in tensors if (m := _PART.search(k))):
            a, b = ([tensors[f"{at}{x}.{c}"] for c in range(len(tensors)) if f"{at}{x}.{c}" in tensors] for x in "AB")
            if len(a) != len(b) or not a:
                out |= {k: t for k, t in tensors.items() if k.startswith(at)}  # loading will say that they fit nowhere
                continue
            q = max(min(self.subspace_rank, a[0].shape[1]), *(len(t) for t in a))
            out[f"{at}A"] = torch.stack([torch.cat([t, t.new_zeros(q - len(t), t.shape[1])]) for t in a])
            out[f"{at}B"] = torch.cat([torch.cat([t, t.new_zeros(len(t), q - t.shape[1])], 1) for t in b])
            out[f"{at}sizes"] = torch.tensor([[len(y), len(x)] for x, y in zip(a, b, strict=True)], dtype=torch.int32)
        return out

    # ---------------------------------------------------------------- the schedule

    def acts(self) -> bool:
        return self.use_asa

    def before_step(self, sites: Sequence[Any], step: int) -> None:
        """Remember what has stopped to train, which optimizers with a memory would move on."""
        for s in sites:
            stopped = ~s.tensor("adamss_live")
            tensors = [(s.tensor("adamss_A"), stopped), (s.tensor("adamss_B"), stopped[_cluster(s.tensor("adamss_sizes"), s.n_out)])]
            s.memory["stopped"] = [(t, at, t.detach()[at]) for t, at in tensors] if bool(stopped.any()) else []
            for t, at, _ in s.memory["stopped"]:
                if t.grad is not None:
                    t.grad[at] = 0

    def after_step(self, sites: Sequence[Any], step: int) -> None:
        """Put back what has stopped, measure, and allocate unless the training loop does."""
        for s in sites:
            for t, at, values in s.memory.pop("stopped", ()):
                t.detach()[at] = values
        own = sites[0].memory
        if "asked" not in own:
            own["before"] = [s.tensor("adamss_live").clone() for s in sites]
            own["measured"] = self._allocate(sites, step - 1)  # PEFT's callback counts from 0

    def update_and_allocate(self, sites: Sequence[Any], global_step: int) -> None:
        """One step of the schedule, called between `optimizer.step()` and `zero_grad()`. From the first call on it does not run by itself."""
        own = sites[0].memory
        for s, live in zip(sites, own.pop("before", ()), strict=False):  # what this very step has done by itself is taken back
            s.tensor("adamss_live").copy_(live)
        own["asked"] = True
        self._allocate(sites, global_step, measured=own.pop("measured", False))

    def _allocate(self, sites: Sequence[Any], step: int, measured: bool = False) -> bool:
        """Measure, and stop what the schedule wants stopped at this step. Returns whether there is a measure that has not been used up."""
        if not self.init_warmup <= step <= self.final_warmup:
            return False
        own = sites[0].memory
        importance = own.setdefault("importance", Importance(self.asa_importance_beta, self.asa_uncertainty_beta))
        if not measured:
            importance.update([s.tensor(n) for n in ("adamss_A", "adamss_B") for s in sites])
        if step % self.mask_interval and step != self.final_warmup:
            return True
        scores, n = importance.scores(), len(sites)
        del own["importance"]
        if not scores:
            return False
        each = torch.cat([_means(s, a, b) for s, a, b in zip(sites, scores[:n], scores[n:], strict=True)])
        live = torch.cat([s.tensor("adamss_live").to(each.device) for s in sites])
        left = 1 - (step - self.init_warmup) / (self.final_warmup - self.init_warmup)
        target = int(self.asa_target_subspaces + (len(live) - self.asa_target_subspaces) * left**self.asa_schedule_exponent)
        if target < int(live.sum()):
            best = each.where(live, float("-inf")).topk(target).indices
            live = torch.zeros_like(live).index_fill(0, best, True)
            for s, part in zip(sites, live.split([len(s.tensor("adamss_live")) for s in sites]), strict=True):
                s.tensor("adamss_live").copy_(part)
        return False

    def check_saving(self, sites: Sequence[Any], step: int) -> None:
        moved = any(s.tensor("adamss_B").grad is not None and bool(s.tensor("adamss_B").any()) for s in sites)
        if moved and not step and "asked" not in sites[0].memory:
            raise SaveError(
                "AdaMSS has been trained with use_asa=True, and its schedule never advanced: no torch optimizer was seen to step, so all clusters still "
                "train. Call model.base_model.update_and_allocate(step) after each step, or set use_asa=False."
            )


class AdamssAsaCallback:
    """For transformers' Trainer: hands its count of steps to `update_and_allocate`. Without it the schedule runs just as well, by its own count."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        update = getattr(getattr(model, "base_model", model), "update_and_allocate", None)
        if update is not None:
            update(state.global_step)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("on_"):  # the Trainer's other events
            return lambda *args, **kwargs: None
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")


_SIZES = re.compile(r"(?:^|\.)adamss_sizes$")
_PART = re.compile(r"(?<=adamss_)[AB]\.\d+$")


def _cluster(sizes: Tensor, n: int) -> Tensor:
    """The cluster of each row of B, from the sizes (clusters, 2)."""
    return torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes[:, 0], output_size=n)


def _means(site: Any, a: Tensor, b: Tensor) -> Tensor:
    """Per cluster, the mean over its part of A plus that over its part of B."""
    rows, ranks = site.tensor("adamss_sizes").T
    of_b = b.new_zeros(len(a)).index_add(0, _cluster(site.tensor("adamss_sizes"), len(b)), b.sum(1))
    each: Tensor = a.sum((1, 2)) / (ranks * a.shape[2]) + of_b / (rows * ranks).clamp_min(1)
    return each


def _clusters(u: Tensor, k: int) -> tuple[Tensor, list[int]]:
    """(the rows of u, cluster after cluster, rising in each; how many each has), by k-means as PEFT calls it.

    Raises:
        ImportError: if scikit-learn is not there.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as e:
        raise ImportError(
            "AdaMSS finds its clusters with scikit-learn, as PEFT does, which is not installed: pip install scikit-learn. "
            "Adapters that veneer has saved load without it."
        ) from e
    means = KMeans(n_clusters=k, init="random", n_init=1, max_iter=10, random_state=123456789)
    labels = torch.from_numpy(means.fit_predict(u.detach().cpu().numpy())).long()
    return torch.argsort(labels, stable=True), torch.bincount(labels, minlength=k).tolist()
