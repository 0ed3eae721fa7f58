"""kohya's file (sd-scripts, ComfyUI, A1111): `lora_unet_<path with _ for .>.lora_down.weight`, `.lora_up.weight`, `.alpha`, `.dora_scale`.

The prefixes are lora_unet_, lora_te_ or lora_te1_, lora_te2_, and lora_transformer_. The underscores are undone by the names of the model's modules
where `model` gives it; by what veneer wrote down in the file's metadata; else by the words that UNets, transformers and CLIP are made of. A `lora_mid`
(LoCon's Tucker core) is multiplied into `lora_down`. From sd-scripts' networks/lora.py and LyCORIS' modules/locon.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConversionError, hint
from .adapter import COMPONENTS, NOTE, Adapter, Factors, Part, columns_normed, demand, flat, read_file, read_note, write_file
from .diffusers import file_of

PREFIXES = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
            "lora_transformer_": "transformer"}  # fmt: skip
_WHAT = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "alpha": "alpha", "dora_scale": "magnitude"}
# names of modules in UNet2DConditionModel, DiT, SD3, Flux and CLIP that a path is made of
_WORDS = frozenset(
    "down_blocks up_blocks mid_block resnets attentions downsamplers upsamplers transformer_blocks single_transformer_blocks blocks "  # noqa: SIM905
    "attn attn1 attn2 to_q to_k to_v to_out add_q_proj add_k_proj add_v_proj to_add_out ff ff_context net proj proj_in proj_out proj_mlp "
    "conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2 norm norm1 norm1_context "
    "norm_out linear context_embedder x_embedder time_text_embed timestep_embedder text_embedder guidance_embedder adaln_single emb pos_embed "
    "caption_projection text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection embeddings "
    "token_embedding position_embedding".split()
)
_NEVER = {("linear", "1"), ("linear", "2"), ("proj", "mlp")}  # no module of these models has such a child; linear_1 and proj_mlp are names
_ORIGINAL = ("input_blocks_", "middle_block_", "output_blocks_", "double_blocks_", "single_blocks_")


def recognises(path: Path) -> bool:
    """Whether it is a .safetensors file with kohya's prefixes."""
    from safetensors import safe_open

    file = file_of(path)
    if file is None:
        return False
    with safe_open(file, framework="pt") as f:
        return any(key.startswith(tuple(PREFIXES)) for key in f.keys())  # noqa: SIM118  the handle is no mapping


def read(path: Path, model: Path | None = None, **_: Any) -> Adapter:
    """The adapters in a file, by component.

    Args:
        model: a diffusers pipeline's folder: its modules' names undo the underscores.

    Raises:
        ConversionError: for a name that fits no module, or two; a tensor that is no LoRA's; an incomplete layer.
    """
    file = file_of(path)
    if file is None:
        raise ConversionError(f"{path} is no .safetensors file.")
    tensors, metadata = read_file(file)
    note = read_note(metadata)
    given: dict[str, str] = note.get("names", {})
    of_model = {c: flat_names(names, c) for c, names in module_names(model).items()} if model else {}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, kind = key.partition(".")[::2]
        if kind not in _WHAT or not name.startswith(tuple(PREFIXES)):
            raise ConversionError(f"{file} holds {key!r}, which is no tensor of a LoRA. LoHa and LoKr of LyCORIS are not converted.")
        found.setdefault(name, {})[_WHAT[kind]] = tensor
    out: Adapter = {}
    for name, t in found.items():
        prefix = next(p for p in PREFIXES if name.startswith(p))
        component = PREFIXES[prefix]
        layer = given.get(name) or _path(name, name.removeprefix(prefix), of_model.get(component))
        part = out.setdefault(component, Part({}, note.get("fields", {}).get(component, {})))
        if layer in part.layers:
            raise ConversionError(f"Two entries of {file} mean the layer {layer!r}, such as {name!r}.")
        part.layers[layer] = _factors(name, t)
    return out


def _factors(name: str, t: Mapping[str, Tensor]) -> Factors:
    if "down" not in t or "up" not in t:
        raise ConversionError(f"The layer {name!r} has {sorted(t)}: one of its two factors is missing.")
    down = t["down"]
    if "mid" in t:  # (r, r, kernel) after a pointwise (r, n_in)
        down = torch.einsum("ab...,bi->ai...", t["mid"].double(), down.flatten(1).double()).to(down.dtype)
    magnitude = t.get("magnitude")
    n = len(t["up"])
    if magnitude is not None and len(magnitude) != n == down.shape[1]:  # of a square weight the number of entries tells nothing
        raise columns_normed(magnitude, t["up"], name)
    return Factors(down, t["up"], float(t["alpha"]) if "alpha" in t else float(down.shape[0]), flat(magnitude, t["up"], name))


