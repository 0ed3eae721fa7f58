"""What stands in the place of a module and holds what adapters train there: its public face, under PEFT's names."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

from torch import Tensor, nn

from ..errors import ConfigError, PeftWarning
from ..sharding import unreduced
from .holders import visited
from .route import Choice, Switch


class Wrapper(nn.Module, ABC):
    """Stands in the place of a module. Which adapters act there is told by the call, by the thread, or by what was set here alone.

    Attributes:
        switch: what all wrappers of a model share.
        name: the module's path when it was wrapped.
        own: what was chosen for this one alone.
        leads: whether modules trained whole follow it when it is switched on again.
    """

    leads: ClassVar[bool] = True
    switch: Switch
    name: str
    own: Choice | None

    @abstractmethod
    def inside(self) -> nn.Module:
        """The module that was there."""

    @abstractmethod
    def adapters(self) -> list[str]:
        """The adapters that have something here."""

    @abstractmethod
    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let what these adapters train here get gradients, or not."""

    @abstractmethod
    def take_off(self, adapter_name: str) -> None:
        """Drop an adapter with its tensors. Which adapters act is not touched."""

    @abstractmethod
    def adapter_slots(self, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """(name in the file, name in memory, key, owner) of each saved tensor, relative to this module's path."""

    def chosen(self) -> Choice:
        """The choice that holds here and now."""
        return self.own or self.switch.chosen()

    def _replicate_for_data_parallel(self) -> Wrapper:
        """For nn.DataParallel, whose threads know nothing of the blocks of the one that calls: the choice goes along."""
        new: Wrapper = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        new.own = self.now()
        return new

    def now(self) -> Choice:
        """The choice by which it would run here and now."""
        choice, block = self.switch.holds()
        return choice if self.own is None or block else self.own

    @property
    def active_adapters(self) -> list[str]:
        return list(self.chosen().names or ())

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def disable_adapters(self) -> bool:
        return not self.chosen().enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose adapters for this module alone, and let just these train (none in inference mode)."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self.own = Choice(names, None, self.chosen().enabled)
        self.require_grad_only(() if inference_mode else names)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch this module's adapters on or off. What trains stays what trained.

        Modules trained whole that were switched off come back with the last adapted layer: transformers' `disable_adapters` asks them and its
        `enable_adapters` does not.
        """
        self.own = Choice(self.chosen().names, None, enabled)
        off = self.switch.off
        if not enabled:
            off[self] = None
        elif self in off:
            del off[self]
            followers = [w for w in off if isinstance(w, Wrapper)]
            if not self.leads or any(w.leads for w in followers):
                return
            for follower in followers:
                follower.own = Choice(follower.chosen().names, None, True)
            off.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off, with its tensors."""
        self.take_off(adapter_name)

    def require_grad_only(self, names: Sequence[str]) -> None:
        """Let what these adapters train here get gradients, and nothing else here."""
        for adapter in self.adapters():
            self.set_requires_grad(adapter, adapter in names)


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """Every module that holds tensors of adapters, with its path: adapted layers and modules trained whole."""
    for path, module in visited(model):
        if isinstance(module, Wrapper):
            yield path, module


def check_reduced(adapter: str, name: str, tensors: Iterable[Tensor]) -> None:
    """Raise ConfigError if these tensors of an adapter, which acts here in training, are not among those whose gradients the processes add up (DDP)."""
    if unreduced(tensors):
        raise ConfigError(
            f"{name}: the adapter {adapter!r} trains, and DistributedDataParallel, which is around the model, does not know its tensors: it adds up the "
            "gradients of what trained when it was made, and every process would train a copy of its own. Add all adapters and let train what is to train "
            "(set_adapter) before the model is wrapped, or wrap it anew now: DistributedDataParallel(wrapped.module)."
        )


def warn_of_heir(deleted: str, now: str, stacklevel: int) -> None:
    """Say that another adapter acts, and trains, in the place of the deleted one."""
    warnings.warn(
        f"Adapter {deleted} was active which is now deleted. Setting active adapter to {now}.", PeftWarning, stacklevel=stacklevel
    )
