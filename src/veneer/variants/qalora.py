"""QALoRA: a change that is the same for all inputs of a group, so that it fits into the zero points of a group-quantised weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ..change import Change
from ..errors import ConfigError
from ..method import Leaf
from ..ops import LowRank
from .base import Variant


class QALora(Variant):
    """W' = W + s B A P,  P x = (n_in / g) · the means of x over groups of g inputs.

    A is (r, n_in / g). Xu et al. 2023, arXiv:2309.14717.
    """

    field: ClassVar[str] = "use_qalora"
    starts: ClassVar[tuple[bool | str, ...] | None] = (True,)
    example: ClassVar[Any] = {"use_qalora": True, "qalora_group_size": 2}

    def check(self, config: Any, site: Any) -> None:
        super().check(config, site)
        if config.qalora_group_size < 1 or site.n_in % config.qalora_group_size:
            raise ConfigError(
                f"`use_qalora=True` requires in_features ({site.n_in} of {site.name!r}) to be divisible by qalora_group_size "
                f"({config.qalora_group_size})."
            )

    def leaves(self, config: Any, site: Any, leaves: Mapping[str, Leaf]) -> Mapping[str, Leaf]:
        groups = site.n_in // config.qalora_group_size
        return {**leaves, "lora_A": dataclasses.replace(leaves["lora_A"], shape=(config.r, groups))}

    def change(self, config: Any, p: Any, site: Any, add: LowRank) -> Change:
        g = config.qalora_group_size
        return Change(add=LowRank(add.up, add.down.repeat_interleave(g, 1), add.scale * site.n_in / g**2, add.dropout))
