"""A GGUF adapter, which llama.cpp serves.

`general.type` is "adapter", `adapter.type` "lora", `adapter.lora.alpha` one alpha for all layers; llama.cpp applies alpha / r with each tensor's own r.
A layer is `<tensor of the base>.lora_a` (r, n_in) and `.lora_b` (n_out, r); of the token table `lora_a` is (rows, r). Llama-like bases have the rows of q and k
interleaved per head, so B's rows are too. From llama.cpp's convert_lora_to_gguf.py, convert_hf_to_gguf.py and src/llama-adapter.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.save import replacing
from ..errors import ConversionError, LoadError, hint
from .adapter import NOTE, Adapter, Factors, Part, demand, note_of, one_scale, whole

# transformers' model_type -> (llama.cpp's architecture, whether q and k are interleaved there)
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", False),
}
_APART = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_TOGETHER = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")  # phi3


@dataclass(frozen=True)
class _Base:
    """What the base model's config says that the names and the order of rows depend on."""

    model_type: str
    blocks: int
    heads: int
    kv_heads: int

    @property
    def arch(self) -> str:
        return ARCHITECTURES[self.model_type][0]

    def names(self) -> dict[str, str]:
        """Layer -> tensor, of everything that may be adapted."""
        import gguf

        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self.arch)
        table = gguf.get_tensor_name_map(arch, self.blocks)
        inside = _TOGETHER if self.model_type == "phi3" else _APART
        layers = ["model.embed_tokens", "lm_head", *(f"model.layers.{i}.{name}" for i in range(self.blocks) for name in inside)]
        named = {layer: table.get_name(layer) for layer in layers}
        return {layer: f"{name}.weight" for layer, name in named.items() if name is not None}

    def heads_of(self, layer: str) -> int | None:
        """The number of heads that the rows of a layer's outputs are interleaved in, or None."""
        if not ARCHITECTURES[self.model_type][1]:
            return None
        return {"q_proj": self.heads, "k_proj": self.kv_heads}.get(layer.rpartition(".")[2])


def recognises(path: Path) -> bool:
    """Whether it is a GGUF file."""
    if path.is_file():
        with path.open("rb") as f:
            return f.read(4) == b"GGUF"
    return False


