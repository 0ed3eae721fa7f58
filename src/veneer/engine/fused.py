"""Experts that were modules, one each, and are rows of one parameter now: what an adapter's config that names the old modules means.

transformers 5 keeps the experts of a mixture in 3-D parameters and tells, for each model, of which modules' weights they were made
(`transformers.conversion_mapping`); only that is read here, so a model it can convert is a model whose adapters veneer can.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ConfigError, PeftWarning
from ..method import by_pattern, ending
from ..types import name_of
from .holders import visited

FIELDS = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")  # what `take_fused` may change


@dataclass(frozen=True)
class Fusion:
    """How one parameter came to be: W[e] is the weights of the sources of expert e, one above the other.

    Attributes:
        parameter: the end of its name, such as `mlp.experts.gate_up_proj`.
        sources: the ends of the old modules' names, with a star for the expert's number, such as `mlp.experts.*.gate_proj`.
    """

    parameter: str
    sources: tuple[str, ...]

    def find(self, name: str) -> tuple[str, int, int] | None:
        """Of an old module's name: (what stands before, which source, which expert), or None if it is none of these."""
        for i, source in enumerate(self.sources):
            before, after = source.split("*")
            found = re.fullmatch(rf"(|.*\.){re.escape(before)}(\d+){re.escape(after)}", name)
            if found:
                return found[1], i, int(found[2])
        return None


def conversions(model: nn.Module) -> list[Any]:
    """What transformers does to the names and weights of old checkpoints of this model; nothing for models of other libraries."""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if base is None or not isinstance(model, base):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model, add_legacy=False))


def fusions(model: nn.Module) -> list[Fusion]:
    """The parameters of a model that hold what were modules, experts one by one."""
    if not any(p is not None and p.ndim == 3 for _, m in visited(model) for p in m._parameters.values()):
        return []
    found = []
    for c in conversions(model):
        steps = [(type(op).__name__, getattr(op, "dim", None)) for op in getattr(c, "operations", ())]
        if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) or len(c.target_patterns) != 1:
            continue
        parameter, *sources = (p.replace("\\.", ".").strip(".") for p in (*c.target_patterns, *c.source_patterns))
        if all(s.count("*") == 1 and s.endswith(".weight") for s in sources) and _hits(model, parameter):
            found.append(Fusion(parameter, tuple(s.removesuffix(".weight") for s in sources)))
    return found


def take_fused(model: nn.Module, config: Any) -> None:
    """Let a LoRA config's targets that mean experts one by one mean the parameter that holds them now, in place.

    Where several of them have become one parameter (gate and up), its A is theirs one above the other and its B block-diagonal, so the rank is their
    sum; alpha grows along, so that the scaling stays. An entry that also means modules which are there still (a shared expert) means those too.

    Raises:
        ConfigError: if modules that are one parameter now have different ranks or scalings.
    """
    targets = getattr(config, "target_modules", None)
    if name_of(config.peft_type) != "LORA" or not targets or isinstance(targets, str):
        return
    meant = [(f, hit) for f in fusions(model) if (hit := [(s, e) for s in f.sources if (e := _entries(s, targets))])]
    if not meant:
        return
    modules = [n.replace(".base_layer", "") for n, _ in model.named_modules()]
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    parameters = list(config.target_parameters or ())
    for fusion, hit in meant:
        names = [s.replace("*", "0") for s, _ in hit]
        sizes = {(by_pattern(config.rank_pattern, n, config.r), by_pattern(config.alpha_pattern, n, config.lora_alpha)) for n in names}
        if len(sizes) > 1:
            raise ConfigError(
                f"{' and '.join(s for s, _ in hit)} are one parameter in this model ({fusion.parameter}) and have different (r, alpha): {sorted(sizes)}. "
                "Give them the same."
            )
        ((r, alpha),) = sizes
        n = len(hit)
        parameters += [fusion.parameter] if fusion.parameter not in parameters else []
        for table, now, value in (
            (ranks, config.r, n * r),
            (alphas, config.lora_alpha, alpha * (math.sqrt(n) if config.use_rslora else n)),
        ):
            for key in [k for k in table if any(ending(k).match(name) for name in names) and not any(ending(k).match(m) for m in modules)]:
                del table[key]
            if value != now:
                table[fusion.parameter] = value
    used = {e for _, hit in meant for _, entries in hit for e in entries}
    still = {e for e in used if any(f".{n}".endswith(f".{e}") for n in modules)}
    config.target_modules = set(targets) - (used - still)
    config.target_parameters, config.rank_pattern, config.alpha_pattern = parameters, ranks, alphas
    warnings.warn(
        f"The experts of this model are kept in one parameter each, so {sorted(used)} of target_modules now means target_parameters={parameters}"
        + (f" (and the modules that are called {sorted(still)} still)" if still else "")
        + ". The config says so from here on.",
        PeftWarning,
        stacklevel=5,
    )


def _entries(source: str, targets: Collection[str]) -> list[str]:
    """The entries of the targets that mean a source."""
    parts = source.split(".")
    return [t for t in targets if _ends(parts, t.split("."))]


def _ends(source: list[str], entry: list[str]) -> bool:
    """Whether a name that ends like `source`, with any number for the star, may end with the entry."""
    if entry[-1] != source[-1]:
        return False
    return all(b in (a, "*") for a, b in zip(reversed(entry), reversed(source), strict=False))


def _hits(model: nn.Module, end: str) -> bool:
    return any(f".{n}".endswith(f".{end}") for n in (n.replace(".base_layer", "") for n, _ in model.named_parameters()))


def renamed(key: str, rules: Collection[Any]) -> str:
    """A key as transformers renames it when it loads the base model."""
    for rule in rules:
        if not hasattr(rule, "operations"):
            key = rule.rename_source_key(key)[0]
    return key


def layer_of(model: nn.Module, parameter: str, adapter: str) -> Any:
    """The adapted layer of a parameter, by the parameter's name; None if the adapter is not on it."""
    from .layer import adapted_layers

    for _, layer in adapted_layers(model):
        a: Mapping[str, Any] = layer.attached
        if adapter in a and layer.site.kind == "parameter" and a[adapter].place.called == parameter:
            return layer
    return None
