"""KappaTune: adapters for the layers with the best-conditioned weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .bases import codec_for

_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class KappaTuneSelector:
    """The linear layers, and the fused weights of experts, by the condition numbers of their weights: small ones first.

    κ = σ_max / (σ_min + 1e-8); of experts the mean. Layers of small κ carry their inputs on more evenly, and adapting them forgets less: arXiv:2506.16289.

    Args:
        model: the base model.
        max_dim_size_to_analyze: weights with a larger side are passed over.
        moe_param_suffixes: ends of the names of 3-D parameters that are experts; by default those of transformers' models.
        show_progress: show a bar (needs tqdm; without it there is none).
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = moe_param_suffixes or _SUFFIXES
        self.show_progress = show_progress
        self._modules: dict[str, float] | None = None
        self._parameters: dict[str, float] | None = None

    def get_best_targets(self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None) -> list[str]:
        """The linear layers, best first: `num_modules` of them, or a share `top_p` (one at least), or those with κ up to `threshold`, or all.

        Of several limits the first in this order counts.
        """
        if self._modules is None:
            found = [(n, m) for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
            self._modules = self._measured((n, codec_for(m).weight(m, "weight")) for n, m in self._bar(found, "linear layers"))
        return _best(self._modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The same of the 3-D parameters of experts."""
        if self._parameters is None:
            found = [(n, p) for n, p in self.model.named_parameters() if p.ndim == 3 and n.endswith(tuple(self.moe_param_suffixes))]
            self._parameters = self._measured(self._bar(found, "experts"))
        return _best(self._parameters, top_p, num_modules, threshold)

    def _measured(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        return {n: condition_number(w) for n, w in weights if max(w.shape[-2:]) <= self.max_dim_size_to_analyze}

    def _bar(self, found: list[tuple[str, Any]], what: str) -> Iterable[tuple[str, Any]]:
        if not self.show_progress:
            return found
        try:
            from tqdm import tqdm
        except ImportError:
            return found
        bar: Iterable[tuple[str, Any]] = tqdm(found, desc=f"Condition numbers of {what}", unit="weight")
        return bar


@torch.no_grad()
def condition_number(w: Tensor) -> float:
    """σ_max / (σ_min + 1e-8) of a matrix; of a stack of them the mean.

    From the eigenvalues of the smaller Gram matrix in float64, more exact than singular values in float32 up to κ of a few millions; beyond that from the
    singular values themselves.
    """
    m = w.detach().to(torch.float32 if w.device.type == "mps" else torch.float64)
    short = m if m.shape[-2] <= m.shape[-1] else m.mT
    squares = torch.linalg.eigvalsh(short @ short.mT).clamp_min(0)
    low, high = squares[..., 0], squares[..., -1]
    if bool((low <= 1e-12 * high).any()):
        s = torch.linalg.svdvals(m)
        low, high = s[..., -1].square(), s[..., 0].square()
    return float((high.sqrt() / (low.sqrt() + 1e-8)).mean())


def _best(numbers: Mapping[str, float], top_p: float | None, count: int | None, threshold: float | None) -> list[str]:
    names = sorted(numbers, key=lambda n: numbers[n])
    if count is not None:
        return names[:count]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    return names if threshold is None else [n for n in names if numbers[n] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """The share `top_p` of the layers with the smallest condition numbers, as arguments for a LoraConfig. See `KappaTuneSelector`.

    Returns:
        {"target_modules": names of linear layers, "target_parameters": names of experts' parameters, or None if there are none}.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {"target_modules": selector.get_best_targets(top_p), "target_parameters": selector.get_best_target_parameters(top_p) or None}
