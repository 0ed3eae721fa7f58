"""The unquantised weights of a model that was loaded quantised: in files, in a state dict or in another model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import LoadError, hint

Original = str | Path | Mapping[str, Tensor] | nn.Module


class Weights:
    """Weights by the path of their layer. Names may lack the prefix of a head, or have one more."""

    def __init__(self, stored: Mapping[str, Any]) -> None:
        self._stored = stored  # the tensor, or the open file that holds it, by the tensor's name

    def weight(self, path: str, module: nn.Module) -> Tensor:
        """The weight that the quantised `module` at `path` was made of, in that module's layout; read now.

        Raises:
            LoadError: if there is none, or more than one that it could be.
        """
        key = self._key(path)
        found: Tensor = self._stored[key] if isinstance(self._stored[key], Tensor) else self._stored[key].get_tensor(key)
        return found.detach().mT if _flipped(module) else found.detach()

    def check(self, modules: Mapping[str, nn.Module], sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise LoadError unless every layer (by path) has its weight, of its shape. Nothing is read."""
        for path, size in sizes.items():
            key = self._key(path)
            held = self._stored[key]
            shape = tuple(held.shape if isinstance(held, Tensor) else held.get_slice(key).get_shape())
            wanted = tuple(size)[::-1] if _flipped(modules[path]) else tuple(size)
            if shape != wanted:
                raise LoadError(
                    f"{key!r} has the shape {shape}, and the layer {path!r} {wanted}. Give the model's own unquantised weights."
                )

    def _key(self, path: str) -> str:
        wanted = f"{path}.weight"
        hits = [wanted] if wanted in self._stored else [k for k in self._stored if k.endswith(f".{wanted}") or wanted.endswith(f".{k}")]
        if len(hits) != 1:
            raise LoadError(f"There are {len(hits) or 'no'} tensors that could be {wanted!r} unquantised.{hint(wanted, self._stored)}")
        return hits[0]


def _flipped(module: nn.Module) -> bool:
    """Whether the module stands for a Conv1D of transformers, whose file holds Wᵀ."""
    return any(c.__name__ == "Conv1D" for c in getattr(module, "source_cls", object).__mro__)


@contextmanager
def original_weights(model: nn.Module, given: Original | None = None) -> Iterator[Weights]:
    """The unquantised weights of `model`, files open as long as the context lasts.

    Args:
        given: a folder or file of safetensors, a state dict, or the unquantised model; where left out, the folder the model was loaded from, or
            its files in the Hub's local cache. The network is not used.

    Raises:
        LoadError: if there are none.
    """
    if isinstance(given, nn.Module):
        yield Weights(given.state_dict())
        return
    if isinstance(given, Mapping):
        yield Weights(given)
        return
    from safetensors import safe_open

    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(f, framework="pt")) for f in _files(model, given)]
        yield Weights({key: f for f in opened for key in f.keys()})  # noqa: SIM118  a file, no mapping


def _files(model: nn.Module, given: str | Path | None) -> list[Path]:
    """The safetensors files of the unquantised model."""
    origin = given or getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)
    if not origin:
        raise LoadError(
            "Nothing says where the unquantised weights are. Give model_path (when merging: original), a folder or file of safetensors."
        )
    place = Path(origin)
    if not place.exists() and given is None:
        from huggingface_hub import try_to_load_from_cache

        try:
            found = [try_to_load_from_cache(origin, n) for n in ("model.safetensors", "model.safetensors.index.json")]
        except ValueError:  # no name that a repository may have: a folder that is gone
            found = []
        place = next((Path(f).parent for f in found if isinstance(f, str)), place)
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if not files:
        raise LoadError(f"There are no safetensors files in {str(place)!r}. Give a folder or file with the unquantised weights.")
    return files