def write(adapter: Adapter, path: Path, notes: list[str], **_: Any) -> None:
    """Write the file; the real paths go into its metadata, so that the way back needs no model."""
    if path.suffix != ".safetensors":
        raise ConversionError(f"kohya's format is one file: give a name that ends in .safetensors, not {str(path)!r}.")
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    fields: dict[str, Any] = {}
    prefixes = {c: p for p, c in PREFIXES.items() if p != ("lora_te_" if "text_encoder_2" in adapter else "lora_te1_")}
    for component, part in adapter.items():
        if component not in COMPONENTS:
            raise ConversionError(f"kohya's format needs to know what this adapts: --component with one of {', '.join(COMPONENTS)}.")
        demand(part, "kohya", can=("dora",), kinds=("linear", "conv"))
        fields[component] = part.fields
        if part.fields.get("use_rslora"):
            notes.append(f"{component}: use_rslora was folded into the alphas.")
        for layer, f in part.layers.items():
            name = prefixes[component] + _with_text_model(component, layer).replace(".", "_")
            if name in names:
                raise ConversionError(f"{layer!r} and {names[name]!r} have the same name in kohya's format, {name!r}.")
            names[name] = layer
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = f.down, f.up
            tensors[f"{name}.alpha"] = torch.tensor(f.alpha)
            if float(tensors[f"{name}.alpha"]) != f.alpha:
                notes.append(f"{layer}: alpha {f.alpha!r} was rounded to float32.")
            if f.magnitude is not None:
                tensors[f"{name}.dora_scale"] = f.magnitude.reshape(-1, *[1] * (f.down.ndim - 1))
    ranks = {f.rank for part in adapter.values() for f in part.layers.values()}
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        NOTE: json.dumps({"names": names, "fields": fields}, sort_keys=True),
    }
    write_file(path, tensors, metadata)


def _with_text_model(component: str, layer: str) -> str:
    """transformers 5 has CLIP's layers at `encoder.`, every kohya file at `text_model.encoder.`."""
    return f"text_model.{layer}" if component.startswith("text") and layer.startswith("encoder.") else layer


def flat_names(names: Iterable[str], component: str) -> dict[str, list[str]]:
    """The modules of a component by the name that kohya's files give them."""
    out: dict[str, list[str]] = {}
    for name in names:
        out.setdefault(_with_text_model(component, name).replace(".", "_"), []).append(name)
    return out


def module_names(folder: Path) -> dict[str, list[str]]:
    """The modules of a diffusers pipeline's components, which are built without weights.

    Raises:
        ConversionError: if the folder is no pipeline.
    """
    import diffusers
    import transformers

    file = folder / "model_index.json"
    if not file.is_file():
        raise ConversionError(f"There is no model_index.json in {str(folder)!r}. --model is the folder of a diffusers pipeline.")
    libraries = {"diffusers": diffusers, "transformers": transformers}
    out = {}
    for component, made_of in json.loads(file.read_text(encoding="utf-8")).items():
        if component not in COMPONENTS or made_of[0] is None:
            continue
        kind = getattr(libraries[made_of[0]], made_of[1])
        with torch.device("meta"):
            if made_of[0] == "diffusers":
                built = kind.from_config(kind.load_config(folder / component))
            else:
                built = kind(kind.config_class.from_pretrained(folder / component))
        out[component] = [n for n, _ in built.named_modules()]
    return out


def _path(name: str, bare: str, of_model: Mapping[str, list[str]] | None) -> str:
    """The module's path that a name with underscores stands for."""
    if of_model is not None:
        hits = of_model.get(bare, [])
        if len(hits) == 1:
            return hits[0]
        said = f"fits {hits} alike" if hits else f"fits no module of the model given.{hint(bare, of_model)}"
        raise ConversionError(f"{name!r} {said}")
    if bare.startswith(_ORIGINAL):
        raise ConversionError(
            f"{name!r} uses the names of Stability's or Black Forest Labs' own code, not those of diffusers. Load the file with diffusers' "
            "load_lora_weights and save it with save_lora_weights; that file can be converted."
        )
    ways = _readings(bare)
    if len(ways) == 1:
        return ways[0]
    said = f"can be read in {len(ways)} ways ({', '.join(ways[:3])})" if ways else "has parts that are in no model known here"
    raise ConversionError(
        f"{name!r} {said}. Its underscores can be undone with the model's modules: --model FOLDER of the diffusers pipeline."
    )


@cache
def _readings(flat: str) -> tuple[str, ...]:
    """All ways to cut a name into known words and numbers."""
    if not flat:
        return ("",)
    parts = flat.split("_")
    out = []
    for n in range(1, len(parts) + 1):
        word = "_".join(parts[:n])
        if word in _WORDS or (n == 1 and word.isdigit()):
            rest = _readings("_".join(parts[n:]))
            out += [f"{word}.{r}" if r else word for r in rest if (word, r.partition(".")[0]) not in _NEVER]
    return tuple(out)
