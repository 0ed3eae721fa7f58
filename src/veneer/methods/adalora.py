"""AdaLoRA: a low-rank change whose rank is shared out between the layers in training. Long by LoRA's fields, which it has, and its schedule."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError, PeftWarning
from ..method import Leaf
from ..ops import LowRank
from ..schedules import Allocating, Importance, add_gradient, by_rank, cut, widen
from .lora import LoraRuntimeConfig

_IDLE = ("alpha_pattern", "use_rslora", "loftq_config", "lora_bias", "layer_replication")  # LoRA's, without effect here
_OTHER = (
    "use_dora", "use_qalora", "megatron_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "alora_invocation_tokens",
    "monteclora_config", "target_parameters", "use_bdlora", "arrow_config", "kasa_config",
)  # fmt: skip


@dataclass
class AdaLoraConfig(Allocating, peft_type="ADALORA"):
    """W' = W + s · B diag(E) A,  s = alpha / init_r.

    A (r, n_in) and B (n_out, r) start normal(0, 0.02), E (r, 1) zero; all are trained, with `orth_reg_weight` · the mean of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ over
    all layers added to the loss. From step `tinit` to `total_step - tfinal`, every `deltaT` steps, the entries of E that matter least are put to
    zero, so that the number of live ones falls as a cubic from `init_r` to `target_r` a layer on average; which ones is decided over all layers by
    |p · ∂loss/∂p|, smoothed (`beta1`) times its deviation (`beta2`): that of the entry, plus the means over its row of A and its column of B.
    Zhang et al. 2023, arXiv:2303.10512.

    All this happens by itself when an optimizer steps. `model.base_model.update_and_allocate(step)` after a step takes the schedule over instead.
    `rank_pattern` (layer -> which entries live) is what training leaves; from then on files hold live entries only, and a config that has it makes
    layers of that size. Until then a dead entry may live again, and files hold all.
    """

    r: int = 8
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, list[bool]] | None = None
    alpha_pattern: dict[str, int] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
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
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815  PEFT's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    prefix: ClassVar[str] = "lora_"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    weighed: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_E")
    stacking: ClassVar[Any] = "sum"
    examples: ClassVar[Any] = ({"init_r": 4, "total_step": 10},)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rows: dict[str, int] = {}  # the rank of each layer as it was made
        self._given = self.rank_pattern
        if not self.total_step or self.total_step <= 0:
            raise ConfigError("AdaLoRA does not work when `total_step` is None, supply a value > 0: the number of optimizer steps.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or increase `total_step`."
            )
        if self.init_r < 1 or self.target_r < 0 or self.deltaT < 1:
            raise ConfigError(
                f"init_r and deltaT must be positive and target_r not negative, got {self.init_r}, {self.deltaT}, {self.target_r}."
            )
        if other := [n for n in _OTHER if getattr(self, n)]:
            raise ConfigError(f"AdaLoRA does not support {', '.join(f'`{n}`' for n in other)}. Use LoraConfig for that.")
        idle = [n for n in _IDLE if getattr(self, n)] + ["init_lora_weights"] * isinstance(self.init_lora_weights, str)
        if idle := idle + ["r"] * (self.r != 8):
            warnings.warn(
                f"{', '.join(f'`{n}`' for n in idle)} has no effect in AdaLoRA, whose rank is `init_r`.", PeftWarning, stacklevel=4
            )

    def scale(self) -> float:
        return (self.lora_alpha if self.lora_alpha > 0 else self.init_r) / (self.init_r + 1e-5)

    def check(self, site: Any) -> None:
        if site.groups > 1:
            raise ConfigError(f"AdaLoRA does not take convolutions with groups ({site.name!r} has {site.groups}); LoRA does.")

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        r = self._rows[site.name] = sum((self.rank_pattern or {}).get(f"{site.name}.lora_E", [True] * self.init_r))
        std, zero = (0.02, nn.init.zeros_) if self.init_lora_weights else (1.0, nn.init.normal_)
        a, b = (Leaf(shape, lambda t: nn.init.normal_(t, std=std)) for shape in ((r, site.n_in), (site.n_out, r)))
        return {"lora_A": a, "lora_B": b, "lora_E": Leaf((r, 1), zero)}

    def change(self, p: Any, site: Any) -> Change:
        return Change(add=LowRank(p.lora_B, p.lora_A * p.lora_E, site.scaling, site.dropout))

    # ---------------------------------------------------------------- the schedule

    def before_step(self, sites: Sequence[Any], step: int) -> None:
        """Add the gradient of the orthogonality term."""
        if step >= self._end and not sites[0].memory:  # it goes on from an adapter's file alone: what is dead there stays so
            e = torch.cat([e.to(sites[0].tensor("lora_E").device) for e in _flat(sites, "lora_E")])
            sites[0].memory["keep"] = (e != 0).to(e.dtype) if bool(e.any()) else None
        pairs = [(s.tensor("lora_A"), s.tensor("lora_B")) for s in sites]
        pairs = [(a, b) for a, b in pairs if a.grad is not None and b.grad is not None]
        each = [q for a, b in pairs for q in ((a, a.grad), (b.mT, b.grad.mT))]  # type: ignore[union-attr]
        add_gradient(each, self.orth_reg_weight / (2 * len(sites)))  # type: ignore[arg-type]

    def importance(self) -> Importance:
        return Importance(self.beta1, self.beta2)

    def measure(self, sites: Sequence[Any], step: int) -> bool:
        last = step == self._end and "importance" not in sites[0].memory  # a schedule of one step
        return (step < self._end or last) and self.weigh(sites)

    def snapshot(self, sites: Sequence[Any]) -> Any:
        return torch.cat(_flat(sites, "lora_E")), sites[0].memory.get("keep")

    def restore(self, sites: Sequence[Any], before: Any) -> None:
        e, sites[0].memory["keep"] = before
        torch._foreach_copy_(_flat(sites, "lora_E"), list(e.split(_ranks(sites))))

    def allocate(self, sites: Sequence[Any], step: int) -> None:
        own, ranks, es = sites[0].memory, _ranks(sites), _flat(sites, "lora_E")
        live, target = sum(ranks), self.target_r * len(sites)
        left = max(1 - (step - self.tinit) / (self._end - self.tinit), 0)
        budget = int((live - target) * left**3 + target)
        measured = own["importance"].mean if "importance" in own else []
        now = self.tinit < step <= self._end and (step % self.deltaT == 0 or step == self._end) and budget < live and bool(measured)
        if now:
            score = by_rank(own["importance"].scores(), len(sites))
            own["keep"] = (score > score.kthvalue(live - budget).values).to(es[0].dtype)
        if own.get("keep") is not None and (now or step > self._end):
            torch._foreach_mul_(es, [k.to(e.device) for k, e in zip(own["keep"].split(ranks), es, strict=True)])
        if "asked" in own or step == self._end:
            self.rank_pattern = self._pattern(sites)

    def carried(self, sites: Sequence[Any]) -> Mapping[str, Tensor | float]:
        keep = sites[0].memory.get("keep")
        parts = keep.split(_ranks(sites)) if keep is not None else ()
        decided = {"decided": True} if parts and self.rank_pattern is not None else {}
        return {**super().carried(sites), **decided, **{f"{s.name}.lora_E.keep": t.clone() for s, t in zip(sites, parts, strict=False)}}

    def carry_on(self, sites: Sequence[Any], carried: Mapping[str, Any]) -> None:
        super().carry_on(sites, carried)
        keep = [carried[k].to(s.tensor("lora_E")) for s in sites if (k := f"{s.name}.lora_E.keep") in carried]
        if len(keep) == len(sites):
            sites[0].memory["keep"] = torch.cat([k.to(keep[0].device) for k in keep])
        self.rank_pattern = self._pattern(sites) if "decided" in carried else self._given

    def check_saving(self, sites: Sequence[Any], step: int) -> None:
        moved = any(s.tensor("lora_E").grad is not None and bool(s.tensor("lora_E").any()) for s in sites)  # if by no torch optimizer
        if not getattr(sites[0].memory.get("importance"), "mean", None) and (0 < step <= self._end or (not step and moved)):
            raise self.never_advanced(
                f"for {step or 'some'} steps, and every layer still has its first rank, since its schedule (total_step={self.total_step}) never advanced"
            )

    @property
    def _end(self) -> int:
        return (self.total_step or 0) - self.tfinal

    def _pattern(self, sites: Sequence[Any]) -> dict[str, list[bool]] | None:
        if (keep := sites[0].memory.get("keep")) is None:
            return self.rank_pattern
        live = keep.bool().cpu().split(_ranks(sites))
        return {f"{s.name}.lora_E": k.tolist() for s, k in zip(sites, live, strict=True)}

    def as_saved(self, saved: Mapping[str, Any]) -> AdaLoraConfig:
        """Training goes on in a model that has all its ranks: which of them the file holds is told by its own pattern."""
        pattern = saved.get("rank_pattern")
        if pattern and {k: len(v) for k, v in pattern.items()} != {f"{n}.lora_E": r for n, r in self._rows.items()}:
            return self
        out = copy.copy(self)
        out.rank_pattern = pattern or self._given
        return out

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return cut(tensors, _AXES, self.rank_pattern or {}, "lora_E")

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return widen(tensors, _AXES, self.rank_pattern or {}, "lora_E", self._rows)


_AXES = {"lora_A": 0, "lora_B": 1, "lora_E": 0}


def _flat(sites: Sequence[Any], leaf: str) -> list[Tensor]:
    return [s.tensor(leaf).detach().flatten() for s in sites]


def _ranks(sites: Sequence[Any]) -> list[int]:
    return [s.tensor("lora_E").shape[0] for s in sites]
