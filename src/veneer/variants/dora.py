"""DoRA: the length of every row trained apart from its direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..kernels.norms import row_norm_sq
from ..method import Leaf
from ..ops import LowRank
from ..ops.grouped import spread
from .base import Variant


class Dora(Variant):
    """W' = m ⊙ (W + s B A) / ‖W + s B A‖ row by row.

    The norm is detached; m (n_out,) starts as the norm and is trained. Liu et al. 2024, arXiv:2402.09353. A row of zeros (a token that pads a head's
    vocabulary, a pruned output) has no direction: it is W + s B A there until B gives it one. Together with other adapters, m / ‖W + s B A‖
    scales what those before it in the list make of W, too. Of a convolution with groups, PEFT takes the norm of another matrix, so that files with such a
    layer mean something else there.
    """

    field: ClassVar[str] = "use_dora"
    in_pieces: ClassVar[bool] = True
    stacking: ClassVar[Any] = "chain"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv"})
    starts: ClassVar[tuple[bool | str, ...] | None] = None
    example: ClassVar[Any] = {"use_dora": True}

    def leaves(self, config: Any, site: Any, leaves: Mapping[str, Leaf]) -> Mapping[str, Leaf]:
        shape = (1, site.n_out, *(1,) * len(site.kernel)) if site.kind == "conv" else (site.n_out,)
        return {**leaves, "lora_magnitude_vector": Leaf(shape, nn.init.ones_, attr="weight", on_disk="lora_magnitude_vector")}

    def start(self, config: Any, site: Any, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        a, b = ("lora_embedding_A", "lora_embedding_B") if site.kind == "embedding" else ("lora_A", "lora_B")
        w = spread(site.weight(), site.groups)
        if a in given and "lora_A0" not in given:
            norm = row_norm_sq(w, given[a].to(w.device), spread(given[b], site.groups).to(w.device), site.scaling)
        else:  # nothing is changed yet
            norm = row_norm_sq(w, w.new_zeros(1, w.shape[1]), w.new_zeros(w.shape[0], 1), 0.0)
        return {"lora_magnitude_vector": norm.sqrt()}

    def change(self, config: Any, p: Any, site: Any, add: LowRank) -> Change:
        with torch.no_grad():
            norm = row_norm_sq(spread(site.weight(), site.groups), add.down, add.up, add.scale).sqrt()
            none = norm == 0
        return Change(add=add, gain=p.lora_magnitude_vector.flatten() / (norm + none) + none)
