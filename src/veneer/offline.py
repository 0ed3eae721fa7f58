"""An adapter merged into a model's files, without building the model: tensor by tensor, from file to file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .blocks.saved import ModulesToSaveWrapper
from .checkpoint.base import base_tensors
from .checkpoint.keys import PREFIX, Spot
from .checkpoint.load import read_adapter
from .checkpoint.shards import Stored, Write, header, model_files, names_of, write
from .config import PeftConfig
from .engine.layer import AdaptedLayer
from .engine.loss import check_finite
from .engine.merge import merged_tensors
from .engine.ties import holders
from .errors import LoadError, MergeError, hint
from .model import PeftModel
from .sites.linear import LinearSite

_ROWS = 1 << 20  # numbers of a weight that are widened at a time


def merge_files(base: str | os.PathLike[str], adapter: str | os.PathLike[str], out: str | os.PathLike[str]) -> list[str]:
    """Merge an adapter into the safetensors files of a model's folder, and write them to another folder with all else that is in the first.

    Only one weight at a time is in memory: of a low-rank change a few rows of it in float32, of another change the whole. The sums are those of `merge`:
    in float32, rounded once. Files, tensors, dtypes and the index stay as they are. The folder is written beside `out`, and renamed when it is complete.

    Args:
        base: a folder with `model.safetensors`, or several files with an index. Where its `config.json` names a class of transformers, a skeleton of
            that on the meta device tells the layers; else the tensors' names do.
        adapter: the adapter's folder, or its name on the Hub.
        out: a folder that does not exist yet, or is empty.

    Returns:
        the names of the tensors that were changed.

    Raises:
        LoadError: if the files do not fit together; nothing is written.
        MergeError: if the adapter cannot be merged, or not in this way (it needs other weights than the one it changes, or changes a tied one).
    """
    base, out = Path(base), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LoadError(f"{out} exists already. Give a folder that does not, or is empty.")
    files = {name: header(base / name) for name in model_files(base)}
    stored = names_of(tensors for tensors, _ in files.values())
    config = PeftConfig.from_pretrained(adapter)
    model = _adapted(_skeleton(base, stored, adapter), adapter, config)
    plan = _plan(model, stored)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for path in sorted(base.iterdir()):
            if path.is_file() and path.suffix not in (".safetensors", ".bin", ".gguf"):
                shutil.copyfile(path, beside / path.name)
        for name, (tensors, metadata) in files.items():
            write(beside / name, tensors, metadata, lambda key, put: plan[key].write(stored, put) if key in plan else False)
        if out.exists():
            out.rmdir()
        beside.chmod(base.stat().st_mode & 0o777)
        beside.replace(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return list(plan)


# -------------------------------------------------------------------- the skeleton


def _skeleton(base: Path, stored: Mapping[str, Stored], adapter: str | os.PathLike[str]) -> nn.Module:
    """The model on the meta device: of transformers' class, or made of the tensors' names."""
    path = base / "config.json"
    described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if described.get("quantization_config"):
        raise MergeError(f"{base} is quantised, so its files hold no weights to add to. Merge in memory: model.merge_and_unload(into=...).")
    if described.get("architectures") and (model := _of_transformers(base, described["architectures"][0])) is not None:
        return model
    return _of_names(stored, set(read_adapter(adapter).tensors))


def _of_transformers(base: Path, name: str) -> nn.Module | None:
    try:
        import transformers
    except ImportError:
        return None
    kind: Any = getattr(transformers, name, None)
    if kind is None:
        return None
    with torch.device("meta"):
        model: nn.Module = kind(transformers.AutoConfig.from_pretrained(base))
    return model


def _of_names(stored: Mapping[str, Stored], keys: set[str]) -> nn.Module:
    """Linear layers and embeddings where the adapter has something and the base a matrix; holders of tensors elsewhere."""
    root = nn.Module()
    owners: dict[str, dict[str, Stored]] = {}
    for name, t in stored.items():
        path, _, attribute = name.rpartition(".")
        owners.setdefault(path, {})[attribute] = t
    for path, tensors in sorted(owners.items()):
        at = root
        *parents, last = path.split(".")
        for part in parents:
            at = at._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        mine = {k.removeprefix(f"{PREFIX}{path}.") for k in keys if k.startswith(f"{PREFIX}{path}.")}
        shape = tensors["weight"].shape if "weight" in tensors else ()
        module: nn.Module = nn.Module()
        if mine and len(shape) != 2:
            raise MergeError(
                f"The adapter changes {path!r}, whose shape {shape} does not tell what layer it is. Put the model's config.json into its folder."
            )
        if any("embedding" in k for k in mine):
            module = nn.Embedding(shape[0], shape[1], device="meta")
        elif mine:
            module = nn.Linear(shape[1], shape[0], bias="bias" in tensors, device="meta")
        for attribute, t in tensors.items():
            if attribute not in module._parameters:
                module.register_parameter(attribute, nn.Parameter(torch.empty(t.shape, device="meta"), requires_grad=False))
        old = at._modules.get(last)
        module._modules.update(old._modules if old is not None else {})
        at._modules[last] = module
    return root


def _adapted(skeleton: nn.Module, adapter: str | os.PathLike[str], config: PeftConfig) -> nn.Module:
    """The skeleton with the adapter, whose tensors are there."""
    if why := getattr(config, "unmergeable", ""):
        raise MergeError(f"The adapter cannot be merged: {why}. Keep it unmerged.")
    if not hasattr(config, "target_modules"):
        raise MergeError(f"A {type(config).__name__} changes no weights, so there is nothing to merge.")
    tied = {f"{path}.{name}".lstrip(".") for found in holders(skeleton).values() for path, _, name in found}
    model = PeftModel.from_pretrained(skeleton, adapter, low_cpu_mem_usage=True, config=config)
    for name, spot, key in base_tensors(model):
        if name in tied and any(isinstance(w, (AdaptedLayer, ModulesToSaveWrapper)) for w, _ in spot.wrappers):
            raise MergeError(
                f"The adapter changes {name!r}, which the model ties to another weight: {key!r} stands once in the files. Merge in memory."
            )
    return model


# -------------------------------------------------------------------- what is written


class _Kept:
    """A tensor that the adapter's file brings whole."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor

    def write(self, stored: Mapping[str, Stored], put: Write) -> bool:
        old = stored[self.name]
        if tuple(self.tensor.shape) != old.shape:
            raise LoadError(f"{self.name!r} is {tuple(self.tensor.shape)} in the adapter's file and {old.shape} in the model's.")
        put(self.tensor.to(old.read().dtype))
        return True


