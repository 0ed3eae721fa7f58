"""PEFT's folder: adapter_config.json and adapter_model.safetensors. A pipeline's adapters are folders in a folder, one a component."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.keys import PREFIX
from ..checkpoint.load import read_adapter
from ..checkpoint.save import write_adapter
from ..config import PeftConfig
from ..engine.defaults import CONFIG_NAME
from ..errors import ConversionError
from ..method import by_pattern
from ..methods.lora import LoraConfig
from ..variants import VARIANTS
from .adapter import COMPONENTS, Adapter, Factors, Part, flat

_TENSOR = re.compile(
    r"(?P<path>.+)\.(?P<what>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(\.weight)?)"
)


def recognises(path: Path) -> bool:
    """Whether there is such an adapter, or one of each component."""
    for folder in (path, *(path / c for c in COMPONENTS)):
        file = folder / CONFIG_NAME
        if file.is_file() and "peft_type" in PeftConfig.from_json_file(file):
            return True
    return False


def read(path: Path, **_: Any) -> Adapter:
    """The adapters in a folder.

    Raises:
        ConversionError: if one is no LoRA, or a LoRA whose change is more than B A.
        LoadError: if a file is damaged.
    """
    folders = {"": path} if (path / CONFIG_NAME).is_file() else {c: path / c for c in COMPONENTS if (path / c / CONFIG_NAME).is_file()}
    return {component: _read_one(folder) for component, folder in folders.items()}


def _read_one(folder: Path) -> Part:
    config = PeftConfig.from_pretrained(folder)
    check_convertible(config)
    file = read_adapter(folder)
    if file.start is not None:
        raise ConversionError(
            f"{folder} counts its change from start values of its own (init_lora_weights={config.init_lora_weights!r}). Save it with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), or with save_as_lora, first."
        )
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in file.tensors.items():
        key = key.removeprefix(PREFIX)
        if hit := _TENSOR.fullmatch(key):
            found.setdefault(hit["path"], {})[hit["what"].removesuffix(".weight")] = tensor
        else:
            others[key] = tensor
    return Part({p: _factors(config, p, t) for p, t in found.items()}, written(config), others)


def _factors(config: LoraConfig, path: str, tensors: Mapping[str, Tensor]) -> Factors:
    embedding = "lora_embedding_A" in tensors
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if any(n not in tensors for n in names):
        raise ConversionError(f"The layer {path!r} has {sorted(tensors)}, and one of {names} is missing: the file is incomplete.")
    down, up = (tensors[n] for n in names)
    alpha = float(by_pattern(config.alpha_pattern, path, config.lora_alpha))
    rank = by_pattern(config.rank_pattern, path, config.r)
    if down.shape[0] != rank:
        raise ConversionError(f"The layer {path!r} has rank {down.shape[0]} in the file, and {rank} by the config. Which one is right?")
    if config.use_rslora:
        alpha = alpha * math.sqrt(rank)  # alpha / √r said as alpha' / r
    return Factors(down, up, alpha, flat(tensors.get("lora_magnitude_vector"), up, path), tensors.get("lora_B.bias"), embedding)


def check_convertible(config: Any) -> None:
    """Raise ConversionError unless the config is that of a LoRA whose change is B A, perhaps with DoRA's magnitudes."""
    if not isinstance(config, LoraConfig):
        raise ConversionError(
            f"This is a {config.peft_type} adapter, and other formats know LoRA alone. veneer.save_as_lora(path, model, rank) makes a LoRA of any "
            "method that has a ΔW; merge_and_unload() makes a plain model of it."
        )
    asked = [name for name in VARIANTS if getattr(config, name) and name != "use_dora"]
    asked += [name for name in ("target_parameters", "layer_replication") if getattr(config, name)]
    if asked:
        raise ConversionError(
            f"`{asked[0]}` makes this adapter more than B A, which no other format has. Merge it, or use veneer.save_as_lora."
        )


def written(config: Any) -> dict[str, Any]:
    """A config's fields as its file has them."""
    import json
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        fields: dict[str, Any] = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))
    return fields


def write(adapter: Adapter, path: Path, notes: list[str], **_: Any) -> None:
    """Write each component's folder; a model by itself goes into `path`."""
    for component, part in adapter.items():
        config = config_for(part, notes)
        tensors = {}
        for layer, f in part.layers.items():
            a, b = ("lora_embedding_A", "lora_embedding_B") if f.embedding else ("lora_A.weight", "lora_B.weight")
            tensors[f"{PREFIX}{layer}.{a}"], tensors[f"{PREFIX}{layer}.{b}"] = f.down, f.up
            if f.magnitude_in_peft is not None:
                tensors[f"{PREFIX}{layer}.lora_magnitude_vector"] = f.magnitude_in_peft
            if f.bias is not None:
                tensors[f"{PREFIX}{layer}.lora_B.bias"] = f.bias
        tensors |= {PREFIX + k: t for k, t in part.others.items()}
        write_adapter(tensors, config, path / component)


def config_for(part: Part, notes: list[str]) -> LoraConfig:
    """The config of a part: the one that the file remembers, where it says what the layers are; else one made from the layers."""
    if part.fields.get("r"):
        config: LoraConfig = LoraConfig.from_peft_type(**part.fields)
        if all(_says(config, p, f) for p, f in part.layers.items()):
            return config
    ranks, alphas = ({_everywhere(p): getattr(f, what) for p, f in part.layers.items()} for what in ("rank", "alpha"))
    r, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    kept = {k: part.fields[k] for k in ("task_type", "base_model_name_or_path", "revision", "lora_dropout", "fan_in_fan_out", "modules_to_save", "bias")
            if part.fields.get(k)}  # fmt: skip
    if part.fields.get("use_rslora"):
        notes.append("use_rslora was folded into lora_alpha: alpha / r is now what alpha / √r was.")
    return LoraConfig(
        r=r,
        lora_alpha=_number(alpha),
        rank_pattern={_key(p, ranks): n for p, n in ranks.items() if n != r},
        alpha_pattern={_key(p, alphas): _number(a) for p, a in alphas.items() if a != alpha},
        target_modules=list(ranks),
        use_dora=any(f.magnitude is not None for f in part.layers.values()),
        lora_bias=any(f.bias is not None for f in part.layers.values()),
        **kept,
    )


def _says(config: LoraConfig, path: str, f: Factors) -> bool:
    rank, alpha = by_pattern(config.rank_pattern, path, config.r), by_pattern(config.alpha_pattern, path, config.lora_alpha)
    return rank == f.rank and abs((alpha * math.sqrt(rank) if config.use_rslora else alpha) - f.alpha) <= 1e-6 * abs(f.alpha)


def _everywhere(path: str) -> str:
    """A target that means a layer of CLIP in any of transformers' classes: `encoder.` follows `text_model.` in most, and stands first in CLIPTextModel
    since transformers 5."""
    return path.removeprefix("text_model.") if path.startswith("text_model.encoder.") else path


def _key(path: str, paths: Mapping[str, Any]) -> str:
    """A pattern that means this layer alone."""
    return ("^" if any(p.endswith(f".{path}") for p in paths) else "") + re.escape(path)


def _number(alpha: float) -> Any:
    return int(alpha) if float(alpha).is_integer() else alpha
