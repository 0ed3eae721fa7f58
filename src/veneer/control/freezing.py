"""Which layers train when: freezing and unfreezing by step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError, hint
from .depth import Depths, Trained, check_keys, fits, trained
from .hooks import Control


@dataclass(frozen=True)
class Phase:
    """What trains from a step on, until the next phase.

    Args:
        step: the first optimizer step of the phase, from 0.
        layers: which layers, from the input on: "all", "none", one number, a list of them, or a range such as "20:", ":4", "-2:" (as in Python). What
            stands before the layers goes with the first; what stands behind them, such as a head, always trains.
        only: of those, only tensors that fit one of these keys; keys as in `Rates`.
        freeze: tensors that fit one of these keys do not train, wherever they stand.
    """

    step: int = 0
    layers: str | int | Sequence[int] = "all"
    only: Sequence[str] = ()
    freeze: Sequence[str] = ()

    def __post_init__(self) -> None:
        layers = self.layers if isinstance(self.layers, Sequence) and not isinstance(self.layers, str) else [self.layers]
        if not _whole(self.step) or not (isinstance(self.layers, str) or all(_whole(n) for n in layers)):
            raise ConfigError(f"A phase has a whole number as its step and whole numbers or a range as its layers; got {self}.")
        for what in ("only", "freeze"):
            keys = getattr(self, what)
            if isinstance(keys, str) or not isinstance(keys, Sequence) or not all(isinstance(k, str) for k in keys):
                raise ConfigError(f"A phase's `{what}` is a list of keys, such as [lora_B], got {keys!r}.")

    def numbers(self, count: int) -> set[int]:
        """The layers that train, of `count`.

        Raises:
            ConfigError: for what is no range, or layers that there are not.
        """
        if self.layers == "all":
            return set(range(count))
        if self.layers == "none":
            return set()
        if isinstance(self.layers, str):
            m = re.fullmatch(r"\s*(-?\d*)\s*:\s*(-?\d*)\s*", self.layers)
            if m is None:
                raise ConfigError(
                    f"A phase's layers are 'all', 'none', numbers, or a range such as '20:'; got {self.layers!r}.{hint(self.layers, ('all', 'none'))}"
                )
            found = set(range(count)[slice(*(int(g) if g not in ("", "-") else None for g in m.groups()))])
            if not found:
                raise ConfigError(f"A phase's layers {self.layers!r} are none of the {count} layers. Write 'none' if that is meant.")
            return found
        asked = [self.layers] if isinstance(self.layers, int) else list(self.layers)
        strange = [n for n in asked if not -count <= n < count]
        if strange:
            raise ConfigError(f"A phase names the layers {strange}, and the model has the layers 0 to {count - 1}.")
        return {n % count for n in asked}


def _whole(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool)


def unfreezing(layers: int, every: int, at_a_time: int = 1, start: int = 0) -> list[Phase]:
    """Gradual unfreezing, Howard & Ruder 2018, arXiv:1801.06146, section 3.3: first the last layer, then one more from the end every so many steps.

    Args:
        layers: how many the model has;  every: steps between two unfreezings;  at_a_time: layers thawed at each.
        start: the step from which the last layers train.
    """
    if not all(_whole(n) for n in (layers, every, at_a_time, start)):
        raise ConfigError(f"Unfreezing: every, at_a_time and start are whole numbers, got {every!r}, {at_a_time!r} and {start!r}.")
    if min(layers, every, at_a_time) < 1:
        raise ConfigError(f"Unfreezing: layers, every and at_a_time are 1 or more, got {layers}, {every} and {at_a_time}.")
    ends = range(at_a_time, layers + at_a_time, at_a_time)
    return [Phase(start + i * every, "all" if n >= layers else f"{-n}:") for i, n in enumerate(ends)]


class FreezingSchedule(Control):
    """Lets layers train by phases. What is frozen gets no gradient (it is None), is passed over by the optimizer, and keeps its optimizer state.

    The optimizer has to hold everything that trains in any phase: build it before the schedule acts, which is when it is attached.

    Args:
        model: with adapters or without: what requires a gradient now is what the schedule is about.
        phases: by step; if the first begins later than 0, everything trains before.

    Attributes:
        depths: the model's layers.

    Raises:
        ConfigError: for no phases, two of one step, layers that there are not, a key that fits nothing, or a phase in which nothing trains.
    """

    def __init__(self, model: nn.Module, phases: Sequence[Phase]) -> None:
        self.trained, self.depths = trained(model)
        if not phases:
            raise ConfigError("A freezing schedule needs phases, such as Phase(0, layers='-2:').")
        steps = [p.step for p in phases]
        if len(set(steps)) < len(steps) or min(steps) < 0:
            raise ConfigError(f"The phases of a freezing schedule begin at different steps, from 0 on; got {steps}.")
        ordered = sorted(phases, key=lambda p: p.step)
        self.phases = ordered if ordered[0].step == 0 else [Phase(0), *ordered]
        self.plan: list[tuple[int, list[bool]]] = []
        for phase in self.phases:
            check_keys("freezing.only", phase.only, self.trained)
            check_keys("freezing.freeze", phase.freeze, self.trained)
            numbers = phase.numbers(self.depths.count)
            trains = [self._trains(t, phase, numbers, self.depths) for t in self.trained]
            if not any(trains):
                raise ConfigError(f"Nothing would train from step {phase.step} on ({phase}).")
            self.plan.append((phase.step, trains))

    @staticmethod
    def _trains(t: Trained, phase: Phase, numbers: set[int], depths: Depths) -> bool:
        inside = t.level > depths.count or max(t.level - 1, 0) in numbers
        return inside and (not phase.only or any(fits(k, t) for k in phase.only)) and not any(fits(k, t) for k in phase.freeze)

    def trains_at(self, step: int) -> Mapping[str, bool]:
        """Which tensors train at a step, by name."""
        return {t.name: on for t, on in zip(self.trained, self._at(step), strict=True)}

    def _at(self, step: int) -> list[bool]:
        return next(trains for begin, trains in reversed(self.plan) if begin <= step)

    def apply(self, step: int) -> None:
        """Freeze and thaw as the schedule says for the step that comes next. For loops that call it themselves."""
        for t, on in zip(self.trained, self._at(step), strict=True):
            t.parameter.requires_grad_(on)
            if not on:
                t.parameter.grad = None

    def release(self) -> None:
        """Let everything train again."""
        for t in self.trained:
            t.parameter.requires_grad_(True)

    def begin(self, optimizer: Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        lacking = [t.name for i, t in enumerate(self.trained) if id(t.parameter) not in held and any(trains[i] for _, trains in self.plan)]
        if lacking:
            raise ConfigError(
                f"The schedule lets {lacking[0]!r}{f' and {len(lacking) - 1} more' if lacking[1:] else ''} train, and the optimizer does not hold it. "
                "Build the optimizer while everything requires a gradient, before the schedule acts."
            )
        self.apply(self.step)

    def before(self, optimizer: Optimizer) -> None:
        for t, on in zip(self.trained, self._at(self.step), strict=True):
            if not on:  # a loop of its own may have thawed it
                t.parameter.grad = None

    def after(self, optimizer: Optimizer) -> None:
        if any(begin == self.step for begin, _ in self.plan):
            self.apply(self.step)

    def detach(self) -> None:
        if self._handles:
            self.release()
        super().detach()


def read_phases(spec: Any, layers: int) -> list[Phase]:
    """Phases from a recipe: a list of dicts with Phase's fields, or {every, at_a_time, start} for gradual unfreezing.

    Raises:
        ConfigError: for keys that there are not; names the nearest.
    """
    if isinstance(spec, Mapping):
        _check_fields(spec, ("every", "at_a_time", "start"))
        return unfreezing(layers, **{"every": 1, **spec})
    if not isinstance(spec, Sequence) or isinstance(spec, str):
        raise ConfigError(f"freezing is a list of phases, or {{every: 100}} for gradual unfreezing; got {spec!r}.")
    for phase in spec:
        if not isinstance(phase, Mapping):
            raise ConfigError(f"A phase has keys and values, such as {{step: 0, layers: '-2:'}}; got {phase!r}.")
        _check_fields(phase, ("step", "layers", "only", "freeze"))
    return [Phase(**phase) for phase in spec]


def _check_fields(given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"freezing: unknown key {key!r}. There are {', '.join(known)}.{hint(str(key), known)}")
