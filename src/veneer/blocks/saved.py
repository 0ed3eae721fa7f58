"""modules_to_save: a whole module trained as a copy per adapter, the original kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..engine.holders import Keyed, keep_dtypes
from ..engine.mixing import layout_of, split_rows
from ..engine.modules import saved_tensors
from ..engine.offload import stay
from ..engine.route import BASE, Choice, Switch
from ..engine.wrapper import Wrapper, check_reduced
from ..errors import RouteError
from ..sharding import copied
from ..sites.parallel import Plan, check_copied, check_runs_as_copy, is_cut, whole_copy


class ModulesToSaveWrapper(Wrapper):
    """A module and its trained copies, one per adapter. With no copy active the original acts.

    Attributes:
        original_module: the module that was there, frozen.
        modules_to_save: the trained copies by adapter.
        cut, plan: whether a tensor-parallel plan keeps the original in pieces, and how; a copy is whole on every process.
    """

    leads: ClassVar[bool] = False

    def __init__(self, module: nn.Module, switch: Switch, name: str) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = Keyed()
        self.switch = switch
        self.name = name
        self.own: Choice | None = None
        self.training = module.training
        self.cut = is_cut(module)
        if self.cut:
            check_copied(module, name)
        else:
            check_runs_as_copy(module, name)
        self.plan: Plan | None = None

    def attach(self, adapter: str, tied_to: nn.Module | None = None) -> None:
        """Make the copy that `adapter` trains; `tied_to`: a trained copy whose weight this one shares."""
        new = whole_copy(self.original_module) if self.cut else copied(self.original_module)
        stay(new, self.original_module)
        if tied_to is not None:
            new.weight = tied_to.weight
        keep_dtypes(new)
        self.modules_to_save[adapter] = new

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        choice = self.switch.current(self.own)
        if choice.rows is None or not choice.enabled:
            return self._run(list(choice.names or ()) if choice.enabled else [], args, kwargs)
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(choice.rows):
            groups.setdefault(name if name in self.modules_to_save else BASE, []).append(i)
        if len(groups) == 1:
            return self._run(list(groups), args, kwargs)
        return split_rows(groups, choice.rows, layout_of(self.original_module), args, kwargs, self._run, self.name)

    def _run(self, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any], at: Tensor | None = None) -> Any:
        mine = [n for n in names if n in self.modules_to_save]
        if len(mine) > 1:
            raise RouteError(
                f"The adapters {mine} each have their own trained copy of {self.name!r} (modules_to_save), and only one of them can act at a time. "
                "Activate one of them, or combine them first."
            )
        module = self.modules_to_save[mine[0]] if mine else self.original_module
        if mine and self.training:
            check_reduced(mine[0], self.name, module.parameters())
        if mine and self.cut and is_cut(self.original_module):  # FSDP2's tensors are whole by now
            if self.plan is None:
                self.plan = Plan(self.original_module, self.original_module.weight, args[0], self.name)
            return self.plan.part(module(self.plan.whole(args[0])))
        return module(*args, **kwargs)

    def acting(self) -> nn.Module:
        """The copy that is active now, else the original."""
        choice = self.now()
        mine = [n for n in choice.names or () if n in self.modules_to_save] if choice.enabled else []
        return self.modules_to_save[mine[0]] if mine else self.original_module

    # ---------------------------------------------------------------- the like of an adapted layer

    def inside(self) -> nn.Module:
        return self.original_module

    def adapters(self) -> list[str]:
        return list(self.modules_to_save)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these copies get gradients, or not."""
        for adapter in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            if adapter in self.modules_to_save:
                for p in self.modules_to_save[adapter].parameters():
                    if p.is_floating_point():
                        p.requires_grad_(requires_grad)

    def take_off(self, adapter_name: str) -> None:
        """Drop the copy of one adapter."""
        self.modules_to_save._modules.pop(adapter_name, None)

    def adapter_slots(self, adapter: str) -> Iterator[tuple[str, str, str, nn.Module]]:
        """(name in the file, name in memory, key, owner) of each tensor of the adapter's copy."""
        if adapter not in self.modules_to_save:
            return
        for name, key, owner in saved_tensors(self.modules_to_save[adapter]):
            yield name, f"modules_to_save.{adapter}.{name}", key, owner

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Keys that transformers' loader has yet to rename: none, `build_peft_weight_mapping` knows these too."""
        return {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self._modules or name.startswith("__"):
                raise
            return getattr(self.acting(), name)
