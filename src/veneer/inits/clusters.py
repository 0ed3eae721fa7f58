"""The rows of a weight in clusters, found in its principal directions."""

from __future__ import annotations

import torch
from torch import Tensor


def principal(w: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """U (n_out, r) and V (r, n_in) with w ≈ U S V, by torch's randomised method from a seed of its own, as in PEFT."""
    kind = w.device.type
    with torch.random.fork_rng([] if kind == "cpu" else [w.device], device_type="cuda" if kind == "cpu" else kind):
        torch.manual_seed(seed)
        u, _, v = torch.svd_lowrank(w, q=r, niter=2)
    return u, v.T


def clusters(u: Tensor, k: int) -> tuple[Tensor, list[int]]:
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


def main_directions(rows: Tensor, rank: int, threshold: float = 0.0) -> Tensor:
    """The first `rank` right singular vectors of `rows` (n, r), or those whose squared value is above `threshold` of the largest, one at least."""
    _, s, v = torch.linalg.svd(rows, full_matrices=False)
    if threshold:
        rank = max(1, min(rank, int((s.square() > threshold * s[0].square()).sum())))
    directions: Tensor = v[:rank]
    return directions


def starting_directions(u: Tensor, rows: Tensor, counts: list[int], rank: int, threshold: float) -> tuple[Tensor, list[int]]:
    """(the main directions of each cluster (clusters, rank, r), zero beyond its own rank; these ranks)."""
    a, ranks = u.new_zeros(len(counts), rank, u.shape[1]), []
    for part, main in zip(rows.split(counts), a, strict=True):
        own = min(len(part), rank) or 1
        if len(part):
            directions = main_directions(u[part.to(u.device)], own, threshold)
            own = len(directions)
            main[:own] = directions
        ranks.append(own)
    return a, ranks