class _Merged:
    """A tensor of an adapted layer; `names`: those of the layer in the files, by name in its module."""

    def __init__(self, layer: AdaptedLayer, attribute: str, names: Mapping[str, str]) -> None:
        self.layer, self.attribute, self.names = layer, attribute, names

    @torch.no_grad()
    def write(self, stored: Mapping[str, Stored], put: Write) -> bool:
        layer, adapters = self.layer, list(self.layer.attached)
        module = layer.base_layer
        before = dict(module._parameters)
        trained = {
            a for a in self.names if (p := before[a]) is not None and not p.is_meta
        }  # a bias or an embedding that came with the adapter
        frozen = {a: stored[n].read() for a, n in self.names.items()}
        frozen |= {a: p.data.to(frozen[a].dtype) for a in trained if (p := before[a]) is not None}
        for a, t in frozen.items():
            module._parameters[a] = nn.Parameter(t, requires_grad=False)
        mine = frozen[self.attribute]
        try:
            if self.attribute == getattr(layer.site, "bias_name", None) and not self._moves_bias(adapters):
                if self.attribute in trained:
                    put(mine)
                return self.attribute in trained
            for piece in self._thin(mine, adapters) or self._whole(mine, adapters):
                check_finite(layer.name, adapters, piece)
                put(piece)
        finally:
            module._parameters.update(before)
        return True

    def _moves_bias(self, adapters: Sequence[str]) -> bool:
        """Whether a change makes it other than it is."""
        return any(c.shift is not None or c.left_on_bias for c, _ in self.layer.changes(adapters, at_rest=True))

    def _thin(self, w: Tensor, adapters: Sequence[str]) -> Iterator[Tensor] | None:
        """Some rows at a time, where the change is low-rank and nothing else; else None."""
        site = self.layer.site
        changes = self.layer.changes(adapters, at_rest=True)
        factors = [c.add.thin() if c.additive and c.add is not None else None for c, _ in changes]
        if not isinstance(site, LinearSite) or self.attribute != site.weight_name or any(f is None or f[0].ndim != 2 for f in factors):
            return None
        wide = torch.promote_types(w.dtype, torch.float32)
        thin = [(u.to(wide), v.to(wide), s) for u, v, s in filter(None, factors)]
        thin = [(v.mT, u.mT, s) if site.transposed else (u, v, s) for u, v, s in thin]

        def rows() -> Iterator[Tensor]:
            step = max(_ROWS // max(w.shape[1], 1), 1)
            for at in range(0, w.shape[0], step):
                some = w[at : at + step].to(wide)
                for u, v, s in thin:
                    some = some.addmm(u[at : at + step], v, alpha=s)
                yield some.to(w.dtype)

        return rows()

    def _whole(self, w: Tensor, adapters: Sequence[str]) -> Iterator[Tensor]:
        merged, _ = merged_tensors(self.layer.name, self.layer, list(adapters))
        yield merged.get(self.attribute, w)


def _plan(model: nn.Module, stored: Mapping[str, Stored]) -> dict[str, Any]:
    """What is to be written otherwise than it is, by the tensors' names in the files."""
    plan: dict[str, Any] = {}
    layers: dict[int, tuple[AdaptedLayer, dict[str, str]]] = {}
    for name, spot, key in base_tensors(model):
        t = spot.module._parameters.get(key, spot.module._buffers.get(key))
        wrapper = spot.wrappers[-1][0] if spot.wrappers else None
        if len(spot.wrappers) > 1 or (isinstance(wrapper, AdaptedLayer) and wrapper.base_layer is not spot.module):
            _refuse_nested(spot)
        if isinstance(wrapper, AdaptedLayer):
            _check_there(wrapper)
            at = _name(name, model, stored)
            layers.setdefault(id(wrapper), (wrapper, {}))[1][key] = at
        elif isinstance(wrapper, ModulesToSaveWrapper) and "default" in wrapper.modules_to_save:
            copied = wrapper.modules_to_save["default"]
            plan[_name(name, model, stored)] = _Kept(_name(name, model, stored), copied._parameters.get(key, copied._buffers.get(key)))
        elif t is not None and not t.is_meta and isinstance(t, nn.Parameter):
            plan[_name(name, model, stored)] = _Kept(_name(name, model, stored), t)  # a trained bias, a saved embedding
    for layer, names in layers.values():
        plan |= {at: _Merged(layer, key, names) for key, at in names.items() if key in layer.site.tensors(layer.base_layer)}
    return plan


def _refuse_nested(spot: Spot) -> None:
    raise MergeError(
        f"{spot.path!r} is adapted in a way that a merge from file to file does not know (a parameter, or a layer in a layer). Merge in memory."
    )


def _check_there(layer: AdaptedLayer) -> None:
    for adapter, a in layer.attached.items():
        for leaf in (*a.leaves, *a.derived):
            if a.tensor(leaf).is_meta:
                raise MergeError(
                    f"{layer.name}: {leaf!r} of the adapter {adapter!r} is not in its file: it follows from the model's weights. Merge in memory, or "
                    "save it with the adapter (save_projection=True and its like)."
                )


def _name(name: str, model: nn.Module, stored: Mapping[str, Stored]) -> str:
    """The name of a tensor in the files: its own, or without, or with, the prefix of a model with a head."""
    root: Any = model
    prefix = getattr(root.get_base_model(), "base_model_prefix", "") or "model"
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in stored:
            return candidate
    raise LoadError(f"The adapter changes {name!r}, which is not in the model's files.{hint(name, stored)}")
