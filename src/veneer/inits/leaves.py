"""Starts as the tensors of a LoRA layer, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from . import Start, start
from .base import wide

_COUNTED = ("pissa", "olora", "corda", "lora_ga")


def is_counted(config: Any, site: Any) -> bool:
    """Whether the change is counted from a frozen start: D = s (B A - B0 A0). Embeddings begin plainly, and heads tied to them with them."""
    kind = config.init_lora_weights
    return site.kind != "embedding" and not site.follows and isinstance(kind, str) and kind.startswith(_COUNTED)


def doubt(config: Any) -> str:
    """Why a start that a file does not bring cannot be found again; empty if it can."""
    kind = str(config.init_lora_weights)
    if kind.startswith("pissa_niter"):
        return "they were found from random directions, and those found from others stand in for them, as in PEFT"
    return "they came from gradients, so it fits only the base that PEFT has changed, not the original one" if kind == "lora_ga" else ""


def starting_leaves(config: Any, site: Any, *, only_frozen: bool) -> dict[str, Tensor]:
    """The values that a LoRA layer starts from, where they are not just its tensors' own: A, B, and A0, B0 where the start is counted.

    A start that is defined on another base leaves that in `site.new_base`.
    """
    if site.follows:
        return {}
    kind, embedding, count = config.init_lora_weights, site.kind == "embedding", is_counted(config, site)
    if only_frozen and kind == "corda" and not hasattr(site.module, "eigens"):
        return {}  # only the adapter's own file can bring them; without it loading is an error
    if only_frozen and kind == "lora_ga" and not hasattr(site.module, "_peft_loraga_grad"):
        # files of PEFT hold no start, and PEFT itself counts them from zero
        return {"lora_A0": torch.zeros(config.r, site.n_in), "lora_B0": torch.zeros(site.n_out, config.r)}
    if kind == "loftq" and site.storage is not None:
        if only_frozen:
            return {}  # the file's factors stand on a base that is quantised already
        raise ConfigError(
            f"init_lora_weights='loftq' quantises the weight itself, and {site.name!r} is quantised already ({site.storage}). Leave the start at True and "
            "call replace_lora_weights_loftq(model) afterwards."
        )
    if kind is True or (only_frozen and not count and kind != "loftq"):
        return {}  # the leaves' own start

    def weight() -> Tensor:
        w = wide(site.weight())
        if not w.is_meta and not bool(torch.isfinite(w).all()):
            raise ConfigError(
                f"The weight of {site.name!r} holds numbers that are not finite, so init_lora_weights={kind!r} finds no start in it. Load the model anew, "
                "or leave the start at True."
            )
        return w

    def begin(r: int) -> Start:
        return start(
            kind, weight, r, site.scaling,
            n_out=site.n_out, n_in=site.n_in * site.groups, config=config, context=site.module, embedding=embedding,
        )  # fmt: skip

    if site.experts > 1 and kind in ("gaussian", "orthogonal"):  # a matrix each: rows of A by expert, columns of B by rank
        each = [begin(config.r) for _ in range(site.experts)]
        s = Start(torch.cat([e.A for e in each]), torch.stack([e.B for e in each], -1).flatten(1))
    else:
        s = begin(config.r * max(site.experts, 1))
    if s.base is not None:
        site.new_base = s.base
    out: dict[str, Tensor] = {}
    if s.A0 is not None and s.B0 is not None:
        out = {"lora_A0": s.A0, "lora_B0": s.B0}
    if not only_frozen:
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        out |= {a: s.A, b: s.B if site.groups == 1 else s.B[:, : config.r // site.groups]}
    return out
