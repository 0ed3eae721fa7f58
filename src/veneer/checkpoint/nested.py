"""Several adapted parameters of one module nest, and only the depth in its key tells whose a tensor is.

The first that the module registered is the innermost, as in PEFT's files. Veneer's own files of before 28 November 2026 nest them by name.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..engine.layer import adapted_layers
from ..sites import ParameterSite
from .base import BASE_KEY
from .keys import PREFIX, base_root

NESTING_KEY = "veneer_nesting"  # in the metadata of files that a model was saved to; without it they nest by name
NESTING = "registered"


def as_registered(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], model: nn.Module, adapter: str) -> Mapping[str, Tensor]:
    """The tensors of a file under the keys that this model has for them."""
    if BASE_KEY not in metadata or NESTING_KEY in metadata:
        return tensors
    moved: dict[str, str] = {}
    for layers in _nests(base_root(model), adapter).values():
        by_name = sorted(name for _, name in layers)
        places = {name: path for path, name in layers}
        moved |= {f"{PREFIX}{path}.lora_": f"{PREFIX}{places[by_name[i]]}.lora_" for i, (path, _) in enumerate(layers)}
    return {next((new + k.removeprefix(old) for old, new in moved.items() if k.startswith(old)), k): t for k, t in tensors.items()}


def _nests(root: nn.Module, adapter: str) -> dict[str, list[tuple[str, str]]]:
    """By module, (path of the layer, name of the parameter) of each that the adapter has there, from the inside out."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path, layer in adapted_layers(root):
        if isinstance(layer.site, ParameterSite) and adapter in layer.attached:
            found.setdefault(layer.name, []).append((path, layer.site.weight_key))
    return {name: layers[::-1] for name, layers in found.items() if len(layers) > 1}  # a wrapper comes before what it wraps
