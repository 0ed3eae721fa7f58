"""Merging an adapter into a model's files, tensor by tensor, without building the model."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .blocks.saved import ModulesToSaveWrapper
from .checkpoint.base import BASE_KEY, differing, get_base_model_state_dict
from .checkpoint.keys import PREFIX
from .checkpoint.load import read_adapter
from .checkpoint.shards import DTYPES, INDEX, New, Stored, weights_in, write_index, write_shard
from .engine.defaults import CONFIG_NAME
from .engine.holders import Tensors
from .engine.layer import AdaptedLayer, adapted_layers
from .engine.loss import MergeReport
from .engine.merge import merged_tensors, owner_of
from .errors import LoadError, MergeError, hint
from .methods.trainable_tokens import TrainableTokensConfig
from .model import PeftModel


def merge_files(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    check_base: bool = True,
) -> MergeReport:
    """Merge an adapter's folder into a model's folder of safetensors files, and write a new folder with the same files.

    In memory are the adapter and one weight at a time with its merged values; a change that is no low-rank matrix is formed whole, in float32. Tensors
    that nothing changes are copied byte for byte.

    Args:
        base: the model's folder; its tensors have the names that the adapter was trained with.
        adapter: the adapter's folder.
        out: a folder that is not there yet, or empty. It appears when it is complete.
        model: a model with the base's names, on the meta device if you like, where names and shapes do not tell what the adapted modules are:
            convolutions with groups, attention in one matrix. It is left with the adapter on it.
        check_base: refuse a base that is not the one which the adapter's file remembers.

    Returns:
        what rounding lost, per layer.

    Raises:
        LoadError: if files are missing, damaged, packed by a quantisation library, or hold other names.
        ConfigError, NoMatchingPeftModuleError: if the adapter does not fit.
        MergeError: if it cannot be merged like this, or gives numbers that are not finite. Nothing is written then.
    """
    base, adapter, target = Path(base), Path(adapter), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise MergeError(f"{target} is there already. Give a new folder: what is there is not overwritten.")
    stored, config = weights_in(base), _config(base)
    if config.get("quantization_config"):
        raise LoadError(
            f"{base} is packed by a quantisation library. Merge into the unquantised model, or load it and call merge_and_unload()."
        )
    fields = _config(adapter, CONFIG_NAME)
    if ranges := fields.get("layer_replication"):
        raise MergeError(
            f"The adapter stands on a stack of layers that layer_replication={ranges} makes of the model's, and the files have those once: merged, each "
            "needs weights of its own. Load the model, put the adapter on it (PeftModel.from_pretrained), call merge_and_unload() and save_pretrained() "
            "of what it returns."
        )
    if check_base:
        _check_base(read_adapter(adapter).metadata.get(BASE_KEY, ""), stored, base)
    _check_experts(stored, fields.get("target_parameters") or (), base)
    whole = PeftModel.from_pretrained(model if model is not None else _skeleton(stored, adapter), adapter)
    merging = _Merging(whole, stored, config)
    with _appearing(target) as folder:
        files: dict[str, list[str]] = {}
        for name, place in stored.items():
            files.setdefault(place.file.name, []).append(name)
        size = 0
        for file, names in files.items():
            size += write_shard(folder / file, {n: merging.new.get(n, stored[n]) for n in names})
        if (base / INDEX).is_file():
            write_index(folder, files, size)
        for path in base.iterdir():
            if (
                path.is_file()
                and path.name not in files
                and path.name not in (INDEX, CONFIG_NAME)  # an adapter's config would stand there without its adapter
                and path.suffix not in (".bin", ".safetensors", ".pt", ".pth")
            ):
                shutil.copy2(path, folder / path.name)
    return merging.report


class _Merging:
    """What is made when its place in a file has come."""

    def __init__(self, model: Any, stored: Mapping[str, Stored], config: Mapping[str, Any]) -> None:
        self.stored, self.report = stored, MergeReport()
        self.tied = _head_is_tied(config, stored)
        self.waiting: dict[str, Tensor] = {}  # what was merged together with a tensor that came before it
        self.new: dict[str, New] = {}
        tree, name = model.base_model.model, model.active_adapter
        self.brought = {
            k: t for k, t in get_base_model_state_dict(tree).items() if not t.is_meta
        }  # biases and tables that the adapter's file holds
        for key, t in self.brought.items():
            self._plan_given(key, t)
        for path, layer in adapted_layers(tree):
            if name in layer.attached:
                self._plan_layer(path.replace(".token_adapter", ""), layer, name)
        for path, module in tree.named_modules():
            saved: Any = module.modules_to_save if isinstance(module, ModulesToSaveWrapper) else {}
            if name in saved:
                if _is_table(stored.get(f"{path}.weight"), config):
                    self._check_apart(path)
                for key, t in saved[name].state_dict(prefix=f"{path}.").items():
                    self._plan_given(key, t)

    def _plan_layer(self, path: str, layer: AdaptedLayer, name: str) -> None:
        method = layer.attached[name].config
        if why := method.unmergeable:
            raise MergeError(f"{path}: the adapter cannot be merged: {why}. Keep it unmerged.")
        if isinstance(layer.base_layer, AdaptedLayer) or layer.site.kind in ("attention", "self_attention", "block"):
            raise MergeError(f"{path!r} takes several tensors at once. Load the model and call merge_and_unload().")
        if layer.site.kind == "embedding" and not isinstance(method, TrainableTokensConfig):
            self._check_apart(path)
        for key in layer.frozen_tensors():
            full = f"{path}.{key}"
            self._plan(full, self._held(full), partial(self._merged, path, layer, name, key))

    def _check_apart(self, path: str) -> None:
        if self.tied:
            raise MergeError(
                f"The model's head is tied to {path!r}, and would change with it; merged in memory they come apart. Load the model and call "
                "merge_and_unload(), which unties them."
            )

    def _plan_given(self, key: str, t: Tensor) -> None:
        """A tensor that the adapter's file holds whole takes the place of the base's, in the base's dtype."""
        held = self._held(key)
        self._plan(key, held, lambda: t.to(DTYPES[held.dtype]), tuple(t.shape))

    def _held(self, key: str) -> Stored:
        if key not in self.stored:
            raise LoadError(
                f"The files have no tensor {key!r}, which the adapter changes.{hint(key, self.stored)} A head that is tied to the embeddings has none of "
                "its own: load the model and call merge_and_unload() instead."
            )
        return self.stored[key]

    def _plan(self, key: str, held: Stored, make: Any, shape: tuple[int, ...] | None = None) -> None:
        if held.dtype not in ("F64", "F32", "F16", "BF16"):
            raise LoadError(f"{key!r} is stored in {held.dtype}, into which nothing can be merged. Use the model's unquantised files.")
        self.new[key] = New(held.dtype, shape or held.shape, make)

    @torch.no_grad()
    def _merged(self, path: str, layer: AdaptedLayer, name: str, key: str) -> Tensor:
        if f"{path}.{key}" in self.waiting:
            return self.waiting.pop(f"{path}.{key}")
        at = {k: f"{path}.{k}" for k in layer.frozen_tensors()}
        read = {k: self.brought[full] if full in self.brought else self.stored[full].read() for k, full in at.items()}
        for k, t in read.items():
            _put(layer, k, t)
        _complete(path, layer, name)
        made, self.report.layers[path] = merged_tensors(path, layer, [name])
        for k, t in read.items():
            _put(layer, k, t.to("meta"))  # its memory is free again
        out = {**read, **made}
        self.waiting |= {f"{path}.{k}": t for k, t in out.items() if k != key}
        return out[key]


