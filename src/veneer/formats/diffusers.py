"""diffusers' file: pytorch_lora_weights.safetensors, one for all components of a pipeline.

A key is `<component>.<path>.lora_A.weight` (or `lora_B`); older files say `lora.down`, `lora_linear_layer.down`, or `processor.to_q_lora.down`. The
rank and alpha of each component are in the metadata under "lora_adapter_metadata"; where there is none, alpha / r is 1 unless an `.alpha` tensor says
otherwise (diffusers 0.42: loaders/lora_base.py, utils/state_dict_utils.py, utils/peft_utils.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConversionError
from ..method import by_pattern
from .adapter import COMPONENTS, NOTE, Adapter, Factors, Part, demand, flat, note_of, read_file, read_note, write_file
from .peft import config_for, written

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
_KEY = re.compile(
    rf"(?P<component>{'|'.join(COMPONENTS)})\.(?P<path>.+?)\."
    r"(?P<what>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora\.down\.weight|lora\.up\.weight|lora_linear_layer\.down\.weight|lora_linear_layer\.up\.weight"
    r"|(?P<old>to_q|to_k|to_v|to_out)_lora\.(?P<side>down|up)\.weight|lora_magnitude_vector(\.weight)?|alpha)"
)
_WHAT = {"lora_A.weight": "down", "lora.down.weight": "down", "lora_linear_layer.down.weight": "down", "lora_B.weight": "up", "lora.up.weight": "up",
         "lora_linear_layer.up.weight": "up", "lora_B.bias": "bias", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
         "alpha": "alpha"}  # fmt: skip
_OLD = {  # to_q_lora of an attention processor, in a UNet or a transformer, and in a text encoder
    False: {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"},
    True: {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}


def file_of(path: Path) -> Path | None:
    """The .safetensors file that a path means, if it is one file."""
    if path.is_dir():
        return path / FILE if (path / FILE).is_file() else None
    return path if path.suffix == ".safetensors" and path.is_file() else None


def recognises(path: Path) -> bool:
    """Whether it is a .safetensors file whose keys begin with a component."""
    from safetensors import safe_open

    file = file_of(path)
    if file is None:
        return False
    with safe_open(file, framework="pt") as f:
        return any(_KEY.fullmatch(key) for key in f.keys())  # noqa: SIM118  the handle is no mapping


def read(path: Path, **_: Any) -> Adapter:
    """The adapters in a file, by component.

    Raises:
        ConversionError: for a key that is no LoRA's.
    """
    file = file_of(path)
    if file is None:
        raise ConversionError(f"{path} is neither a .safetensors file nor a folder with {FILE}.")
    tensors, metadata = read_file(file)
    configs: dict[str, dict[str, Any]] = {}
    for key, value in json.loads(metadata.get(METADATA, "{}")).items():
        component, _, name = key.partition(".")
        configs.setdefault(component, {})[name] = value
    note = read_note(metadata)
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        hit = _KEY.fullmatch(key)
        if hit is None:
            raise ConversionError(
                f"{file} holds {key!r}, which is no tensor of a LoRA that is known. LoKr and LoHa are not converted; "
                f"keys begin with one of {', '.join(COMPONENTS)}."
            )
        layer, what = hit["path"].replace(".processor", ""), _WHAT.get(hit["what"])
        if what is None:
            layer, what = f"{layer}.{_OLD[hit['component'].startswith('text')][hit['old']]}", hit["side"]
        found.setdefault(hit["component"], {}).setdefault(layer, {})[what] = tensor
    return {c: _part(c, layers, configs.get(c, {}), note.get("fields", {}).get(c, {})) for c, layers in found.items()}


def _part(component: str, layers: dict[str, dict[str, Tensor]], config: dict[str, Any], fields: dict[str, Any]) -> Part:
    out = {}
    for path, t in layers.items():
        if "down" not in t or "up" not in t:
            raise ConversionError(f"The layer {component}.{path} has {sorted(t)}: one of its two factors is missing.")
        rank = t["down"].shape[0]
        alpha = float(rank)
        if "alpha" in t:
            alpha = float(t["alpha"])
        elif config:
            alpha = float(by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"]))
            alpha *= rank**0.5 if config.get("use_rslora") else 1
        out[path] = Factors(t["down"], t["up"], alpha, flat(t.get("magnitude"), t["up"], path), t.get("bias"))
    return Part(out, fields or config)


def write(adapter: Adapter, path: Path, notes: list[str], **_: Any) -> None:
    """Write the file, or into a folder under diffusers' name for it. Alphas go into the metadata, as `save_lora_weights` writes them."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    for component, part in adapter.items():
        if component not in COMPONENTS:
            raise ConversionError(f"diffusers needs to know what this adapts: --component with one of {', '.join(COMPONENTS)}.")
        demand(part, "diffusers", can=("dora", "bias"), kinds=("linear", "conv"))
        for layer, f in part.layers.items():
            stem = f"{component}.{layer}"
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = f.down, f.up
            if f.magnitude_in_peft is not None:
                tensors[f"{stem}.lora_magnitude_vector"] = f.magnitude_in_peft
            if f.bias is not None:
                tensors[f"{stem}.lora_B.bias"] = f.bias
        config = written(config_for(part, notes))
        fields[component] = json.loads(note_of(part))["fields"]
        # what every PEFT's LoraConfig takes, and what says something; None and the file's own marks do not
        metadata |= {
            f"{component}.{k}": v for k, v in config.items() if v is not None and k not in ("peft_type", "peft_version", "auto_mapping")
        }
    file = path if path.suffix == ".safetensors" else path / FILE
    notes_of_file = {"format": "pt", METADATA: json.dumps(metadata, sort_keys=True), NOTE: json.dumps({"fields": fields}, sort_keys=True)}
    write_file(file, tensors, notes_of_file)
