"""What happens to each layer in training, whatever the loss: norms of gradients, of updates and of weights, and the effective rank of ΔW."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine.layer import AdaptedLayer, adapted_layers
from ..errors import ConfigError
from .depth import Trained, trained
from .hooks import Control
from .spectra import effective_rank, singular_values

MEASURES = ("gradient", "update", "weight", "delta", "effective_rank")


class LayerStatistics(Control):
    """Measures each module that trains, every so many steps of an optimizer.

    gradient, update and weight are 2-norms over the module's trained tensors: of the gradient that the step uses (after clipping, if that is attached
    before), of the difference that the step makes, and of the values after it. delta and effective_rank are of ΔW after the step, where there is one:
    its Frobenius norm, and exp of the entropy of its singular values, between 1 and the rank. A frozen module has no gradient and the update 0.

    Args:
        model: what trains in it is measured.
        every: steps between measurements; the first step is measured.
        json_path: a file that gets one line of JSON for each measurement, {"step": 1, "layers": {name: {measure: number}}}.
        tensorboard: a folder for TensorBoard (needs the package `tensorboard`), or a SummaryWriter: tags are `measure/module`.
        spectra: whether to take the singular values of ΔW, which is the dear part where ΔW is not of low rank by its form.

    Attributes:
        records: the measurements, as in the file.

    Raises:
        ConfigError: if `every` is not positive, nothing trains, or TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 10,
        json_path: str | os.PathLike[str] | None = None,
        tensorboard: Any = None,
        spectra: bool = True,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"statistics: every is a number of steps, 1 or more, got {every!r}.")
        self.every, self.records = every, []  # type: tuple[int, list[dict[str, Any]]]
        self.groups: dict[str, list[Trained]] = {}
        for t in trained(model)[0]:
            self.groups.setdefault(t.module or t.leaf, []).append(t)
        self.layers = _layers(model) if spectra else {}
        self.json_path = Path(json_path) if json_path is not None else None
        self.writer = _writer(tensorboard) if isinstance(tensorboard, (str, os.PathLike)) else tensorboard
        self._before: dict[str, dict[str, Any]] = {}

    def due(self) -> bool:
        """Whether the step that comes next is measured."""
        return self.step % self.every == 0

    @torch.no_grad()
    def before(self, optimizer: Optimizer) -> None:
        self._before = {}
        if self.due():
            for name, ts in self.groups.items():
                grads = [t.parameter.grad for t in ts if t.parameter.grad is not None]
                self._before[name] = {"gradient": _norm(grads) if grads else None, "values": [t.parameter.detach().clone() for t in ts]}

    @torch.no_grad()
    def after(self, optimizer: Optimizer) -> None:
        if not self._before:
            return
        found: dict[str, dict[str, float | None]] = {}
        for name, ts in self.groups.items():
            then, now = self._before[name], [t.parameter.detach() for t in ts]
            found[name] = {
                "gradient": then["gradient"],
                "update": _norm([a - b for a, b in zip(now, then["values"], strict=True)]),
                "weight": _norm(now),
            }
            for layer, adapter in self.layers.get(name, ()):
                s = singular_values(layer, adapter)
                if s is not None:
                    found[name] |= {"delta": float(s.norm()), "effective_rank": effective_rank(s)}
        self._before = {}
        self._keep({"step": self.step, "layers": found})

    def _keep(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.json_path is not None:
            self.json_path.parent.mkdir(parents=True, exist_ok=True)
            with self.json_path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
        if self.writer is not None:
            for name, measures in record["layers"].items():
                for measure, value in measures.items():
                    if value is not None:
                        self.writer.add_scalar(f"{measure}/{name}", value, record["step"])
            self.writer.flush()

    def series(self, measure: str) -> dict[str, list[tuple[int, float]]]:
        """(step, value) by module, of one of `MEASURES`."""
        out: dict[str, list[tuple[int, float]]] = {}
        for r in self.records:
            for name, measures in r["layers"].items():
                if measures.get(measure) is not None:
                    out.setdefault(name, []).append((r["step"], measures[measure]))
        return out


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensors]).norm())


def _layers(model: nn.Module) -> dict[str, list[tuple[AdaptedLayer, str]]]:
    """By name in the user's model: the adapters that train on a layer."""
    out: dict[str, list[tuple[AdaptedLayer, str]]] = {}
    for _, layer in adapted_layers(model):
        for adapter, a in layer.attached.items():
            if any(leaf.trainable and a.tensor(n).requires_grad for n, leaf in a.leaves.items()) and a.place is not None:
                out.setdefault(a.place.name, []).append((layer, adapter))
    return out


def _writer(folder: Any) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ConfigError('statistics: TensorBoard is not installed: pip install "veneer[train]"') from e
    return SummaryWriter(str(folder))  # type: ignore[no-untyped-call]
