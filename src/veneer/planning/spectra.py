"""How much each rank of each layer is worth, from a few batches: by the gradient of its weight, or by how its inputs vary (EVA)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError

Search = Literal["gradient", "eva"]
_MORE = 8  # directions of a sketch beyond those that are asked for


def layer_spectra(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Any]], k: int, search: Search
) -> tuple[dict[str, list[float]], int]:
    """The first k values of each layer, falling, and how many tokens (rows of the first layer's input) were looked at.

    "gradient": singular values of the gradient of W, which is never formed: it is the product of what comes back to the layer's output and its input, and
    its leading directions come from a sketch (Halko et al. 2011, arXiv:0909.4061). They bound what a change of that rank can gain at first, with a step of
    fixed length. "eva": the shares of the variance of the inputs, as in Paischer et al. 2024, arXiv:2410.07170. No weight gets a gradient, and the model is
    afterwards as it was.

    Raises:
        ConfigError: if there are no batches, one gives no loss, or a layer is never reached.
    """
    found: dict[str, list[Tensor]] = {n: [] for n in layers}
    tokens = 0
    flags = [(p, p.requires_grad) for p in model.parameters()]
    mask: list[Tensor | None] = [None]
    generator = torch.Generator().manual_seed(0)

    def rows(t: Tensor) -> Tensor:
        t = t.detach()
        if mask[0] is not None and t.ndim == 3 and t.shape[:2] == mask[0].shape:
            return t[mask[0]].float()
        return t.reshape(-1, t.shape[-1]).float()

    def begin(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0]
            return args if x.requires_grad or search == "eva" else (x.detach().requires_grad_(True), *args[1:])

        return hook

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = rows(args[0])
            if search == "eva":
                found[name].append(_shares(x, k))
                return
            held = [x]  # of this call: the layer may be called again before anything comes back
            output.register_hook(lambda g: found[name].append(_sketch(rows(g), held.pop(), k, generator)))

        return hook

    handles = [m.register_forward_pre_hook(begin(n)) for n, m in layers.items()] + [
        m.register_forward_hook(watch(n)) for n, m in layers.items()
    ]
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    count = 0
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        for batch in batches:
            moved = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in batch.items()}
            attention = moved.get("attention_mask")
            mask[0] = attention.bool() if isinstance(attention, Tensor) and attention.ndim == 2 else None
            with torch.set_grad_enabled(search == "gradient"):
                out = model(**moved)
                if search == "gradient":
                    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
                    if loss is None:
                        raise ConfigError("The rank search by gradients needs a loss: give batches with `labels`, or search='eva'.")
                    loss.backward()
            first = next((t for t in moved.values() if isinstance(t, Tensor)), None)
            tokens += first.shape[0] * (first.shape[1] if first.ndim > 1 else 1) if first is not None else 0
            count += 1
    finally:
        for handle in handles:
            handle.remove()
        for p, on in flags:
            p.requires_grad_(on)
        model.train(training)
    if not count:
        raise ConfigError("The data give no batch.")
    silent = [n for n, s in found.items() if not s]
    if silent:
        raise ConfigError(f"The data never reach {silent[0]!r}{f' and {len(silent) - 1} more' if silent[1:] else ''}.")
    return {n: _mean(s) for n, s in found.items()}, tokens


def _sketch(g: Tensor, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Leading singular values of gᵀ x, g (tokens, n_out), x (tokens, n_in)."""
    width = min(k + _MORE, g.shape[1], x.shape[1])
    q = torch.linalg.qr(g.T @ (x @ torch.randn(x.shape[1], width, generator=generator).to(x)))[0]
    p = torch.linalg.qr(x.T @ (g @ q))[0]
    q = torch.linalg.qr(g.T @ (x @ p))[0]
    s: Tensor = torch.linalg.svdvals((g @ q).T @ (x @ p))
    return s[:k]


def _shares(x: Tensor, k: int) -> Tensor:
    """The share of the variance of the rows of x that each leading direction explains."""
    centred = x - x.mean(0)
    width = min(k + _MORE, *x.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        s = torch.svd_lowrank(centred, q=width, niter=2)[1]
    return s[:k].square() / centred.square().sum().clamp_min(1e-30)


def _mean(spectra: Sequence[Tensor]) -> list[float]:
    short = min(len(s) for s in spectra)
    return torch.stack([s[:short].double() for s in spectra]).mean(0).tolist()


def allot(gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int, per_cost: bool) -> dict[str, int]:
    """Ranks by layer within a budget, each to where the next one is worth most; a layer may get none.

    Args:
        gains: by layer, what its 1st, 2nd … rank is worth;  costs: by layer, the parameters of one rank;  budget: parameters.
        per_cost: whether a rank's worth is divided by its cost.
    """
    ranks = dict.fromkeys(gains, 0)
    queue = [(-_worth(g, 0, costs[n], per_cost), n) for n, g in gains.items()]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if costs[name] > budget:
            continue
        ranks[name] += 1
        budget -= costs[name]
        if ranks[name] < len(gains[name]):
            heapq.heappush(queue, (-_worth(gains[name], ranks[name], costs[name], per_cost), name))
    return ranks


def _worth(gains: Sequence[float], i: int, cost: int, per_cost: bool) -> float:
    value = gains[i] / (cost if per_cost else 1)
    return value if math.isfinite(value) else 0.0
