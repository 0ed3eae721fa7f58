"""LoRA and its options: the low-rank change of a frozen weight. Long by its many fields, and the forms of A and B on each kind of site."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError
from ..inits import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from ..inits.leaves import doubt, is_counted, starting_leaves
from ..inits.options import OPTIONS, check_start, known_options, read_start
from ..method import Leaf
from ..ops import LowRank
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
from ..variants.varied import Varied

__all__ = ["LoraConfig", "LoraRuntimeConfig"]


@dataclass
class LoraRuntimeConfig:
    """Options that hold for this run and are not written to the file."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(Varied, peft_type="LORA"):
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
    positive: ClassVar[Any] = ("r",)
    choices: ClassVar[Any] = {"bias": ("none", "all", "lora_only")}
    patterns: ClassVar[Mapping[str, str]] = MappingProxyType({"r": "rank_pattern", "lora_alpha": "alpha_pattern"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv", "attention", "parameter"})
    examples: ClassVar[Any] = tuple({"r": 4, "lora_alpha": 8, **fields} for fields in ({}, *(v.example for v in VARIANTS.values())))

    def __post_init__(self) -> None:
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        super().__post_init__()
        if isinstance(self.lora_alpha, bool) or not isinstance(self.lora_alpha, (int, float)):
            raise ConfigError(f"`lora_alpha` should be a number but the value passed is {self.lora_alpha!r}.")
        read_start(self)
        if isinstance(self.runtime_config, dict):
            self.runtime_config = LoraRuntimeConfig(**self.runtime_config)
        if self.lora_bias and (self.init_lora_weights not in (True, False) or self.use_dora):
            raise ConfigError("`lora_bias=True` goes with init_lora_weights True or False and without DoRA.")
        if self.use_dora and self.megatron_config:
            raise ConfigError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.layer_replication is not None:
            self.layer_replication = _ranges(self.layer_replication)
        if self.megatron_config:
            raise ConfigError(
                "`megatron_config` is not available in this version of veneer. Without it the adapter would compute something else, so nothing was built."
            )
        read_options(self)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Without options that the starts and variants here do not know, as files of later versions may have: a warning names them."""
        of_variants = {name: v.options for name, v in VARIANTS.items() if v.options is not None}
        return super().check_kwargs(**known_options(kwargs, {**OPTIONS, **of_variants}, stacklevel=5))

    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

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

    def as_made(self, tensors: Mapping[str, Tensor]) -> LoraConfig:
        """PEFT lets tied factors come apart where it turns them to float32, beside a model in 16 bits: then the head has a LoRA of its own."""
        heads = list(_heads(tensors)) if self.ensure_weight_tying else []
        if not heads or any(same for _, same in heads):
            return self
        names, targets = {name for name, _ in heads}, self.target_modules
        named: Any = (
            "|".join([f"(?:{targets})", *map(re.escape, sorted(names))])
            if isinstance(targets, str)
            else [*(targets or ()), *(n for n in sorted(names) if n not in (targets or ()))]
        )
        return dataclasses.replace(self, ensure_weight_tying=False, target_modules=named)

    def tied(self) -> Mapping[str, tuple[str, bool]]:
        return {"lora_A": ("lora_embedding_B", True), "lora_B": ("lora_embedding_A", True)} if self.ensure_weight_tying else {}

    def start(self, site: Any, *, only_frozen: bool = False) -> Mapping[str, Tensor]:
        given = starting_leaves(self, site, only_frozen=only_frozen)
        return given if only_frozen else {**given, **variant_of(self).start(self, site, given)}

    def without_start(self) -> str:
        return doubt(self)

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


def _heads(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, bool]]:
    """The layers whose factors have the shapes of a table's transposed, and whether they are these."""
    for key, b in tensors.items():
        table, _, leaf = key.rpartition(".")
        a = tensors.get(f"{table}.lora_embedding_A")
        for name, down in tensors.items() if leaf == "lora_embedding_B" and a is not None else ():
            up = tensors.get(name.replace(".lora_A.", ".lora_B."))
            if a is not None and up is not None and name.endswith(".lora_A.weight") and (down.shape, up.shape) == (b.T.shape, a.T.shape):
                path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                yield path, torch.equal(down, b.T) and torch.equal(up, a.T)


def _ranges(given: Any) -> list[tuple[int, int]]:
    """`layer_replication` as pairs of integers."""
    pairs = isinstance(given, (list, tuple)) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in given)
    if not pairs or any(isinstance(i, bool) or not isinstance(i, int) for pair in given for i in pair):
        raise ConfigError(
            f"`layer_replication` is a list of pairs [start, end) of layers' numbers, such as [[0, 4], [2, 5]]; got {given!r}."
        )
    return [(a, b) for a, b in given]
