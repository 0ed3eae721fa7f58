"""(IA)³: learned scaling of a layer's outputs, or of its inputs in feed-forward layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..method import Leaf, Targeted
from ..ops import Diag


@dataclass
class IA3Config(Targeted, peft_type="IA3"):
    """y ← l ⊙ y, bias included;  in feed-forward modules x ← l ⊙ x.   l starts as ones.   Liu et al. 2022, arXiv:2205.05638."""

    feedforward_modules: list[str] | str | None = None
    init_ia3_weights: bool = True

    prefix: ClassVar[str] = "ia3_"
    in_pieces: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    examples: ClassVar[Any] = ({}, {"target_modules": ["site"], "feedforward_modules": ["site"]})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, (list, tuple)):
            self.feedforward_modules = set(self.feedforward_modules)  # type: ignore[assignment]
        both = self.feedforward_modules, self.target_modules
        if all(isinstance(b, set) for b in both) and not set(both[0] or ()) <= set(both[1] or ()):
            raise ConfigError("`feedforward_modules` should be a subset of `target_modules`.")

    def _feedforward(self, name: str) -> bool:
        spec = self.feedforward_modules or ()
        if isinstance(spec, str):
            return bool(re.fullmatch(spec, name))
        return any(name == s or name.endswith(f".{s}") for s in spec)

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        inputs = self._feedforward(site.name)
        if site.kind == "conv":
            shape: tuple[int, ...] = (1, site.channels if inputs else site.n_out, *(1,) * len(site.kernel))
        else:
            shape = (1, site.n_in) if inputs else (site.n_out, 1)
        return {"ia3_l": Leaf(shape, nn.init.ones_ if self.init_ia3_weights else nn.init.normal_)}

    def combine(self, parts: Any, site: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """l = Σ w l, as in PEFT, where an adapter that is not on the layer has l = 1."""
        return {"feedforward_modules": parts.spec("feedforward_modules")}, {"ia3_l": parts.summed("ia3_l") + parts.absent}

    def change(self, p: Any, site: Any) -> Change:
        scale = p.ia3_l
        if not self._feedforward(site.name):
            return Change(left=Diag(scale), left_on_bias=True)
        if site.kind != "conv":
            return Change(right=Diag(scale))
        taps = site.n_in * site.groups // site.channels
        return Change(right=Diag(scale.flatten().repeat_interleave(taps), site.groups))
