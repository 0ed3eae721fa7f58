"""The form between formats: by layer, the two factors of a LoRA as PEFT has them, and its alpha."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.load import read_safetensors
from ..checkpoint.save import check_tensors, replacing
from ..errors import ConversionError

NOTE = "veneer_adapter"  # our entry in a file's metadata: what its format has no place for
# components of a diffusion pipeline, which one file may hold adapters of; "" is a model by itself
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Factors:
    """ΔW = alpha / r · up · down of one layer.

    Attributes:
        down: (r, n_in), of a convolution (r, n_in / groups, kernel ...), of an embedding (r, rows of the table).
        up: (n_out, r), of a convolution (n_out, r, 1 ...), of an embedding (columns of the table, r).
        magnitude: DoRA's, (n_out,).
        bias: of `up` (lora_bias), (n_out,).
        embedding: the layer is an embedding.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def magnitude_in_peft(self) -> Tensor | None:
        """The magnitude in the shape that PEFT's files give it: (n_out,), of a convolution (1, n_out, 1 ...)."""
        m, dims = self.magnitude, self.down.ndim - 2
        return m if m is None or dims == 0 else m.reshape(1, -1, *[1] * dims)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass
class Part:
    """The adapter of one model.

    Attributes:
        layers: by the module's path in the model.
        fields: of PEFT's config, as far as the file told; r, alpha and targets in it are only believed where the layers agree.
        others: tensors that are no LoRA (modules_to_save, trained biases ...) by PEFT's key without `base_model.model.`.
    """

    layers: dict[str, Factors]
    fields: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)


Adapter = dict[str, Part]  # by component


def flat(magnitude: Tensor | None, up: Tensor, layer: str) -> Tensor | None:
    """DoRA's magnitude as (n_out,), whatever ones a file has in its shape.

    Raises:
        ConversionError: if it is one of the inputs, as LyCORIS may have it, which is another change than DoRA's.
    """
    if magnitude is not None and magnitude.numel() != up.shape[0]:
        raise columns_normed(magnitude, up, layer)
    return None if magnitude is None else magnitude.flatten()


def columns_normed(magnitude: Tensor, up: Tensor, layer: str) -> ConversionError:
    """What is raised for such a magnitude."""
    return ConversionError(
        f"DoRA's magnitude of {layer!r} has the shape {tuple(magnitude.shape)}, and there are {up.shape[0]} outputs: the weight's columns were normed, "
        "not its rows. No other format has that; merge the adapter with the program that made it."
    )


def padded(layer: Factors, rank: int) -> Factors:
    """The same change with more rows of zeros in `down` and columns in `up`; alpha grows with the rank."""
    more = rank - layer.rank
    if more == 0:
        return layer
    down = torch.cat([layer.down, layer.down.new_zeros(more, *layer.down.shape[1:])])
    up = torch.cat([layer.up, layer.up.new_zeros(layer.up.shape[0], more, *layer.up.shape[2:])], dim=1)
    return replace(layer, down=down, up=up, alpha=whole(layer.alpha * rank / layer.rank))


def rescaled(layer: Factors, scale: float) -> tuple[Factors, bool]:
    """The same change at another alpha / r, which `up` makes good; and whether that is exact: the factor is a power of two and nothing under- or overflows."""
    factor = layer.scale / scale
    if factor == 1:
        return layer, True
    up = (layer.up.double() * factor).to(layer.up.dtype)
    exact = torch.equal(up.double(), layer.up.double() * factor) and math.frexp(factor)[0] in (0.5, -0.5)
    return replace(layer, up=up, alpha=whole(scale * layer.rank)), exact


def whole(alpha: float) -> float:
    """An alpha that a division by the rank has put next to a whole number, as that number."""
    near = round(alpha)
    return float(near) if abs(alpha - near) < 1e-9 * max(1.0, abs(alpha)) else alpha


def one_scale(layers: Mapping[str, Factors], same: str, notes: list[str]) -> dict[str, Factors]:
    """All layers with the most frequent alpha (`same="alpha"`) or alpha / r (`same="scale"`), where the format has room for one."""
    most = Counter(getattr(f, same) for f in layers.values()).most_common(1)[0][0]
    out, rounded = {}, []
    for path, f in layers.items():
        out[path], exact = rescaled(f, most if same == "scale" else most / f.rank)
        if not exact:
            rounded.append(path)
    changed = [p for p in layers if out[p] is not layers[p]]
    if changed:
        notes.append(
            f"This format has one {same} for all layers ({most:g}). In {len(changed)} layers with another one ({changed[0]}, ...) the difference was "
            f"multiplied into B: " + (f"rounded to the dtype in {len(rounded)} of them." if rounded else "exactly (powers of two).")
        )
    return out


def demand(
    part: Part, format: str, can: Collection[str] = (), kinds: Collection[str] = ("linear",), notes: list[str] | None = None
) -> None:
    """Raise ConversionError if a part holds what a format has no place for.

    Args:
        can: of "dora", "bias", "others".
        kinds: of "linear", "embedding", "conv".
    """
    refused: list[str] = []
    layers = part.layers
    kind = {p: "embedding" if f.embedding else "conv" if f.down.ndim > 2 else "linear" for p, f in layers.items()}
    if not layers:
        refused.append("it has no LoRA layers")
    if "dora" not in can and (hit := [p for p, f in layers.items() if f.magnitude is not None]):
        refused.append(f"DoRA's magnitudes ({hit[0]}): merge the adapter, or train with use_dora=False")
    if "bias" not in can and (hit := [p for p, f in layers.items() if f.bias is not None]):
        refused.append(f"biases of LoRA layers ({hit[0]}): train with lora_bias=False")
    for path, k in kind.items():
        if k not in kinds:
            refused.append(f"a LoRA of {'an' if k[0] in 'aeiou' else 'a'} {k} layer ({path}): leave such layers out of target_modules")
            break
    if "others" not in can and part.others:
        refused.append(
            f"{len(part.others)} tensors that are no LoRA ({next(iter(part.others))}: trained copies, biases or tokens): "
            "merge the adapter into the model instead, or train without modules_to_save, bias and trainable_token_indices"
        )
    if refused:
        raise ConversionError(f"A file of the format {format!r} has no place for " + "; nor for ".join(refused) + ". Nothing was written.")


def note_of(part: Part, **more: Any) -> str:
    """What a file's metadata keeps for the way back."""
    return json.dumps({"fields": part.fields, **more}, sort_keys=True)


def read_note(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The entry that `note_of` made, or {}; a damaged one is as good as none."""
    try:
        note = json.loads(metadata.get(NOTE, "{}"))
    except json.JSONDecodeError:
        return {}
    return note if isinstance(note, dict) else {}


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file.

    Raises:
        LoadError: if it is damaged.
    """
    return read_safetensors(path)


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file beside its place and move it there.

    Raises:
        SaveError: if there are no tensors, or one is not finite.
    """
    check_tensors(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, beside, metadata=dict(metadata))
