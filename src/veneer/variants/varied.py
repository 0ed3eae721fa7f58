"""A method with variants: what the variant that is turned on decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..method import Method
from . import VARIANTS, layout, variant_of

# what makes a LoRA more than A and B: its start and its variants
_OWN = ("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "use_rslora", "lora_bias", "ensure_weight_tying", *VARIANTS)


@dataclass
class Varied(Method):
    """Abstract: a method that asks its variant for all that stands here."""

    @property
    def in_pieces(self) -> bool:  # type: ignore[override]
        return variant_of(self).in_pieces

    @property
    def starts_as_identity(self) -> bool:
        return variant_of(self).starts_as_identity

    @property
    def stacking(self) -> Literal["sum", "chain"]:  # type: ignore[override]
        return variant_of(self).stacking

    @property
    def exceptions(self) -> Mapping[str, str]:  # type: ignore[override]  # a variant's own
        return variant_of(self).exceptions

    @property
    def unmergeable(self) -> str:  # type: ignore[override]
        return variant_of(self).unmergeable

    @property
    def routes(self) -> bool:  # type: ignore[override]
        return variant_of(self).routes

    @property
    def takes(self) -> tuple[str, ...]:  # type: ignore[override]
        return variant_of(self).takes

    def facts(self, call: Any) -> Mapping[str, Tensor]:
        return variant_of(self).facts(self, call)

    def experts(self) -> Mapping[str, str | None]:
        return variant_of(self).experts(self)

    def example_call(self, rows: int) -> dict[str, Tensor]:
        return variant_of(self).example_call(rows)

    def acts(self) -> bool:
        return variant_of(self).acts

    def before_step(self, sites: Sequence[Any], step: int) -> None:
        variant_of(self).before_step(self, sites)

    def penalty(self, p: Any, site: Any) -> Tensor | None:
        return variant_of(self).penalty(self, p, site)

    @classmethod
    def holding(cls, sum_: Any, site: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The fields and tensors of a LoRA without start or variant (but DoRA's gain) whose change of `site`, with the scaling 1, is a given one.

        Args:
            sum_: a `veneer.engine.parts.Total`.
        """
        r = sum_.down.shape[-2] * max(site.groups, 1)
        fields = {name: getattr(cls, name, None) for name in _OWN} | {"r": r, "lora_alpha": r, "loftq_config": {}}
        tensors = layout.tensors(sum_.up, sum_.down, site)
        if sum_.gain is not None:
            fields["use_dora"], tensors["lora_magnitude_vector"] = True, sum_.gain * layout.row_norms(sum_, site)
        if sum_.shift is not None:
            fields["lora_bias"], tensors["lora_B_bias"] = True, sum_.shift
        return fields, tensors
