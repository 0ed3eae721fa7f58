"""What all controls share: they act in an optimizer's own hooks, so a loop, a Trainer and a scaler need not know of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class Control(ABC):
    """Something that acts before or after each step of an optimizer.

    Attributes:
        step: how many steps have been made.
    """

    step: int = 0
    _handles: Sequence[RemovableHandle] = ()

    def attach(self, optimizer: Optimizer, step: int = 0) -> Sequence[RemovableHandle]:
        """Act at each step of this optimizer, in the place of the one it acted at before.

        Args:
            optimizer: any; accelerate's wrapper gives the one inside.
            step: how many steps have been made, where a run goes on.

        Returns:
            handles: `remove()` ends it.
        """
        inner: Any = optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        self.detach()
        self.step = step
        self.begin(inner)

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.before(optimizer)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.step += 1
            self.after(optimizer)

        self._handles = [inner.register_step_pre_hook(before), inner.register_step_post_hook(after)]
        return self._handles

    def detach(self) -> None:
        """Act no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def begin(self, optimizer: Optimizer) -> None:  # noqa: B027  not all have something to do
        """Check what the optimizer trains, and act on the first step."""

    def before(self, optimizer: Optimizer) -> None:  # noqa: B027
        """The gradients are there."""

    @abstractmethod
    def after(self, optimizer: Optimizer) -> None:
        """The step is made, and counted."""


@contextmanager
def attached(optimizer: Optimizer, controls: Sequence[Control], step: int = 0) -> Iterator[None]:
    """Controls that act within a block."""
    try:
        for c in controls:
            c.attach(optimizer, step)
        yield
    finally:
        for c in controls:
            c.detach()


def trainer_callback(controls: Sequence[Control]) -> Any:
    """A callback for transformers' Trainer (and what is built on it) with which these controls act from the beginning of the training to its end."""
    import transformers

    class Controls(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            for c in controls:
                c.attach(optimizer, state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for c in controls:
                c.detach()

    return Controls()
