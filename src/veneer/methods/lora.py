"""LoRA and its options: the low-rank change of a frozen weight."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import inits
from ..change import Change
from ..errors import ConfigError, PeftWarning, hint
from ..inits import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from ..kernels.norms import row_norm_sq
from ..method import Leaf, Method, by_pattern
from ..ops import LowRank

_COUNTED_FROM_START = ("pissa", "olora", "corda", "lora_ga")  # W' = W + s (B A - B0 A0)


@dataclass
class LoraRuntimeConfig:
    """Options that hold for this run and are not written to the file."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(Method, peft_type="LORA"):
    """W' = W + s · B A,  s = alpha / r (rsLoRA: alpha / √r).

    A (r, n_in) starts Kaiming-uniform, B (n_out, r) zero, both are trained, W is frozen. Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023,
    arXiv:2312.03732. With `use_dora`, W' = m ⊙ (W + s B A) / ‖W + s B A‖ row by row, the norm detached, m trained: Liu et al. 2024,
    arXiv:2402.09353. A convolution's A has the base's kernel, its B is one wide; an embedding's table changes by (B A)ᵀ; E experts in a 3-D parameter have
    r rows of A and r columns of B each.
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
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    prefix: ClassVar[str] = "lora_"
    stacking: ClassVar[Literal["sum", "chain"]] = "sum"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv", "attention", "parameter"})

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
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"`{name}` cannot be used when `target_modules` is a str. Give a list of names, or put the layers into the pattern."
                    )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        inits.check_kind(self.init_lora_weights)
        self._nest("eva_config", EvaConfig, "eva")
        self._nest("corda_config", CordaConfig, "corda")
        self._nest("lora_ga_config", LoraGAConfig, "lora_ga")
        if self.init_lora_weights == "loftq" and not self.loftq_config:
            raise ConfigError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
        if isinstance(self.loftq_config, dict) and self.loftq_config:
            self.loftq_config = LoftQConfig(**self.loftq_config)
        if isinstance(self.runtime_config, dict):
            self.runtime_config = LoraRuntimeConfig(**self.runtime_config)
        if self.lora_bias and (self.init_lora_weights not in (True, False) or self.use_dora):
            raise ConfigError("`lora_bias=True` goes with init_lora_weights True or False and without DoRA.")
        if self.use_dora and self.megatron_config:
            raise ConfigError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.layer_replication is not None:
            self.layer_replication = [(int(a), int(b)) for a, b in self.layer_replication]
        for name in (
            "velora_config",
            "alora_invocation_tokens",
            "monteclora_config",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
            "use_qalora",
            "megatron_config",
        ):
            if getattr(self, name):
                raise ConfigError(
                    f"`{name}` is not available in this version of veneer. Without it the adapter would compute something else, so nothing was built."
                )

    def _nest(self, name: str, kind: type[Any], init: str) -> None:
        value = getattr(self, name)
        if isinstance(value, Mapping):
            setattr(self, name, kind(**value))
        elif value is None and self.init_lora_weights == init:
            setattr(self, name, kind())
        elif value is not None and self.init_lora_weights != init:
            warnings.warn(f"`{name}` has no effect unless `init_lora_weights` is {init!r}.", PeftWarning, stacklevel=5)

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
            for name in ("use_dora", "lora_dropout", "lora_bias"):
                if getattr(self, name) and not (site.kind == "attention" and name == "lora_bias"):
                    what = "an nn.MultiheadAttention" if site.kind == "attention" else "a parameter"
                    raise ConfigError(f"`{name}` cannot act on {site.name!r}, {what}: its module takes whole tensors.")
        kind = str(self.init_lora_weights).split("_niter")[0]
        if kind in inits.SITES and site.kind not in inits.SITES[kind]:
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} does not start {site.kind} layers ({site.name!r}); it takes {sorted(inits.SITES[kind])}."
            )

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
        if self._counted(site):
            out["lora_A0"] = Leaf((r, site.n_in), nn.init.zeros_, attr="weight", trainable=False, saved="start")
            out["lora_B0"] = Leaf((site.n_out, r), nn.init.zeros_, attr="weight", trainable=False, saved="start")
        if self.use_dora:
            shape = (1, site.n_out, *(1,) * len(site.kernel)) if site.kind == "conv" else (site.n_out,)
            out["lora_magnitude_vector"] = Leaf(shape, nn.init.ones_, attr="weight", on_disk="lora_magnitude_vector")
        return out

    def _counted(self, site: Any) -> bool:
        return (
            site.kind != "embedding" and isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(_COUNTED_FROM_START)
        )

    def start(self, site: Any, *, only_frozen: bool = False) -> Mapping[str, Tensor]:
        kind, embedding = self.init_lora_weights, site.kind == "embedding"
        if only_frozen and kind == "corda" and not hasattr(site.module, "eigens"):
            return {}  # only the adapter's own file can bring them; without it loading is an error
        if only_frozen and kind == "lora_ga" and not hasattr(site.module, "_peft_loraga_grad"):
            # files of PEFT hold no start, and PEFT itself counts them from zero
            return {"lora_A0": torch.zeros(self.r, site.n_in), "lora_B0": torch.zeros(site.n_out, self.r)}
        if only_frozen and not self._counted(site) and kind != "loftq":
            return {}
        if kind is True and not self.use_dora:
            return {}  # the leaves' own start
        n_in = site.n_in * site.groups
        s = inits.start(
            kind, site.weight, self.r * max(site.experts, 1), site.scaling,
            n_out=site.n_out, n_in=n_in, config=self, context=site.module, embedding=embedding,
        )  # fmt: skip
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        out: dict[str, Tensor] = {}
        if s.A0 is not None and s.B0 is not None:
            out |= {"lora_A0": s.A0, "lora_B0": s.B0}
        if s.base is not None:
            site.new_base = s.base
        if only_frozen:
            return out
        wide = s.B if site.groups == 1 else s.B[:, : self.r // site.groups]
        out |= {a: s.A, b: wide}
        if self.use_dora:
            w = _wide(site.weight(), site)
            out["lora_magnitude_vector"] = row_norm_sq(
                w, s.A.to(w.device), _up(wide, site).to(w.device), site.scaling if s.A0 is None else 0.0
            ).sqrt()
        return out

    def change(self, p: Any, site: Any) -> Change:
        if site.kind == "embedding":
            add = LowRank(p.lora_embedding_B, p.lora_embedding_A, site.scaling)
        elif site.experts:
            n, e = self.r, site.experts  # rows of A are expert by expert, columns of B rank by rank
            add = LowRank(p.lora_B.view(site.n_out, n, e).permute(2, 0, 1), p.lora_A.view(e, n, site.n_in), site.scaling)
        elif site.kind == "conv":
            add = LowRank(_up(p.lora_B.flatten(1), site), p.lora_A.flatten(1), site.scaling, site.dropout)
        else:
            add = LowRank(p.lora_B, p.lora_A, site.scaling, site.dropout)
        if self._counted(site):
            add = LowRank(
                torch.cat([add.up, -p.lora_B0.to(add.up.dtype)], 1),
                torch.cat([add.down, p.lora_A0.to(add.down.dtype)]),
                add.scale,
                add.dropout,
            )
        shift = p.lora_B_bias * site.scaling if self.lora_bias else None
        if not self.use_dora:
            return Change(add=add, shift=shift)
        with torch.no_grad():
            norm = row_norm_sq(_wide(site.weight(), site), add.down, add.up, add.scale).sqrt()
        return Change(add=add, gain=p.lora_magnitude_vector.flatten() / norm)


def _up(b: Tensor, site: Any) -> Tensor:
    """B (n_out, r / groups) of a grouped convolution as the block-diagonal (n_out, r) that it acts as."""
    if site.groups == 1:
        return b
    whole: Tensor = torch.block_diag(*b.chunk(site.groups))
    return whole


def _wide(w: Tensor, site: Any) -> Tensor:
    """W of a grouped convolution (n_out, n_in) as the block-diagonal matrix over all input channels that it acts as."""
    whole: Tensor = w if site.groups == 1 else torch.block_diag(*w.chunk(site.groups))
    return whole
