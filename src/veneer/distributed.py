"""Several processes: which modules are units that sharding may gather and release as one, and writing a merged model that is sharded.

The engines are PyTorch's DistributedDataParallel, FSDP and tensor parallel, and DeepSpeed's ZeRO. What they do not know is that an adapted layer reads
the frozen weight and the adapter's tensors itself, without calling the modules that hold them: so the unit must contain the whole adapted layer.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from .bases import codec_for
from .blocks.saved import ModulesToSaveWrapper
from .checkpoint.keys import base_root, join_path, walk
from .checkpoint.save import replacing
from .checkpoint.shards import INDEX, SINGLE
from .engine.layer import AdaptedLayer, adapted_layers
from .engine.merge import check_packed_whole, merged_tensors
from .engine.offload import brought_in, kept
from .engine.wrapper import Wrapper
from .errors import ConfigError, MergeError, SaveError, hint
from .sharding import gathered, whole
from .states import load_state, save_state

__all__ = ["fsdp_auto_wrap_policy", "gathered", "load_state", "save_merged", "save_state", "shard", "units"]

_ASKED = "FSDP_TRANSFORMER_CLS_TO_WRAP"  # accelerate's environment variable: class names, separated by commas


def units(model: nn.Module) -> list[nn.Module]:
    """The modules to shard as units, inner ones never inside another's adapted layer: the model's blocks, else its outermost adapted layers.

    Blocks are what the environment variable FSDP_TRANSFORMER_CLS_TO_WRAP names, else what a transformers model calls `_no_split_modules`.

    Raises:
        ConfigError: if a class that the variable names does not occur in the model.
    """
    asked = [n.strip() for n in os.environ.get(_ASKED, "").split(",") if n.strip()]
    present = {type(m).__name__ for m in model.modules()}
    if unknown := [n for n in asked if n not in present]:
        raise ConfigError(f"{_ASKED} names {unknown[0]!r}, and the model has no module of this class.{hint(unknown[0], present)}")
    names = set(asked or getattr(base_root(model), "_no_split_modules", None) or ())
    found = [m for m in model.modules() if type(m).__name__ in names]
    if not found:
        found = [m for m in model.modules() if isinstance(m, Wrapper)]
    inside = {id(c) for m in model.modules() if isinstance(m, AdaptedLayer) for c in m.modules() if c is not m}
    # a block that is adapted as a whole is gathered with its adapter
    around = {id(m.get_base_layer()): m for _, m in adapted_layers(model)}
    return list(dict.fromkeys(around.get(id(m), m) for m in found if id(m) not in inside or id(m) in around))


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """PEFT's name: the `auto_wrap_policy` for FullyShardedDataParallel (`use_orig_params=True`), which wraps `units(model)`.

    PEFT wraps every small trained layer by itself as well. Here that would be wrong, and slow: an adapted layer reads its tensors in one go.
    """
    chosen = {id(m) for m in units(model)}

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int = 0, **_: Any) -> bool:
        return recurse or id(module) in chosen

    return policy


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2: `fully_shard` each of `units(model)` and then the model, in place. `options` go to `fully_shard` (mesh, mp_policy, offload_policy …).

    Every process has to have made the same adapter: seed all alike before get_peft_model, or load it from one file.
    """
    from torch.distributed.fsdp import fully_shard

    for unit in units(model):
        fully_shard(unit, **options)
    fully_shard(model, **options)
    return model