def read(path: Path, model: Path | None = None, **_: Any) -> Adapter:
    """The adapter in a file.

    Args:
        model: the base model's folder; needed where the file is not veneer's, since it does not say how many heads there are.

    Raises:
        LoadError: if the file is no adapter.
        ConversionError: if a tensor belongs to no layer that is known.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    kind, how = (_text(reader, key) for key in (gguf.Keys.General.TYPE, gguf.Keys.Adapter.TYPE))
    if (kind, how) != ("adapter", "lora"):
        raise LoadError(f"{path} is a GGUF file of the type {kind!r}/{how!r}, not of 'adapter'/'lora'.")
    alpha_field = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    alpha = float(alpha_field.contents()) if alpha_field is not None else 0.0
    note = json.loads(_text(reader, NOTE) or "{}")
    base = _base(model, note.get("base"), _text(reader, gguf.Keys.General.ARCHITECTURE))
    layer_of = {name: layer for layer, name in base.names().items()}
    found: dict[str, dict[str, Tensor]] = {}
    for tensor in reader.tensors:
        name, _, what = tensor.name.rpartition(".")
        if what not in ("lora_a", "lora_b") or name not in layer_of:
            raise ConversionError(f"{path} holds {tensor.name!r}, which is no LoRA of a layer of {base.model_type}.{hint(name, layer_of)}")
        found.setdefault(layer_of[name], {})[what] = _tensor(tensor)
    alphas = note.get("alphas", {})
    layers = {}
    for layer, t in found.items():
        down, up = t["lora_a"], t["lora_b"]
        embedding = layer == "model.embed_tokens"
        if embedding:
            down = down.T.contiguous()
        if heads := base.heads_of(layer):
            up = _rows_apart(up, heads)
        # without an alpha llama.cpp scales by 1
        layers[layer] = Factors(down, up, float(alphas.get(layer, whole(alpha) if alpha else down.shape[0])), embedding=embedding)
    return {"": Part(layers, note.get("fields", {}))}


def write(adapter: Adapter, path: Path, notes: list[str], model: Path | None = None, **_: Any) -> None:
    """Write the file. Needs the base model's config.json, in `model` or in the folder that the adapter's config names.

    Raises:
        ConversionError: for what GGUF has no place for, an architecture or a layer that is not known, or a missing base config.
    """
    import gguf
    import numpy as np

    (component, part), *more = adapter.items()
    if more:
        raise ConversionError(
            f"A GGUF adapter is of one model, and this file has adapters of {list(adapter)}. Convert one: --component {component}."
        )
    demand(part, "gguf", kinds=("linear", "embedding"))
    base = _base(model or _folder(part.fields.get("base_model_name_or_path")), None, None)
    names = base.names()
    for layer in part.layers:
        if layer not in names:
            raise ConversionError(f"The layer {layer!r} has no name in llama.cpp's {base.arch!r}.{hint(layer, names)}")
    layers = one_scale(part.layers, "alpha", notes)
    alpha = next(iter(layers.values())).alpha
    alphas: dict[str, float] = {}
    if float(np.float32(alpha)) != alpha:
        notes.append(f"alpha {alpha!r} was rounded to float32, a relative change of {abs(float(np.float32(alpha)) / alpha - 1):.0e}.")
        alphas = dict.fromkeys(layers, alpha)
    writer_note = note_of(part, base=base.__dict__, alphas=alphas)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        writer = gguf.GGUFWriter(beside, base.arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_string(NOTE, writer_note)
        for layer, f in layers.items():
            heads = base.heads_of(layer)
            _add(writer, f"{names[layer]}.lora_a", f.down.T if f.embedding else f.down)
            _add(writer, f"{names[layer]}.lora_b", _rows_interleaved(f.up, heads) if heads else f.up)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _rows_interleaved(up: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first half, second half), as transformers rotates them, to pairs (a, b), as llama.cpp does."""
    n, r = up.shape
    return up.reshape(heads, 2, n // heads // 2, r).transpose(1, 2).reshape(n, r)


def _rows_apart(up: Tensor, heads: int) -> Tensor:
    """The inverse of `_rows_interleaved`."""
    n, r = up.shape
    return up.reshape(heads, n // heads // 2, 2, r).transpose(1, 2).reshape(n, r).contiguous()


def _folder(name: str | None) -> Path | None:
    return Path(name) if name and (Path(name) / "config.json").is_file() else None


def _base(model: Path | None, kept: Mapping[str, Any] | None, arch: str | None) -> _Base:
    if model is None and kept:
        return _Base(**kept)
    if model is None:
        raise ConversionError(
            "GGUF names layers and orders rows by the base model's architecture"
            + (f" ({arch!r}, with how many heads?)" if arch else "")
            + ". Give the folder with its config.json: --model FOLDER."
        )
    file = model / "config.json" if model.is_dir() else model
    if not file.is_file():
        raise ConversionError(f"There is no config.json in {str(model)!r}. --model is the base model's folder.")
    config = json.loads(file.read_text(encoding="utf-8"))
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise ConversionError(
            f"Models of the type {kind!r} are not known here; these are: {', '.join(ARCHITECTURES)}.{hint(kind, ARCHITECTURES)} "
            "For others merge the adapter and convert the model with llama.cpp's convert_hf_to_gguf.py."
        )
    blocks, heads = config["num_hidden_layers"], config["num_attention_heads"]
    return _Base(kind, blocks, heads, config.get("num_key_value_heads") or heads)


def _text(reader: Any, key: str) -> str | None:
    entry = reader.get_field(key)
    return None if entry is None else str(entry.contents())


def _tensor(tensor: Any) -> Tensor:
    import gguf
    import numpy as np

    shape = tuple(int(n) for n in reversed(tensor.shape))
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        return torch.from_numpy(np.array(tensor.data).view(np.int16)).view(torch.bfloat16).reshape(shape)
    if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type))).reshape(shape)
    return torch.from_numpy(np.array(tensor.data)).reshape(shape)


def _add(writer: Any, name: str, tensor: Tensor) -> None:
    import gguf
    import numpy as np

    t = tensor.detach().cpu().contiguous()
    if t.dtype == torch.bfloat16:
        writer.add_tensor(name, t.view(torch.int16).numpy().view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    elif t.dtype in (torch.float32, torch.float16):
        writer.add_tensor(name, t.numpy())
    else:
        raise ConversionError(f"{name} is {t.dtype}; GGUF adapters have float32, float16 or bfloat16. Cast the adapter first.")