def _put(layer: AdaptedLayer, key: str, t: Tensor) -> None:
    owner, name = owner_of(layer, key)
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(t, requires_grad=False)
    else:
        owner._buffers[name] = t


def _complete(path: str, layer: AdaptedLayer, name: str) -> None:
    """Make those of the adapter's tensors that follow from the frozen weight, which is there now."""
    a = layer.attached[name]
    assert a.place is not None
    missing = [n for n in a.leaves if a.tensor(n).is_meta]
    if missing:
        for n, t in a.config.start(a.place, only_frozen=True).items():
            if n in missing:
                store, key = a.source[n]
                store[key] = t.detach().to(dtype=a.tensor(n).dtype).contiguous().clone()
        a.config.settle([(a.place, Tensors(a))], loaded=True)
    if any(a.tensor(n).is_meta for n in a.leaves):
        raise MergeError(
            f"{path}: {type(a.config).__name__} computes tensors from all of the model's weights when it is loaded. Load the model and call merge_and_unload()."
        )


# -------------------------------------------------------------------- the model without its numbers


def _skeleton(stored: Mapping[str, Stored], adapter: Path) -> nn.Module:
    """Modules on the meta device that have the names and shapes of the files, as far as the adapter can mean them."""
    tensors = read_adapter(adapter).tensors
    tables = {k.partition(".lora_embedding_")[0].removeprefix(PREFIX) for k in tensors if ".lora_embedding_" in k}
    tables |= {k.partition(".token_adapter")[0].removeprefix(PREFIX) for k in tensors if ".token_adapter" in k}
    flipped = bool(_config(adapter, CONFIG_NAME).get("fan_in_fan_out")) or any(_is_flipped(name, stored) for name in stored)
    root = _Skeleton()
    for name, place in stored.items():
        path, _, leaf = name.rpartition(".")
        module = _module(root, path) if path else root
        if leaf == "weight" and (made := _typed(place, stored.get(f"{path}.bias"), path in tables, flipped)) is not None:
            for key, child in module._modules.items():
                made.add_module(key, child)
            _replace(root, path, made)
        elif leaf not in module._parameters:
            t = torch.empty(place.shape, dtype=DTYPES.get(place.dtype, torch.uint8), device="meta")
            module.register_parameter(leaf, nn.Parameter(t, requires_grad=False))
    held = {k.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer") for k in tensors if k.endswith(".weight")}
    root.held = sorted((p for p in held if f"{p}.weight" in stored), key=lambda p: p not in tables)
    return root


class _Skeleton(nn.Module):
    """It tells, as transformers' models do, which tables the adapter's file may hold whole: the embeddings first, if there are any."""

    held: Sequence[str] = ()

    def get_input_embeddings(self) -> nn.Module | None:
        return self.get_submodule(self.held[0]) if self.held else None

    def get_output_embeddings(self) -> nn.Module | None:
        return self.get_submodule(self.held[1]) if len(self.held) > 1 else None


def _is_flipped(name: str, stored: Mapping[str, Stored]) -> bool:
    """Whether a bias shows that a weight is stored as (n_in, n_out), as transformers' Conv1D has it; of a square one nothing does."""
    shape, bias = stored[name].shape, stored.get(f"{name.removesuffix('.weight')}.bias")
    return name.endswith(".weight") and len(shape) == 2 and bias is not None and bias.shape == shape[1:] and shape[0] != shape[1]


def _typed(place: Stored, bias: Stored | None, table: bool, flipped: bool) -> nn.Module | None:
    """The layer that a weight of this shape is most likely to belong to; None for a vector."""
    shape, dtype = place.shape, DTYPES.get(place.dtype, torch.float32)
    if not dtype.is_floating_point:
        return None
    more: dict[str, Any] = {"device": "meta", "dtype": dtype}
    if len(shape) == 2 and table:
        return nn.Embedding(*shape, **more)
    if len(shape) == 2 and flipped and bias is not None and bias.shape == shape[1:]:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            conv: nn.Module = Conv1D(shape[1], shape[0])
        return conv.to(dtype)
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=bias is not None, **more)
    kind: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}.get(len(shape))
    return kind(shape[1], shape[0], shape[2:], bias=bias is not None, **more) if kind is not None else None


