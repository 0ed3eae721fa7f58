"""What runtimes can serve: facts about each, and what to change where an adapter asks for more.

Sources: vLLM's vllm/lora/peft_helper.py, vllm/config/lora.py (MaxLoRARanks) and docs/features/lora.md (0.2x); llama.cpp's convert_lora_to_gguf.py and
src/llama-adapter.cpp; diffusers 0.42's loaders/peft.py, loaders/lora_base.py and utils/peft_utils.py; mlx-lm 0.32's tuner/utils.py, lora.py and dora.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import PeftConfig
from ..engine.defaults import CONFIG_NAME
from ..errors import ConfigError, ConversionError, hint
from ..methods.lora import LoraConfig
from ..variants import VARIANTS
from . import gguf

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MERGE = "Merge it (model.merge_and_unload()) and serve the model"


@dataclass(frozen=True)
class Finding:
    """What a runtime cannot serve, and what to change.

    Attributes:
        what: the fact, with the config's field.
        change: what to do after training, or before.
    """

    what: str
    change: str


def check(
    adapter: str | os.PathLike[str] | PeftConfig, runtime: str, *, max_rank: int | None = None, model_type: str | None = None
) -> list[Finding]:
    """What `runtime` can't serve of an adapter; an empty list: it serves all of it.

    Args:
        adapter: a folder or file of any format that veneer reads; or, before training, a config.
        runtime: one of `RUNTIMES`.
        max_rank: the runtime's own limit (vLLM's --max-lora-rank, 16 by default).
        model_type: the base model's, as its config.json has it.

    Raises:
        ConfigError: if there is no such runtime.
        LoadError: if the adapter cannot be read.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"There is no runtime {runtime!r} in the table: {', '.join(RUNTIMES)}.{hint(runtime, RUNTIMES)}")
    kinds: set[str] = set()
    others: list[str] = []
    if isinstance(adapter, PeftConfig):
        configs = [adapter]
    else:
        configs, kinds, others = _read(Path(adapter))
    return [f for config in configs for f in _findings(runtime, _Asked(config, kinds, others, max_rank, model_type))]


def _findings(runtime: str, a: _Asked) -> Iterator[Finding]:
    yield from _only_lora(a, also=_ALSO.get(runtime, ()))
    if isinstance(a.config, LoraConfig):
        yield from RUNTIMES[runtime](a)


@dataclass(frozen=True)
class _Asked:
    """What the rules look at: `kinds` and `others` are known after training alone."""

    config: Any
    kinds: set[str]
    others: list[str]
    max_rank: int | None
    model_type: str | None

    @property
    def ranks(self) -> list[int]:
        return sorted({self.config.r, *(self.config.rank_pattern or {}).values()})

    @property
    def targets(self) -> list[str]:
        named = self.config.target_modules
        return [named] if isinstance(named, str) else list(named or [])


def _read(path: Path) -> tuple[list[Any], set[str], list[str]]:
    """The configs, kinds of layers and other tensors of an adapter, also of one that cannot be converted."""
    from .convert import FORMATS, detect
    from .peft import config_for

    name = detect(path)
    if name == "peft" and (path / CONFIG_NAME).is_file():
        config = PeftConfig.from_pretrained(path)
        try:
            parts = list(FORMATS[name].read(path).values())
        except ConversionError:
            return [config], set(), []
        configs = [config]
    else:
        parts = list(FORMATS[name].read(path).values())
        configs = [config_for(part, []) for part in parts]
    layers = [f for part in parts for f in part.layers.values()]
    kinds = {"embedding" if f.embedding else "conv" if f.down.ndim > 2 else "linear" for f in layers}
    return configs, kinds, [k for part in parts for k in part.others]


# ---------------------------------------------------------------- rules that several runtimes share


_ALSO = {"diffusers": ("LOKR",)}  # other methods that a runtime serves


def _only_lora(a: _Asked, also: tuple[str, ...]) -> Iterator[Finding]:
    if not isinstance(a.config, LoraConfig):
        if a.config.peft_type not in also:
            yield Finding(
                f"{a.config.peft_type} is not served; LoRA is.",
                f"Turn it into a LoRA (veneer.save_as_lora(path, model, rank)). {_MERGE}, else.",
            )
        return
    for name in VARIANTS:
        if getattr(a.config, name) and name != "use_dora":
            yield Finding(
                f"`{name}` is not served.", f"Turn it into a plain LoRA (veneer.save_as_lora). {_MERGE}, else; or train without `{name}`."
            )
    start = a.config.init_lora_weights
    if isinstance(start, str) and start.split("_")[0] in ("pissa", "olora", "corda", "loftq", "lora"):
        yield Finding(
            f"`init_lora_weights={start!r}` counts the change from start values that no runtime reads.",
            "Save with save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it a plain LoRA.",
        )
    for name in ("target_parameters", "layer_replication"):
        if getattr(a.config, name):
            yield Finding(f"`{name}` is not served.", f"{_MERGE}, or train on modules.")


def _no_dora(a: _Asked) -> Iterator[Finding]:
    if getattr(a.config, "use_dora", False):
        yield Finding("`use_dora` is not served.", f"{_MERGE}; or train with use_dora=False.")


