"""LoRA and its options: the low-rank change of a frozen weight."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError, PeftWarning, hint
from ..inits import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from ..inits.leaves import is_counted, starting_leaves
from ..inits.options import check_start, read_start
from ..kernels.norms import row_norm_sq
from ..method import Leaf, Method, by_pattern
from ..ops import LowRank
from ..ops.grouped import spread
from ..variants import (
    VARIANTS,
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
    layout,
    read_options,
    variant_of,
)  # fmt: skip

__all__ = ["LoraConfig", "LoraRuntimeConfig"]

# what makes a LoRA more than A and B: its start and its variants
_OWN = ("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "use_rslora", "lora_bias", "ensure_weight_tying", *VARIANTS)


@dataclass
class LoraRuntimeConfig:
    """Options that hold for this run and are not written to the file."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(Method, peft_type="LORA"):
    """W' = W + s · B A,  s = alpha / r (rsLoRA: alpha / √r).

    A (r, n_in) starts Kaiming-uniform, B (n_out, r) zero, both are trained, W is frozen. Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023,
    arXiv:2312.03732. What `use_dora` and its like make of it stands in `veneer.variants`. A convolution's A has the base's kernel, its B is one wide;
    an embedding's table changes by (B A)ᵀ; E experts in a 3-D parameter have r rows of A and r columns of B each.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, int] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: VeloraConfig | dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | dict[str, Any] | None = None
    arrow_config: ArrowConfig | dict[str, Any] | None = None
    kasa_config: KasaConfig | dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    prefix: ClassVar[str] = "lora_"
    patterns: ClassVar[Mapping[str, str]] = MappingProxyType({"r": "rank_pattern", "lora_alpha": "alpha_pattern"})
    stacking: ClassVar[Literal["sum", "chain"]] = "sum"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv", "attention", "parameter"})
    examples: ClassVar[Any] = tuple({"r": 4, "lora_alpha": 8, **fields} for fields in ({}, *(v.example for v in VARIANTS.values())))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        if not isinstance(self.r, int) or any(r <= 0 for r in (self.r, *self.rank_pattern.values())):
            raise ConfigError(
                f"`r` should be a positive integer value but the value passed is {self.r} (rank_pattern: {self.rank_pattern})."
            )
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"`lora_dropout` should lie in [0, 1), got {self.lora_dropout}.")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(
                f"`bias` is one of 'none', 'all', 'lora_only', got {self.bias!r}.{hint(str(self.bias), ('none', 'all', 'lora_only'))}"
            )
        read_start(self)
        if isinstance(self.runtime_config, dict):
            self.runtime_config = LoraRuntimeConfig(**self.runtime_config)
        if self.lora_bias and (self.init_lora_weights not in (True, False) or self.use_dora):
            raise ConfigError("`lora_bias=True` goes with init_lora_weights True or False and without DoRA.")
        if self.use_dora and self.megatron_config:
            raise ConfigError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.layer_replication is not None:
            self.layer_replication = [(int(a), int(b)) for a, b in self.layer_replication]
        if self.megatron_config:
            raise ConfigError(
                "`megatron_config` is not available in this version of veneer. Without it the adapter would compute something else, so nothing was built."
            )
        read_options(self)

    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def dropout(self) -> float:
        return self.lora_dropout

    def at(self, name: str) -> LoraConfig:
        r, alpha = by_pattern(self.rank_pattern, name, self.r), by_pattern(self.alpha_pattern, name, self.lora_alpha)
        if (r, alpha) == (self.r, self.lora_alpha):
            return self
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PeftWarning)
            return dataclasses.replace(self, r=r, lora_alpha=alpha)

    def check(self, site: Any) -> None:
        if site.kind == "conv" and self.r % site.groups:
            raise ConfigError(
                f"Targeting a {site.module.__class__.__name__} with groups={site.groups} and rank {self.r}: the rank must be divisible by the groups."
            )
        if site.kind == "embedding" and self.lora_bias:
            raise ConfigError(f"lora_bias=True is not supported for embeddings ({site.name!r}).")
        if site.kind in ("attention", "parameter"):
            for name in ("use_dora", *(() if self.inference_mode else ("lora_dropout",)), "lora_bias"):
                if getattr(self, name) and not (site.kind == "attention" and name == "lora_bias"):
                    what = "an nn.MultiheadAttention" if site.kind == "attention" else "a parameter"
                    raise ConfigError(f"`{name}` cannot act on {site.name!r}, {what}: its module takes whole tensors.")
        variant_of(self).check(self, site)
        check_start(self, site)

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        r, frozen = self.r * max(site.experts, 1), self.init_lora_weights == "mica"
        a, b = (r, site.n_in), (site.n_out, r)
        if site.kind == "embedding":
            out = {
                "lora_embedding_A": Leaf(a, nn.init.zeros_),
                "lora_embedding_B": Leaf(b, nn.init.normal_, trainable=not frozen),
            }
        else:
            if site.kind == "conv":
                one = (1,) * len(site.kernel)
                a, b = (r, site.n_in * site.groups // math.prod(site.kernel), *site.kernel), (site.n_out, r // site.groups, *one)
            out = {
                "lora_A": Leaf(a, lambda t: nn.init.kaiming_uniform_(t, a=math.sqrt(5)), attr="weight"),
                "lora_B": Leaf(b, nn.init.zeros_, attr="weight", trainable=not frozen),
            }
            if self.lora_bias:
                out["lora_B_bias"] = Leaf((site.n_out,), nn.init.zeros_, container="lora_B", attr="bias")
        if is_counted(self, site):
            out["lora_A0"] = Leaf((r, site.n_in), nn.init.zeros_, attr="weight", trainable=False, saved="start")
            out["lora_B0"] = Leaf((site.n_out, r), nn.init.zeros_, attr="weight", trainable=False, saved="start")
        return variant_of(self).leaves(self, site, out)

    def start(self, site: Any, *, only_frozen: bool = False) -> Mapping[str, Tensor]:
        given = starting_leaves(self, site, only_frozen=only_frozen)
        return given if only_frozen else {**given, **variant_of(self).start(self, site, given)}

    def change(self, p: Any, site: Any) -> Change:
        add = layout.product(p, site)
        if is_counted(self, site):
            up, down = torch.cat([add.up, -p.lora_B0.to(add.up.dtype)], 1), torch.cat([add.down, p.lora_A0.to(add.down.dtype)])
            add = LowRank(up, down, add.scale, add.dropout)
        change = variant_of(self).change(self, p, site, add)
        if self.lora_bias:
            change.shift = p.lora_B_bias * site.scaling
        return change

    def combine(self, parts: Any, site: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return self.holding(parts.low_rank(), site)

    @staticmethod
    def holding(sum_: Any, site: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The fields and tensors of a LoRA without start or variant (but DoRA's gain) whose change of `site`, with the scaling 1, is a given one.

        Args:
            sum_: a `veneer.engine.parts.Total`.
        """
        r = sum_.down.shape[-2] * max(site.groups, 1)
        fields = {name: getattr(LoraConfig, name, None) for name in _OWN} | {"r": r, "lora_alpha": r, "loftq_config": {}}
        tensors = layout.tensors(sum_.up, sum_.down, site)
        if sum_.gain is not None:
            fields["use_dora"] = True
            up = sum_.up if site.groups == 1 else torch.block_diag(*sum_.up)
            w = spread(site.weight(), site.groups).to(up.dtype)
            norm = row_norm_sq(w, sum_.down.flatten(0, -2), up, 1.0).sqrt()
            tensors["lora_magnitude_vector"] = sum_.gain * norm
        if sum_.shift is not None:
            fields["lora_bias"], tensors["lora_B_bias"] = True, sum_.shift
        return fields, tensors

    @property
    def starts_as_identity(self) -> bool:
        return variant_of(self).starts_as_identity

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