def _module(root: nn.Module, path: str) -> nn.Module:
    for name in path.split("."):
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]
    return root


def _replace(root: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    (_module(root, parent) if parent else root)._modules[name] = new


# -------------------------------------------------------------------- files


def _head_is_tied(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> bool:
    """Whether the model's head has no weights but its embeddings'. Configs of models that are tied by default need not say so: then it is tied if there
    is a head and the files have no second table."""
    parts = [c for c in (config, config.get("text_config")) if isinstance(c, Mapping)]
    said = [bool(c["tie_word_embeddings"]) for c in parts if "tie_word_embeddings" in c]
    if said:
        return any(said)
    headed = any(a.endswith(_HEADED) for a in config.get("architectures") or ())
    return headed and sum(_is_table(place, config) for place in stored.values()) < 2


_HEADED = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "DoubleHeadsModel")


def _is_table(place: Stored | None, config: Mapping[str, Any]) -> bool:
    """Whether this is a matrix with a row for each token."""
    parts = [c for c in (config, config.get("text_config")) if isinstance(c, Mapping)]
    return place is not None and len(place.shape) == 2 and place.shape[0] in [c.get("vocab_size") for c in parts]


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    path = folder / name
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    except (OSError, ValueError) as e:
        raise LoadError(f"{path} is not JSON: {e}") from e
    if not isinstance(found, dict):
        raise LoadError(f"{path} has to hold a table, with names and values; it holds a {type(found).__name__}.")
    return found


def _check_base(remembered: str, stored: Mapping[str, Stored], base: Path) -> None:
    difference = differing(remembered, lambda name: stored[name].read() if name in stored else None)
    if difference is not None:
        raise LoadError(
            f"{base} is not the base model the adapter was made for: {difference}. Give that one, or pass check_base=False if another is meant."
        )


def _check_experts(stored: Mapping[str, Stored], parameters: Sequence[str], base: Path) -> None:
    """Raise LoadError if the adapter changes fused experts, and the files have them one by one."""
    single = next((name for name in stored if re.search(r"\.experts\.\d+\.", name)), None)
    fused = next((p for p in parameters if ".experts." in f".{p}" and not any(f".{name}".endswith(f".{p}") for name in stored)), None)
    if single is not None and fused is not None:
        raise LoadError(
            f"{base} holds its experts one by one ({single!r}), and the adapter changes the one parameter that transformers makes of them in memory "
            f"({fused!r}): file to file the one does not go into the other. Load the model with from_pretrained of transformers, put the adapter on it "
            "(PeftModel.from_pretrained), call merge_and_unload() and save_pretrained() of what it returns: that writes the experts one by one again."
        )


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place in the end, and goes away if something fails."""
    beside = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        yield beside
        beside.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.replace(beside, target)
    except BaseException as e:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        if isinstance(e, (OSError, SafetensorError)):
            raise MergeError(f"{target} could not be written: {e}. Nothing of it is there.") from e
        raise