def _no_whole_modules(a: _Asked) -> Iterator[Finding]:
    if a.config.modules_to_save:
        yield Finding(
            f"`modules_to_save={list(a.config.modules_to_save)}` is not served.",
            f"{_MERGE}; or give those modules a LoRA (target_modules).",
        )
    if getattr(a.config, "trainable_token_indices", None):
        yield Finding("`trainable_token_indices` is not served.", f"{_MERGE}, with the tokenizer that has the tokens.")
    if not a.config.modules_to_save and (extra := [k for k in a.others if ".bias" not in k and "token_adapter" not in k]):
        yield Finding(
            f"The file holds {len(extra)} whole tensors, such as {extra[0]!r}.", f"{_MERGE}; or save with save_embedding_layers=False."
        )


def _no_bias(a: _Asked) -> Iterator[Finding]:
    if getattr(a.config, "bias", "none") != "none":
        yield Finding(f"`bias={a.config.bias!r}` is not served.", f"{_MERGE}; or train with bias='none'.")
    if getattr(a.config, "lora_bias", False):
        yield Finding("`lora_bias` is not served.", f"{_MERGE}; or train with lora_bias=False.")


def _kinds(a: _Asked, served: tuple[str, ...], words: str) -> Iterator[Finding]:
    for kind in sorted(a.kinds - set(served)):
        yield Finding(f"LoRA of {kind} layers is not served ({words}).", f"{_MERGE}; or leave those layers out of target_modules.")


def _plain(a: _Asked) -> Iterator[Finding]:
    """What goes with LoRAs of linear layers and the token table alone."""
    yield from _no_dora(a)
    yield from _no_whole_modules(a)
    yield from _no_bias(a)
    yield from _kinds(a, ("linear", "embedding"), "linear layers and the token table")


# ---------------------------------------------------------------- the runtimes, for LoRAs


def _vllm(a: _Asked) -> Iterator[Finding]:
    yield from _plain(a)
    top, limit = a.ranks[-1], a.max_rank or 16
    fits = next((r for r in VLLM_RANKS if r >= top), None)
    if a.max_rank is not None and a.max_rank not in VLLM_RANKS:
        yield Finding(
            f"--max-lora-rank {a.max_rank} is none of {VLLM_RANKS}.",
            f"Start with --max-lora-rank {next((r for r in VLLM_RANKS if r >= a.max_rank), 512)}.",
        )
    if fits is None:
        yield Finding(
            f"Rank {top} is above {VLLM_RANKS[-1]}, the largest that is served.",
            "Cut the rank (veneer.save_as_lora(path, model, rank=512)) or merge.",
        )
    elif top > limit:
        yield Finding(
            f"Rank {top} is above --max-lora-rank {limit}{'' if a.max_rank else ' (the default)'}.",
            f"Start vLLM with --max-lora-rank {fits}.",
        )
    if a.config.alpha_pattern or len(a.ranks) > 1:
        name = "alpha_pattern" if a.config.alpha_pattern else "rank_pattern"
        yield Finding(
            f"`{name}` is passed over: the config's own lora_alpha and r scale all layers.",
            f"veneer convert ADAPTER OUT --to peft --uniform --rank {fits or top} gives all layers one rank and one alpha, and the same change.",
        )


def _llama_cpp(a: _Asked) -> Iterator[Finding]:
    yield from _plain(a)
    if a.config.use_rslora:
        yield Finding(
            "`use_rslora`: llama.cpp's own converter passes it over and scales by alpha / r.",
            "Use veneer convert --to gguf, which folds it into alpha.",
        )
    if a.config.alpha_pattern:
        yield Finding(
            "`alpha_pattern`: a GGUF adapter has one alpha.",
            "Use veneer convert --to gguf, which multiplies the difference into B and says what was rounded.",
        )
    if a.model_type is not None and a.model_type not in gguf.ARCHITECTURES:
        yield Finding(
            f"veneer convert does not know how llama.cpp orders {a.model_type!r} models.",
            f"{_MERGE}, after llama.cpp's convert_hf_to_gguf.py.",
        )


def _diffusers(a: _Asked) -> Iterator[Finding]:
    yield from _no_whole_modules(a)
    yield from _kinds(a, ("linear", "conv"), "linear layers and convolutions")
    if a.config.bias != "none":
        yield Finding(f"`bias={a.config.bias!r}` is not loaded.", f"{_MERGE}; or train with bias='none', lora_bias=True where needed.")
    if a.config.use_rslora:
        yield Finding(
            "`use_rslora` is read from the file's metadata alone.",
            "Use veneer convert --to diffusers, which writes it; save_lora_weights does with lora_metadata.",
        )


def _mlx(a: _Asked) -> Iterator[Finding]:
    yield from _no_whole_modules(a)
    yield from _no_bias(a)
    yield from _kinds(a, ("linear", "embedding"), "linear layers and embeddings")
    if len(a.ranks) > 1:
        yield Finding("`rank_pattern`: mlx-lm has one rank for all layers.", "Use veneer convert --to mlx, which pads with zeros.")
    if a.config.alpha_pattern or (a.config.use_rslora and len(a.ranks) > 1):
        yield Finding(
            "Layers have different alpha / r: mlx-lm has one scale.", "Use veneer convert --to mlx, which multiplies the difference into B."
        )


RUNTIMES: dict[str, Callable[[_Asked], Iterator[Finding]]] = {"vllm": _vllm, "llama.cpp": _llama_cpp, "diffusers": _diffusers, "mlx": _mlx}
