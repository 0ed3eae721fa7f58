"""Arrow routers, made of the folders of LoRA adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .checkpoint.experts import split_source
from .engine.names import minimal_targets
from .engine.tree import places
from .errors import ConfigError
from .methods.lora import LoraConfig
from .model import PeftModel
from .variants import ArrowConfig

TASK, GENERAL, ROUTER = "task_{}", "gks_{}", "arrow_router"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: list[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """A model whose tokens go to the LoRA adapters that fit them, with the router `arrow_router` active.

    Args:
        base_model: any model.
        task_specific_adapter_paths: folders or names on the Hub (`owner/name`, or `owner/name/subfolder`); they become `task_0`, `task_1`, ...
        arrow_config: gets the experts' names.
        general_adapter_paths: with `use_gks`, the adapters whose mean is taken off the others: `gks_0`, ...
        adapter_kwargs: for `PeftModel.from_pretrained` and `load_adapter`.

    Raises:
        ConfigError: if there are no adapters, or they are not LoRA adapters of linear layers.
        LoadError: if one cannot be loaded.
    """
    if not task_specific_adapter_paths:
        raise ConfigError("`task_specific_adapter_paths` should contain at least one adapter path.")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ConfigError("You should provide general LoRA paths if you want to use GenKnowSub (`general_adapter_paths`).")
    paths = {TASK.format(i): p for i, p in enumerate(task_specific_adapter_paths)}
    general = {GENERAL.format(i): p for i, p in enumerate(general_adapter_paths or ())} if arrow_config.use_gks else {}
    model: PeftModel | None = None
    for name, path in {**paths, **general}.items():
        where, sub = split_source(path)
        options = {**sub, **adapter_kwargs}
        if model is None:
            model = PeftModel.from_pretrained(base_model, where, name, **options)
        else:
            model.load_adapter(where, name, **options)
    assert model is not None
    arrow_config.task_adapter_names, arrow_config.gks_adapter_names = list(paths), list(general)
    first = model.peft_config[TASK.format(0)]
    router = LoraConfig(
        arrow_config=arrow_config, target_modules=_targets(model.get_base_model(), paths), r=first.r, task_type=first.task_type
    )
    model.add_adapter(ROUTER, router)
    model.set_adapter(ROUTER)
    return model


def _targets(model: nn.Module, experts: Iterable[str]) -> list[str]:
    """The shortest names for all layers that one of the experts stands on, and for no others."""
    names = set(experts)
    there = {p.name: names & set(getattr(p.module, "attached", ())) for p in places(model)}
    return minimal_targets([n for n, hit in there.items() if hit], [n for n, hit in there.items() if not hit])
