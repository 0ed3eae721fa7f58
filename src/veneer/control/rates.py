"""Learning rates by layer, as parameter groups that any optimizer takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import ConfigError
from .depth import Depths, Trained, check_keys, check_table, fits, trained


@dataclass(frozen=True)
class Rates:
    """What the learning rate is multiplied by, tensor by tensor; several factors that apply are multiplied with each other.

    Args:
        decay: by depth: the last layer and what stands behind it have 1, the one before `decay`, the one before that decay² …; what stands before
            the first layer has decay to the number of layers. Layer-wise decay as in Howard & Ruder 2018, arXiv:1801.06146, section 3.2.
        bands: discriminative groups: the layers are cut into as many runs as there are factors, the first factor for the layers next to the input.
        patterns: key -> factor; the first key that fits counts. Keys are names of modules (`q_proj`) or tensors (`lora_B`), ends of them, or
            regular expressions for them. The factor 0 keeps a tensor as it is.
        weight_decay: key -> weight decay, in the place of that of all.

    Raises:
        ConfigError: for factors that are negative or not finite.
    """

    decay: float = 1.0
    bands: Sequence[float] = ()
    patterns: Mapping[str, float] = field(default_factory=dict)
    weight_decay: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.bands, Sequence) or isinstance(self.bands, str):
            raise ConfigError(f"rates: bands are factors, such as [0.5, 1.0], got {self.bands!r}.")
        for what in ("patterns", "weight_decay"):
            check_table(f"rates: {what}", getattr(self, what))
        named = [("decay", self.decay), *(("bands", b) for b in self.bands), *((f"patterns[{k!r}]", v) for k, v in self.patterns.items())]
        named += [(f"weight_decay[{k!r}]", v) for k, v in self.weight_decay.items()]
        for name, value in named:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ConfigError(f"rates: {name} has to be a number of at least 0, got {value!r}.")
        if self.decay == 0:
            raise ConfigError(
                "rates: a decay of 0 lets only the last layer train. Use a freezing schedule for that, or a decay such as 0.9."
            )

    def factor(self, t: Trained, depths: Depths) -> float:
        """What the learning rate of one tensor is multiplied by."""
        out: float = self.decay ** (depths.count - min(t.level, depths.count))
        if self.bands and depths.count:
            layer = min(max(t.level - 1, 0), depths.count - 1)
            out *= self.bands[layer * len(self.bands) // depths.count]
        return out * next((v for k, v in self.patterns.items() if fits(k, t)), 1.0)


def parameter_groups(model: nn.Module, lr: float, rates: Rates | None = None, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """What trains in a model, in groups with a learning rate each: the first argument of any optimizer.

    Args:
        model: with adapters or without.
        lr: the learning rate that the factors of `rates` multiply.
        weight_decay: of all tensors that `rates.weight_decay` does not name.

    Returns:
        dicts with `params`, `lr`, `weight_decay`, `name`, `names` (of the tensors) and `levels` (lowest and highest; see `Depths.level`), one for each
        pair of rate and weight decay, from the input on. Learning rate schedules multiply each group's own rate.

    Raises:
        ConfigError: if nothing trains, there are more bands than layers, or a key fits nothing.
    """
    rates = rates or Rates()
    all_, depths = trained(model)
    check_keys("rates.patterns", rates.patterns, all_)
    check_keys("rates.weight_decay", rates.weight_decay, all_)
    if len(rates.bands) > max(depths.count, 1):
        raise ConfigError(f"rates: {len(rates.bands)} bands for {depths.count} layers. Give {max(depths.count, 1)} or fewer.")
    groups: dict[tuple[float, float], list[Trained]] = {}
    for t in sorted(all_, key=lambda t: t.level):
        decay = next((v for k, v in rates.weight_decay.items() if fits(k, t)), weight_decay)
        groups.setdefault((lr * rates.factor(t, depths), decay), []).append(t)
    return [
        {
            "params": [t.parameter for t in ts], "lr": rate, "weight_decay": decay, "name": _name(ts, depths.count),
            "names": [t.name for t in ts], "levels": (min(t.level for t in ts), max(t.level for t in ts)),
        }
        for (rate, decay), ts in groups.items()
    ]  # fmt: skip


def _name(ts: Sequence[Trained], count: int) -> str:
    """Such as `layers 0-5 lora_A`."""
    low, high = min(t.level for t in ts), max(t.level for t in ts)
    ends = [{0: "input", count + 1: "behind"}.get(level, str(level - 1)) for level in sorted({low, high})]
    leaves = sorted({t.leaf for t in ts})
    return f"layers {'-'.join(ends)} {', '.join(leaves) if len(leaves) < 4 else f'{len(leaves)} kinds of tensors'}"
