"""Schedules and statistics as pictures; matplotlib draws."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from ..errors import ConfigError
from .freezing import FreezingSchedule
from .statistics import MEASURES, LayerStatistics


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any, Any]:
    try:
        import matplotlib
    except ImportError as e:
        raise ConfigError('Pictures need matplotlib: pip install "veneer[train]"') from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    return pyplot, figure, axes


def _save(pyplot: Any, figure: Any, path: str | os.PathLike[str]) -> None:
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as e:  # the latter of an ending that matplotlib does not know
        raise ConfigError(f"The picture {str(path)!r} could not be drawn: {e}") from e
    finally:
        pyplot.close(figure)


def rates_by_step(
    groups: Sequence[dict[str, Any]], steps: int, multiplier: Callable[[int], float] = lambda step: 1.0
) -> dict[str, list[float]]:
    """The learning rate of each parameter group at each step, by the group's name.

    Args:
        groups: of `parameter_groups`, or an optimizer's;  steps: how many.
        multiplier: what a schedule multiplies the rates by at a step, such as the function given to LambdaLR.
    """
    return {str(g.get("name", f"group {i}")): [g["lr"] * multiplier(s) for s in range(steps)] for i, g in enumerate(groups)}


def picture_of_schedule(
    path: str | os.PathLike[str],
    optimizer: Optimizer | Sequence[dict[str, Any]],
    steps: int,
    multiplier: Callable[[int], float] = lambda step: 1.0,
    freezing: FreezingSchedule | None = None,
) -> None:
    """Draw what is going to happen: the learning rate of each group by step, and which layers train when.

    Args:
        path: of the picture.
        optimizer: one, or its parameter groups, with the rates they begin with.
        steps, multiplier: as in `rates_by_step`.
        freezing: a schedule, for the lower half.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    groups = optimizer.param_groups if isinstance(optimizer, Optimizer) else optimizer
    pyplot, figure, axes = _figure(1 if freezing is None else 2, 1, (8, 4 if freezing is None else 8))
    top = axes[0][0]
    curves = rates_by_step(groups, steps, multiplier)
    for i, (name, curve) in enumerate(curves.items()):
        top.plot(range(steps), curve, label=name, color=pyplot.cm.viridis(i / max(len(curves) - 1, 1)))
    top.set_xlabel("step")
    top.set_ylabel("learning rate")
    if len(curves) <= 12:
        top.legend(fontsize=7)
    if freezing is not None:
        axes[1][0].imshow(
            trains_by_layer(freezing, steps), aspect="auto", origin="lower", interpolation="nearest", cmap="Blues", vmin=0, vmax=1
        )
        axes[1][0].set_xlabel("step")
        axes[1][0].set_ylabel("layer (share of its tensors that train)")
    _save(pyplot, figure, path)


def trains_by_layer(freezing: FreezingSchedule, steps: int) -> list[list[float]]:
    """By level (see `Depths.level`) and step: the share of the tensors there that train."""
    levels = sorted({t.level for t in freezing.trained})
    columns = []
    for step in range(steps):
        on = freezing.trains_at(step)
        by = {level: [on[t.name] for t in freezing.trained if t.level == level] for level in levels}
        columns.append([sum(v) / len(v) for v in by.values()])
    return [list(row) for row in zip(*columns, strict=True)]


def picture_of_statistics(path: str | os.PathLike[str], statistics: LayerStatistics) -> None:
    """Draw what has happened: one field for each measure, a row for each module, from the input up, a column for each measurement.

    Raises:
        ConfigError: if nothing has been measured, or matplotlib is not installed.
    """
    if not statistics.records:
        raise ConfigError("Nothing has been measured yet: attach the statistics to an optimizer, and step.")
    import math

    found = [(m, statistics.series(m)) for m in MEASURES]
    found = [(m, series) for m, series in found if series]
    pyplot, figure, axes = _figure(1, len(found), (3.2 * len(found), 5))
    steps = [r["step"] for r in statistics.records]
    for axis, (measure, series) in zip(axes[0], found, strict=True):
        grid = [[dict(series[n]).get(s, math.nan) for s in steps] for n in series]
        image = axis.imshow(grid, aspect="auto", origin="lower", interpolation="nearest", cmap="viridis")
        axis.set_title(measure.replace("_", " "), fontsize=9)
        axis.set_xticks([0, len(steps) - 1], [str(steps[0]), str(steps[-1])])
        axis.set_xlabel("step")
        figure.colorbar(image, ax=axis)
    axes[0][0].set_ylabel("module, from the input up")
    _save(pyplot, figure, path)


def heat(
    path: str | os.PathLike[str], title: str, grid: Sequence[Sequence[float]], columns: str, bars: Sequence[float], bars_title: str
) -> None:
    """Draw a field of numbers, a row for each layer from the input up, and a bar for each beside it.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    pyplot, figure, axes = _figure(1, 2, (9, 5))
    image = axes[0][0].imshow(grid, aspect="auto", origin="lower", interpolation="nearest", cmap="viridis")
    axes[0][0].set_title(title, fontsize=9)
    axes[0][0].set_xlabel(columns)
    axes[0][0].set_ylabel("layer, from the input up")
    figure.colorbar(image, ax=axes[0][0])
    axes[0][1].barh(range(len(bars)), bars, color="#2a6f97")
    axes[0][1].set_title(bars_title, fontsize=9)
    _save(pyplot, figure, path)
