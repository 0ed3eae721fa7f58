"""LN tuning: the modules that are targeted, meant are the norms, are trained whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..change import Swap
from ..errors import RouteError
from ..method import Leaf, Method


@dataclass
class LNTuningConfig(Method, peft_type="LN_TUNING"):
    """The module runs with trained copies of all its tensors in the place of its own.   Zhao et al. 2023, arXiv:2312.11420.

    `ln_tuning_layers.<name>` for each parameter and buffer of the module, in its dtype: any module can be a target, not only a norm. Of a batch
    norm the running statistics are the copy's own as well, in training too. Of several adapters on a module one can act at a time.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | str | None = None

    prefix: ClassVar[str] = "ln_tuning_"
    kinds: ClassVar[frozenset[str]] = frozenset({"module"})
    exceptions: ClassVar[Any] = {"both_at_once_merge_as_they_run": "two copies cannot both stand in one place, which is refused"}

    def has_delta(self) -> bool:
        return False  # it replaces a whole module

    def check_together(self, others: Sequence[Method]) -> None:
        if others:
            raise RouteError("Two active adapters each replace the whole of a module, and one can at a time. Activate one of them.")

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        saved = site.module.state_dict()

        def leaf(name: str, value: Any) -> Leaf:
            weight = isinstance(value, nn.Parameter)
            # inside a module that has modules PEFT's files keep the adapter's name, and PEFT reads them under that name only
            on_disk = f"ln_tuning_layers.{site.adapter}.{name}" if "." in name else None
            return Leaf(
                tuple(value.shape), lambda t: t.copy_(value), container="ln_tuning_layers", attr=name, on_disk=on_disk, dtype=value.dtype,
                trainable=weight and value.is_floating_point(), running=not weight, saved=name in saved,
            )  # fmt: skip

        return {name: leaf(name, value) for name, value in site.tensors().items()}

    def change(self, p: Any, site: Any) -> Swap:
        return Swap(vars(p))
