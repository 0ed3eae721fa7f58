"""Old LoRA files of mixtures of experts, which have tensors for each expert, read into models that keep all experts in one parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.fused import Fusion, conversions, fusions, layer_of, renamed
from ..errors import LoadError
from .keys import PREFIX, base_root, join_path, walk

_FACTORS = (".lora_A.weight", ".lora_B.weight")


def split_key(key: str, known: Sequence[Fusion]) -> tuple[str, str, int, int, str] | None:
    """(parameter, pattern of the source, which source, which expert, factor) of a key of one expert's factor; None for any other key."""
    factor = next((f for f in _FACTORS if key.endswith(f)), None)
    for fusion in known if factor is not None else ():
        found = fusion.find(key[: -len(factor)])  # type: ignore[arg-type]
        if found is not None and factor is not None:
            head, source, expert = found
            return head + fusion.parameter, fusion.sources[source] + factor, source, expert, factor
    return None


def fuse(factor: str, parts: Mapping[int, Sequence[Tensor]], sources: int, n_out: int) -> Tensor:
    """The one A or B of a parameter from those of its experts.

    Args:
        factor: which of the two.
        parts: by source, the factors (r, n_in) or (n_out / sources, r) of the experts in order.
        sources: how many there are, those without an adapter included.
        n_out: of the parameter.

    Returns:
        A (experts · r', n_in), expert by expert, or B (n_out, r' · experts), rank by rank; r' is the sum of the ranks.
    """
    if factor == _FACTORS[0]:
        return torch.cat([torch.cat(rows) for rows in zip(*(parts[i] for i in sorted(parts)), strict=True)])
    high = n_out // sources
    up = []
    for columns in zip(*(parts[i] for i in sorted(parts)), strict=True):
        whole = columns[0].new_zeros(n_out, sum(c.shape[1] for c in columns))
        at = 0
        for i, c in zip(sorted(parts), columns, strict=True):
            whole[i * high : (i + 1) * high, at : at + c.shape[1]] = c
            at += c.shape[1]
        up.append(whole)
    return torch.stack(up).permute(1, 2, 0).reshape(n_out, -1)


def fuse_tensors(
    model: nn.Module, peft_config: Any, adapter_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> dict[str, Tensor]:
    """An adapter's tensors as this model takes them: factors of single experts put together, whatever else there is left as it is.

    Args:
        model: a PeftModel or a model with the adapter attached.
        peft_config: the adapter's.
        adapter_state_dict: by key in a file.

    Raises:
        LoadError: if experts are missing.
    """
    root = base_root(model)
    known = fusions(root) if any(".experts." in k for k in adapter_state_dict) else []
    if not known:
        return dict(adapter_state_dict)
    rules = conversions(root)
    out: dict[str, Tensor] = {}
    found: dict[tuple[str, str], dict[int, dict[int, Tensor]]] = {}
    for key, value in adapter_state_dict.items():
        at = split_key(renamed(key.removeprefix(PREFIX), rules), known)
        if at is None:
            out[key] = value
        else:
            parameter, _, source, expert, factor = at
            found.setdefault((parameter, factor), {}).setdefault(source, {})[expert] = value
    paths = {id(s.module): s.path for s in walk(root)}
    for (parameter, factor), parts in found.items():
        layer = layer_of(root, parameter, adapter_name)
        if layer is None:
            raise LoadError(f"The file has factors for the experts in {parameter!r}, and the adapter {adapter_name!r} is not on it.")
        everyone = set(range(layer.site.experts))
        for experts in parts.values():
            if set(experts) != everyone:
                raise LoadError(f"The file has no {factor[1:]} for the experts {sorted(everyone - set(experts))} of {parameter!r}.")
        sources = next(len(f.sources) for f in known if parameter.endswith(f.parameter))
        ordered = {i: [experts[e] for e in sorted(experts)] for i, experts in parts.items()}
        out[PREFIX + join_path(paths[id(layer)], factor[1:])] = fuse(factor, ordered, sources, layer.site.n_out)
    return out
