"""Gradients clipped layer by layer: one layer's outlier does not shorten the steps of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError, hint
from .depth import Trained, check_keys, check_table, fits, trained
from .hooks import Control


class LayerClipping(Control):
    """Before each step, the gradients of each layer are scaled down to a norm of at most `norm`, each layer by itself.

    Where a Trainer or a loop clips the norm of all gradients as well, that comes first.

    Args:
        model: what trains in it is clipped; tensors that are frozen later are passed over.
        norm: the largest 2-norm of a layer's gradient.
        by: "module": the tensors of one adapted module together; "layer": those of a layer of the model; "tensor": each alone.
        patterns: key -> norm of its own for the tensors that fit; keys as in `Rates`.

    Attributes:
        norms: of each layer's gradient before the last clipping, by name.

    Raises:
        ConfigError: for a norm that is not positive, an unknown `by`, or a key that fits nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: float,
        by: Literal["module", "layer", "tensor"] = "module",
        patterns: Mapping[str, float] | None = None,
    ) -> None:
        patterns = patterns or {}
        check_table("clipping: patterns", patterns)
        for name, value in (("norm", norm), *patterns.items()):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(f"clipping: {name} has to be a positive norm, got {value!r}.")
        known = ("module", "layer", "tensor")
        if by not in known:
            raise ConfigError(f"clipping: by is one of {', '.join(known)}, got {by!r}.{hint(str(by), known)}")
        all_, _ = trained(model)
        check_keys("clipping.patterns", patterns, all_)
        self.groups: dict[str, tuple[float, list[Trained]]] = {}
        for t in all_:
            own = next((k for k in patterns if fits(k, t)), None)
            place = t.name if by == "tensor" or not t.module else t.module if by == "module" else f"layer {t.level - 1}"
            key = place if own is None else f"{place} ({own})"
            self.groups.setdefault(key, (norm if own is None else patterns[own], []))[1].append(t)
        self.norms: dict[str, float] = {}

    @torch.no_grad()
    def clip(self) -> dict[str, float]:
        """Scale the gradients that are there now; returns each layer's norm before. For loops that call it themselves.

        A norm that is not finite is left to be seen: such a gradient is not scaled.
        """
        found: list[tuple[str, Tensor]] = []
        for name, (limit, ts) in self.groups.items():
            grads = [t.parameter.grad for t in ts if t.parameter.grad is not None]
            if not grads:
                continue
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]))
            factor = torch.where(torch.isfinite(norm), (limit / norm.clamp_min(1e-30)).clamp_max(1.0), 1.0)
            torch._foreach_mul_(grads, factor.to(grads[0].dtype) if len({g.dtype for g in grads}) == 1 else factor)
            found.append((name, norm))
        values = torch.stack([n for _, n in found]).tolist() if found else []
        self.norms = {name: value for (name, _), value in zip(found, values, strict=True)}
        return self.norms

    def before(self, optimizer: Optimizer) -> None:
        self.clip()

    def after(self, optimizer: Optimizer) -> None:
        pass