def save_merged(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_names: list[str] | None = None,
    max_shard_size: int = 5 * 2**30,
    is_main_process: bool | None = None,
) -> Path | None:
    """Write the model with its active adapters merged in, as transformers reads it, from whatever layout: one layer is whole at a time, and
    the model stays as it is. Packed weights are written dense.

    Args:
        adapter_names: merge these; by default those that act.
        max_shard_size: bytes per file.
        is_main_process: whether this process writes; by default rank 0 does. All processes have to call this.

    Returns:
        The folder, or None where nothing was written.

    Raises:
        MergeError: if an adapter cannot be merged.
        SaveError: if the disk refuses.
    """
    if is_main_process is None:
        is_main_process = not dist.is_initialized() or dist.get_rank() == 0
    folder, root = Path(directory), base_root(model)
    files: list[tuple[str, list[str]]] = []
    part: dict[str, Tensor] = {}

    def close() -> None:
        name = f"model-{len(files) + 1:05d}.safetensors"
        with replacing(folder / name) as beside:
            save_file(part, beside, metadata={"format": "pt"})
        files.append((name, sorted(part)))
        part.clear()

    try:
        if is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
        size = total = 0
        with gathered(model, ()):  # FSDP1 alone: the others are read one by one
            for name, t in _merged(root, adapter_names):
                if not is_main_process:
                    continue
                if part and size + t.nbytes > max_shard_size:
                    close()
                    size = 0
                part[name], size, total = t.detach().to("cpu").clone().contiguous(), size + t.nbytes, total + t.nbytes
        if not is_main_process:
            return None
        close()
        where = {key: name for name, keys in files for key in keys}
        with replacing(folder / INDEX) as beside:
            beside.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1), encoding="utf-8")
        (folder / SINGLE).unlink(missing_ok=True)  # which transformers would read instead
        _write_config(root, set(where), folder)
    except OSError as e:
        raise SaveError(f"The merged model could not be written to {str(folder)!r}: {e}.") from e
    return folder


def _merged(root: nn.Module, adapter_names: Sequence[str] | None) -> Iterator[tuple[str, Tensor]]:
    """(name in the bare model, whole tensor), in the same order on every process. What modules share comes once, unless one of them changes it."""
    spots = list(walk(root))
    origin = {s.memory: s.origin for s in spots}
    done: set[str] = set()
    seen: set[int] = set()
    for path, layer in adapted_layers(root):
        names = [n for n in (layer.active_adapters if adapter_names is None else adapter_names) if n in layer.attached]
        for name in names:
            if why := layer.attached[name].config.unmergeable:
                raise MergeError(f"{path}: the adapter {name!r} cannot be merged: {why}. Keep it unmerged.")
        if layer.quantised and names:
            check_packed_whole(path, layer.get_base_layer())
        with brought_in(layer.get_base_layer()):
            merged = merged_tensors(path, layer, names)[0] if names else {}
        for key, t in merged.items():
            owner, _, last = f"{path}.base_layer.{key}".rpartition(".")
            done.add(join_path(owner, last))
            yield join_path(origin[owner], last), t
    for spot in spots:
        module = spot.module
        if isinstance(module, ModulesToSaveWrapper):
            mine = [n for n in (module.active_adapters if adapter_names is None else adapter_names) if n in module.modules_to_save]
            for name, t in module.modules_to_save[mine[-1]].state_dict(keep_vars=True).items() if mine else ():
                done.add(join_path(f"{spot.memory}.original_module", name))
                yield join_path(spot.origin, name), whole(t)
        held_here = {**module._parameters, **module._buffers}
        if not (codec := codec_for(module)).plain:
            check_packed_whole(spot.memory, module)
            if (memory := join_path(spot.memory, "weight")) not in done:
                done.add(memory)
                yield join_path(spot.origin, "weight"), codec.weight(module)
            b = getattr(module, "bias", None)
            held_here = {"bias": b if isinstance(b, Tensor) else None}
        for name, held in held_here.items():
            memory = join_path(spot.memory, name)
            if held is None or memory in done or id(held) in seen or name in module._non_persistent_buffers_set:
                continue
            seen.add(id(held))
            yield join_path(spot.origin, name), whole(kept(module, name, held))


def _write_config(root: nn.Module, written: set[str], folder: Path) -> None:
    """The model's config.json, which says that what was tied is no longer where each got a tensor of its own."""
    config: Any = getattr(root, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # what is written is dense
    tied = getattr(root, "_tied_weights_keys", None) or ()
    parts: list[Any] = [config, getattr(config, "text_config", None)]
    for c in parts:
        if getattr(c, "tie_word_embeddings", False) and any(k in written for k in tied):
            c.tie_word_embeddings = False
    config.save_pretrained(folder)
