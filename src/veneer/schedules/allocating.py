"""Methods whose parts compete in training: by themselves at each optimizer step, or where the training loop says so."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..errors import SaveError
from ..method import Targeted, of_training
from .importance import Importance


@dataclass
class Allocating(Targeted):
    """Abstract: measures what matters and takes away what matters least, step by step.

    Class attributes:
        first: the number of the first step, as PEFT's loop counts for the method.
        weighed: the leaves whose importance is measured.
    """

    first: ClassVar[int] = 1
    weighed: ClassVar[tuple[str, ...]]
    tuner_methods: ClassVar[Any] = {"update_and_allocate": of_training("update_and_allocate")}

    @abstractmethod
    def measure(self, sites: Sequence[Any], step: int) -> bool:
        """Take in the gradients of this step, if the schedule wants them; returns whether there were any."""

    @abstractmethod
    def importance(self) -> Importance:
        """Averages of no step yet."""

    def weigh(self, sites: Sequence[Any]) -> bool:
        """Take the gradients into the averages; returns whether there were any."""
        averages: Importance = sites[0].memory.setdefault("importance", self.importance())
        return averages.update(list(self._weighed(sites).values()))

    def _weighed(self, sites: Sequence[Any]) -> dict[str, Any]:
        return {f"{s.name}.{n}": s.tensor(n) for n in self.weighed for s in sites}

    @abstractmethod
    def allocate(self, sites: Sequence[Any], step: int) -> None:
        """Take away what the schedule wants gone at this step."""

    @abstractmethod
    def snapshot(self, sites: Sequence[Any]) -> Any:
        """What `allocate` may change."""

    @abstractmethod
    def restore(self, sites: Sequence[Any], before: Any) -> None:
        """Put back what `snapshot` has taken."""

    def after_step(self, sites: Sequence[Any], step: int) -> None:
        own = sites[0].memory
        own["measured"] = self.measure(sites, step - 1 + self.first)
        if "asked" not in own:
            own["before"] = self.snapshot(sites)
            self.allocate(sites, step - 1 + self.first)

    def update_and_allocate(self, sites: Sequence[Any], global_step: int) -> None:
        """One step of the schedule, called between `optimizer.step()` and `zero_grad()`. From the first call on it does not run by itself."""
        own = sites[0].memory
        if "before" in own:
            self.restore(sites, own.pop("before"))  # what this very step has done by itself is taken back
        own["asked"] = True
        if not own.pop("measured", False):
            self.measure(sites, global_step)
        self.allocate(sites, global_step)

    def carried(self, sites: Sequence[Any]) -> Mapping[str, Tensor | float]:
        own = sites[0].memory
        averages = own["importance"].named(list(self._weighed(sites))) if "importance" in own else {}
        return {**averages, **({"asked": True} if "asked" in own else {})}

    def carry_on(self, sites: Sequence[Any], carried: Mapping[str, Any]) -> None:
        own, averages = sites[0].memory, self.importance()
        averages.take(carried, self._weighed(sites))
        own.clear()
        if averages.mean:
            own["importance"] = averages
        if "asked" in carried:
            own["asked"] = True

    def never_advanced(self, what: str) -> SaveError:
        """The error for an adapter that was trained while its schedule stood still; `what` tells of both."""
        name = type(self).__name__.removesuffix("Config")
        return SaveError(
            f"{name} has been trained {what}: no torch optimizer was seen to step. Call model.base_model.update_and_allocate(step) after each step."
        )
