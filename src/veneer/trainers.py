"""transformers' Trainer told what veneer's models are.

Trainer asks of a model whether it is PEFT's. If so, it takes columns and labels from the forward of the model beneath, saves the adapter and loads it back;
of any other model it writes all weights into each checkpoint, and drops the columns that the wrapper's forward does not name. `import veneer.compat` answers
for the whole of PEFT; this is for those who import veneer alone: where Trainer names PEFT's class, it names veneer's as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TRAINER = "transformers.trainer"


def introduce(kind: type) -> None:
    """Tell Trainer that models of this class are PeftModels, now or as soon as it is imported. Again changes nothing."""
    if _TRAINER in sys.modules:
        _tell(kind)
    elif not any(isinstance(f, _Waiting) for f in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(kind))  # type: ignore[arg-type]  # a finder is anything with this method


class _Waiting:
    """Stands before the import system's finders until Trainer's module is asked for."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec that is found anyhow; once its module has run, that is told."""
        if name != _TRAINER:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = PathFinder.find_spec(name, path, target)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _tell(self.kind)

            loader.exec_module = exec_module
        return spec


def _tell(kind: type) -> None:
    trainer: Any = sys.modules[_TRAINER]
    asked: Any = sys.modules.get("transformers.trainer_utils")
    if "_is_peft_model" not in vars(asked) or not hasattr(trainer, "is_peft_available"):
        return  # a version that asks otherwise
    for module in (asked, trainer):
        known = vars(module).get("PeftModel", ())
        kinds = known if isinstance(known, tuple) else (known,)
        if any(issubclass(kind, k) for k in kinds):
            return  # told before, or PEFT is veneer here
        module.PeftModel = (*kinds, kind)
        vars(module).setdefault("PeftMixedModel", kind)
        module.is_peft_available = _yes
    if hasattr(trainer, "update_fsdp_plugin_peft"):
        theirs = trainer.update_fsdp_plugin_peft

        def update_fsdp_plugin_peft(model: Any, accelerator: Any) -> None:
            if not isinstance(model, kind):  # it would ask PEFT what to wrap; that stays as the launcher was told
                theirs(model, accelerator)

        trainer.update_fsdp_plugin_peft = update_fsdp_plugin_peft


def _yes() -> bool:
    return True
