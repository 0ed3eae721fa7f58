"""MLX's folder (mlx-lm): adapters.safetensors and adapter_config.json.

`lora_a` (n_in, r) and `lora_b` (r, n_out) are PEFT's A and B transposed, `m` is DoRA's magnitude; one rank and one `scale` = alpha / r hold for all layers
(mlx_lm/tuner/lora.py, dora.py and utils.py of mlx-lm 0.32). Layers have the names they have in transformers, where mlx-lm's model has those of transformers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.save import replacing
from ..engine.defaults import CONFIG_NAME
from ..errors import ConversionError
from .adapter import NOTE, Adapter, Factors, Part, demand, note_of, one_scale, padded, read_file, read_note, whole, write_file

FILE = "adapters.safetensors"
_BLOCK = re.compile(r"model\.layers\.\d+\.(?P<key>.+)")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")


def recognises(path: Path) -> bool:
    """Whether the folder holds adapters.safetensors."""
    return (path / FILE).is_file()


def read(path: Path, **_: Any) -> Adapter:
    """The adapter in a folder.

    Raises:
        ConversionError: if it was trained whole (fine_tune_type "full"), or holds tensors that are no LoRA.
    """
    config = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ConversionError(f"{path} has fine_tune_type={kind!r}: its tensors are whole weights, not a LoRA. Use them as a model's.")
    scale = float(config["lora_parameters"]["scale"])
    tensors, metadata = read_file(path / FILE)
    note = read_note(metadata)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, what = key.rpartition(".")[::2]
        if what not in ("lora_a", "lora_b", "m"):
            raise ConversionError(f"{path / FILE} holds {key!r}, which is no tensor of a LoRA.")
        found.setdefault(layer, {})[what] = tensor
    layers = {}
    for layer, t in found.items():
        down, up = t["lora_a"].T.contiguous(), t["lora_b"].T.contiguous()
        layers[layer] = Factors(down, up, whole(scale * down.shape[0]), t.get("m"), embedding=layer.rpartition(".")[2] in _EMBEDDINGS)
    fields = note.get("fields") or {"lora_dropout": config["lora_parameters"].get("dropout", 0.0)}
    return {"": Part(layers, fields)}


def write(adapter: Adapter, path: Path, notes: list[str], **_: Any) -> None:
    """Write the folder. Smaller ranks are padded with zeros; where alpha / r differs from layer to layer, B makes it good."""
    (component, part), *more = adapter.items()
    if more:
        raise ConversionError(
            f"MLX has one model in a folder, and this file has adapters of {list(adapter)}. Convert one: --component {component}."
        )
    demand(part, "mlx", can=("dora",), kinds=("linear", "embedding"))
    dora = {f.magnitude is not None for f in part.layers.values()}
    if len(dora) > 1:
        raise ConversionError("MLX has DoRA in all adapted layers or in none.")
    for layer in part.layers:
        if not _BLOCK.fullmatch(layer) and layer not in ("model.embed_tokens", "lm_head"):
            raise ConversionError(
                f"The layer {layer!r} is called otherwise in mlx-lm, as far as known: this writes layers below model.layers.N, "
                "model.embed_tokens and lm_head. Rename the tensors of the PEFT adapter to mlx-lm's names first."
            )
    rank = max(f.rank for f in part.layers.values())
    if any(f.rank != rank for f in part.layers.values()):
        notes.append(f"MLX has one rank: smaller ones were padded with zeros to {rank}. The way back gives rank {rank}.")
    layers = one_scale({p: padded(f, rank) for p, f in part.layers.items()}, "scale", notes)
    tensors = {}
    for layer, f in layers.items():
        tensors[f"{layer}.lora_a"], tensors[f"{layer}.lora_b"] = f.down.T, f.up.T
        if f.magnitude is not None:
            tensors[f"{layer}.m"] = f.magnitude.flatten()
    keys = sorted({hit["key"] if (hit := _BLOCK.fullmatch(p)) else p for p in layers})
    config = {
        "fine_tune_type": "dora" if True in dora else "lora",
        "num_layers": -1,  # all; those without tensors here start as, and stay, no change
        "lora_parameters": {
            "rank": rank,
            "scale": next(iter(layers.values())).scale,
            "dropout": float(part.fields.get("lora_dropout") or 0.0),
            "keys": keys,
        },
    }
    if base := part.fields.get("base_model_name_or_path"):
        config["model"] = base
    write_file(path / FILE, tensors, {"format": "mlx", NOTE: note_of(part)})
    with replacing(path / CONFIG_NAME) as beside:
        beside.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
