"""Adaption prompt (LLaMA-Adapter): tokens that the queries of the last layers attend to beside their own sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Attend
from ..errors import ConfigError, hint
from ..method import Leaf, Method


@dataclass
class AdaptionPromptConfig(Method, peft_type="ADAPTION_PROMPT"):
    """y += o(g · softmax(q k(P)ᵀ / √d) v(P)) in the last `adapter_layers` attention layers.   Zhang et al. 2023, arXiv:2303.16199.

    P (1, adapter_len, width) normal, g (1) zero, so that training starts from the base model; q, k, v and o are the layer's own, and P has no
    position. A bias of o counts once (in PEFT twice, so that even an untrained adapter changes the output). Several active adapters add up.

    Args:
        target_modules: the last part of the attention modules' names, such as `self_attn`; by default that of all attention of the model.
        adapter_len: how many tokens P has.
        adapter_layers: in how many of the layers, counted from the last.
    """

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    prefix: ClassVar[str] = "adaption_"
    positive: ClassVar[Any] = ("adapter_len", "adapter_layers")
    kinds: ClassVar[frozenset[str]] = frozenset({"self_attention"})
    stacking: ClassVar[Any] = "sum"
    unmergeable: ClassVar[str] = "an adaption prompt adds to the output what depends on the input"
    examples: ClassVar[Any] = ({"adapter_len": 3, "adapter_layers": 1},)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            raise ConfigError(f"AdaptionPromptConfig.target_modules is one name, such as 'self_attn', got {self.target_modules!r}.")

    @property
    def is_adaption_prompt(self) -> bool:
        return True

    def pick(self, names: list[str], fitting: list[str]) -> list[str]:
        """The names of the attention modules of the last layers, of all names in the model and of those that are attention."""
        if missing := [n for n in self.positive if getattr(self, n) is None]:
            raise ConfigError(f"AdaptionPromptConfig needs {' and '.join(missing)}: the number of tokens, and of layers from the last.")
        ends = {n.rpartition(".")[2] for n in fitting}
        if self.target_modules is None and len(ends) != 1:
            known = f"attention of several names: {sorted(ends)}" if ends else "no attention of a known shape"
            raise ConfigError(f"AdaptionPromptConfig.target_modules is needed, the last part of the modules' names. The model has {known}.")
        self.target_modules = self.target_modules or next(iter(ends))
        found = [n for n in names if f".{n}".endswith(f".{self.target_modules}")]
        assert self.adapter_layers is not None
        if len(found) < self.adapter_layers:
            raise ConfigError(
                f"Config specifies more adapter layers '{self.adapter_layers}' than the model has '{len(found)}': that many modules are called "
                f"{self.target_modules!r}.{'' if found else hint(self.target_modules, ends)}"
            )
        return found[-self.adapter_layers :]

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        assert self.adapter_len is not None
        return {"adaption_prompt": Leaf((1, self.adapter_len, site.n_in), nn.init.normal_), "adaption_gate": Leaf((1,), nn.init.zeros_)}

    def change(self, p: Any, site: Any) -> Attend:
        def mix(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            weights = torch.softmax(q @ (k * scale).mT, -1, dtype=torch.float32).to(q.dtype)
            out: Tensor = (p.adaption_gate.to(q.dtype) * weights) @ v
            return out

        return Attend(p.adaption_prompt[0], mix)
