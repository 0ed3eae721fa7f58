"""nn.MultiheadAttention: its fused in_proj here; its out_proj is an adapted layer of its own inside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from .base import Changes, Site


class AttentionSite(Site):
    """W is in_proj_weight (3 · width, width). The module runs whole with W' formed, as its forward takes tensors, not layers."""

    kind: ClassVar[str] = "attention"
    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        assert isinstance(module, nn.MultiheadAttention)
        self.batch_dim = 0 if module.batch_first else 1
        self.n_in = module.embed_dim
        self.n_out = 3 * module.embed_dim
        self.own_forward = True

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention) and module._qkv_same_embed_dim

    def canonical(self, stored: Tensor) -> Tensor:
        return stored

    def stored(self, w: Tensor) -> Tensor:
        return w

    def apply(
        self, module: nn.Module, changes: Changes, args: tuple[Any, ...], kwargs: Mapping[str, Any], frozen: Mapping[str, Any]
    ) -> Any:
        return self.run_whole(module, changes, args, kwargs, frozen)
