"""VB-LoRA: factors put together from the vectors of one bank."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError, LoadError
from ..method import Leaf, Targeted
from ..ops import LowRank

_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"


def _savable(tuner: Any, adapter: str = "default") -> tuple[int, int]:
    """(numbers that the adapter's file holds, counted as float32; further numbers that train)."""
    config, shared = tuner.peft_config[adapter], tuner.shared[adapter]
    held = [m.attached[adapter] for m in tuner.modules() if adapter in m.__dict__.get("attached", {})]
    logits = [a.tensor(n) for a in held for n in a.leaves]
    bank = shared.tensor("vblora_vector_bank")
    mine = {id(t) for t in (*logits, bank)}
    others = sum(p.numel() for p in tuner.parameters() if p.requires_grad and id(p) not in mine)
    count = sum(t.numel() for t in logits)
    if config.save_only_topk_weights:
        count = (
            count // config.num_vectors * (config.topk - 1) + count // config.num_vectors * config.topk * _index_dtype(config).itemsize // 4
        )
    return bank.numel() + count, others


def _print_savable(tuner: Any) -> None:
    """Print the two, for the adapter `default`."""
    mine, others = _savable(tuner)
    print(f"VB-LoRA params to-be-saved (float32-equivalent): {mine:,d} || total params to-be-saved: {mine + others:,d}")


@dataclass
class VBLoRAConfig(Targeted, peft_type="VBLORA"):
    """W' = W + B A, A and B made of pieces of b numbers, each piece Σ_k softmax(logits)_k · bank_k over the `topk` largest logits.

    The bank (num_vectors, b = vector_length) is one for all layers and starts uniform between -+`init_vector_bank_bound`; the logits of A
    (r, n_in / b, num_vectors) and of B (n_out / b, r, num_vectors) start normal with deviation `init_logits_std`: a fresh adapter is not the identity.
    With `save_only_topk_weights` the file holds only which vectors each piece mixes and how; such a file is for inference, since what the other logits
    were, which training needs, is lost.   Li et al. 2024, arXiv:2405.15179.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    prefix: ClassVar[str] = "vblora_"
    positive: ClassVar[Any] = ("r", "num_vectors", "vector_length", "topk")
    stacking: ClassVar[Any] = "sum"
    starts_as_identity: ClassVar[bool] = False
    tuner_methods: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"get_nb_savable_parameters": _savable, "print_savable_parameters": _print_savable}
    )
    examples: ClassVar[Any] = ({"r": 2, "num_vectors": 10, "vector_length": 4},)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._only_topk = False  # whether the tensors come from a file of that kind
        if self.topk > self.num_vectors:
            raise ConfigError(f"`topk` is {self.topk}, and the bank has {self.num_vectors} vectors. Lower topk or raise num_vectors.")

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k != "init_weights"}  # this method has no such choice

    def check(self, site: Any) -> None:
        for what, n in (("in_features", site.n_in), ("out_features", site.n_out)):
            if n % self.vector_length:
                raise ConfigError(f"`{what}` {n} of {site.name!r} must be divisible by `vector_length` {self.vector_length}.")

    def shared(self, sites: Sequence[Any]) -> Mapping[str, Leaf]:
        bound = self.init_vector_bank_bound
        return {"vblora_vector_bank": Leaf((self.num_vectors, self.vector_length), lambda t: nn.init.uniform_(t, -bound, bound))}

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        r, b, h = self.r, self.vector_length, self.num_vectors
        shapes = {"vblora_logits_A": (r, site.n_in // b, h), "vblora_logits_B": (site.n_out // b, r, h)}
        return {n: Leaf(s, lambda t: nn.init.normal_(t, std=self.init_logits_std)) for n, s in shapes.items()}

    def change(self, p: Any, site: Any) -> Change:
        if self._only_topk and site.training and p.vblora_logits_A.requires_grad:
            raise LoadError(
                f"The adapter {site.adapter!r} was saved with save_only_topk_weights=True: its file holds only the mixtures that were best, so it "
                "cannot be trained on. Load it without is_trainable, or train on from a file saved with save_only_topk_weights=False."
            )
        a, b = (_mixed(logits, p.vblora_vector_bank, self.topk) for logits in (p.vblora_logits_A, p.vblora_logits_B))
        return Change(add=LowRank(b.mT.flatten(0, 1), a.flatten(1), site.scaling, site.dropout))

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.save_only_topk_weights:
            return tensors
        out: dict[str, Tensor] = {}
        for key, t in tensors.items():
            if not _LOGITS.search(key):
                out[key] = t
                continue
            best, at = t.topk(self.topk)
            out[key + _INDICES] = at.to(_index_dtype(self))
            out[key + _WEIGHTS] = best.softmax(-1)[..., :-1].contiguous()  # the last one is what is left to one
        return out

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {k: t for k, t in tensors.items() if not k.endswith((_INDICES, _WEIGHTS))}
        for key, at in tensors.items():
            first = tensors.get(key.removesuffix(_INDICES) + _WEIGHTS)
            if key.endswith(_INDICES) and first is not None:
                weights = torch.cat([first, (1 - first.sum(-1, keepdim=True)).clamp_min(0)], -1)
                logits = weights.new_full((*weights.shape[:-1], self.num_vectors), float("-inf"))
                out[key.removesuffix(_INDICES)] = logits.scatter(-1, at.long(), weights.log())
        self._only_topk = any(k.endswith(_INDICES) for k in tensors)
        return out


_LOGITS = re.compile(r"(^|\.)vblora_logits_[AB]$")


def _mixed(logits: Tensor, bank: Tensor, k: int) -> Tensor:
    """Σ_k softmax(top k logits) · bank, (..., h) and (h, b) to (..., b)."""
    best, at = logits.topk(k, -1)
    return (best.softmax(-1).unsqueeze(-1) * bank[at]).sum(-2)


def _index_dtype(config: VBLoRAConfig) -> torch.dtype:
    """The smallest that counts the bank's vectors, by PEFT's table."""
    return next((d for d, n in ((torch.uint8, 2**8), (torch.int16, 2**15), (torch.int32, 2**31)) if config.num_vectors < n), torch.int64)
