"""The base model below the adapters: its own state dict, and what a file remembers of it."""

from __future__ import annotations

import base64
import json
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.layer import get_slot
from ..errors import LoadError, PeftWarning, nearest
from .keys import Spot, adapters_of, bare, base_root, embedding_modules, kept, walk

BASE_KEY = "veneer_base"
SCALING_KEY = "veneer_scaling"
START_KEY = "veneer_start"
_TENSORS, _VALUES = 16, 8  # how much of a base model is remembered: parameters, numbers of each

# Fields of configs that change what the tensors of a file mean, and that nothing in its shapes gives away.
_SCALING_FIELDS = (
    "r",
    "alpha",
    "lora_alpha",
    "psoft_alpha",
    "randlora_alpha",
    "shadow_alpha",
    "scaling",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "use_cayley_neumann",
    "num_cayley_neumann_terms",
    "random_seed",
    "random_loc_seed",
    "proj_seed",
    "projection_seed",
    "projection_prng_key",
)


# ---------------------------------------------------------------- the base model's own state dict


class BaseKeys(NamedTuple):
    """What `set_base_model_state_dict` did not fit."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def _held(model: nn.Module) -> Iterator[tuple[str, Spot, str]]:
    """(name in the unadapted model, spot, attribute) of each persistent tensor of the base model."""
    for spot in walk(base_root(model)):
        module = spot.module
        for key in [*module._parameters, *(b for b in module._buffers if b not in module._non_persistent_buffers_set)]:
            if module._parameters.get(key, module._buffers.get(key)) is not None:
                yield f"{spot.origin}.{key}" if spot.origin else key, spot, key


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's tensors under the names they have without adapters; of a merged model, the frozen weights.

    The tensors share memory with the model. A parameter that two modules share is listed under both names, as torch does.
    """
    return {name: _frozen(spot, key).detach() for name, spot, key in _held(model)}


def _frozen(spot: Spot, key: str) -> Tensor:
    """A tensor of the base, as it was before adapters were merged into it."""
    values = kept(spot, key)
    return get_slot(spot.module, key) if values is None else values


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> BaseKeys:
    """Load base weights, by the names they have without adapters. Adapters stay as they are.

    Args:
        strict: every name must be there and no other.

    Returns:
        `.missing_keys` and `.unexpected_keys`.

    Raises:
        LoadError: if names (with `strict`) or shapes do not fit, or adapters are merged into the weights. Nothing has been changed then.
    """
    held = {name: (spot, key) for name, spot, key in _held(model)}
    merged = [s.path for s, _ in held.values() if any(getattr(w, "merged_adapters", None) for w, _ in s.wrappers)]
    if merged:
        raise LoadError(
            f"Adapters are merged into the base weights (of {merged[0]!r}, ...), which would be mixed up. Call unmerge_adapter() first."
        )
    missing = [n for n in held if n not in state_dict]
    unexpected = [n for n in state_dict if n not in held]
    wrong = [(n, tuple(t.shape), tuple(get_slot(*_at(held[n])).shape)) for n, t in state_dict.items() if n in held]
    wrong = [w for w in wrong if w[1] != w[2]]
    if wrong or (strict and (missing or unexpected)):
        lines = ["The state dict does not fit the base model (nothing was loaded):"]
        lines += [f"  {n!r} has the shape {theirs} in the state dict and {ours} in the model" for n, theirs, ours in wrong[:5]]
        if strict and missing:
            lines.append(f"  {len(missing)} names are missing: {', '.join(map(repr, missing[:3]))}{', ...' * (len(missing) > 3)}")
        if strict and unexpected:
            near = nearest(unexpected[0], held, n=1)
            lines.append(f"  {len(unexpected)} names match nothing: {unexpected[0]!r}" + (f" (nearest: {near[0]!r})" if near else ""))
            lines.append("  Names are those of the model without adapters; strict=False leaves out what does not fit.")
        raise LoadError("\n".join(lines))
    with torch.no_grad():
        for name, value in state_dict.items():
            if name in held:
                spot, key = held[name]
                old = get_slot(spot.module, key)
                if old.is_meta:
                    fresh = value.to(dtype=old.dtype, copy=True)
                    if key in spot.module._parameters:
                        spot.module._parameters[key] = nn.Parameter(fresh, requires_grad=old.requires_grad)
                    else:
                        spot.module._buffers[key] = fresh
                else:
                    old.copy_(value)
    return BaseKeys(missing, unexpected)


def _at(place: tuple[Spot, str]) -> tuple[nn.Module, str]:
    return place[0].module, place[1]


# ---------------------------------------------------------------- what a file remembers of it


def fingerprint(model: nn.Module) -> str:
    """A few numbers of a base model, to tell it from others: up to 16 parameters, 8 values of each, as a JSON text of about 2 KB.

    Left out are embeddings and heads (vocabularies are resized), biases and whatever else may be trained, new heads, and weights that
    something is merged into. The text is empty if nothing is left, as for a base on the meta device.
    """
    model = bare(model)
    skip = {id(m) for table in embedding_modules(base_root(model)) for m in table.modules()}
    candidates = {}
    for name, spot, key in _held(model):
        t = get_slot(spot.module, key)
        wrapped_whole = any(child == "original_module" and adapters_of(w) for w, child in spot.wrappers)
        merged = any(getattr(w, "merged_adapters", None) for w, _ in spot.wrappers)
        if key == "bias" or isinstance(spot.module, nn.Embedding) or id(spot.module) in skip or wrapped_whole or merged:
            continue
        if key in spot.module._parameters and not t.requires_grad and _readable(t):
            candidates[name] = t
    names = sorted(candidates)
    chosen = [names[round(i * (len(names) - 1) / (_TENSORS - 1))] for i in range(_TENSORS)] if len(names) > _TENSORS else names
    if not chosen:
        return ""
    tensors = {
        n: [list(candidates[n].shape), str(candidates[n].dtype).removeprefix("torch."), _encode(_sample(candidates[n]))] for n in chosen
    }
    return json.dumps(tensors, separators=(",", ":"))


def _readable(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.is_floating_point() and t.numel() > 0 and not t.is_meta and t.dtype.itemsize >= 2


def _sample(t: Tensor) -> Tensor:
    at = torch.linspace(0, t.numel() - 1, min(_VALUES, t.numel()), dtype=torch.float64).round().long()
    # row by row, since a flat view of a transposed weight would copy it whole
    index = torch.unravel_index(at, t.shape)
    return t.detach()[tuple(i.to(t.device) for i in index)].reshape(-1).float().cpu()  # a number by itself too (CLIP's logit_scale)


def _encode(values: Tensor) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values.tolist())).decode()


def _decode(text: str) -> Tensor:
    raw = base64.b64decode(text)
    return torch.tensor(struct.unpack(f"<{len(raw) // 4}f", raw))


def other_base(remembered: str, model: nn.Module) -> str | None:
    """In words, how a base model differs from the one a file remembers; None if it does not, or nothing can be compared.

    Rounding by another dtype is no difference, nor is a weight that is packed (quantised) or not there.
    """
    held = {name: (spot, key) for name, spot, key in _held(model)} if remembered else {}
    return differing(remembered, lambda name: _frozen(*held[name]) if name in held else None)


def differing(remembered: str, read: Callable[[str], Tensor | None]) -> str | None:
    """The same for any base: `read` gives a tensor by its name, or None."""
    stored: dict[str, Any] = json.loads(remembered) if remembered else {}
    differ, compared, there = [], 0, 0
    for name, (shape, dtype, text) in stored.items():
        t = read(name)
        there += t is not None
        if t is None or not _readable(t):
            continue
        compared += 1
        if list(t.shape) != shape:
            return f"{name!r} has the shape {tuple(t.shape)}, and {tuple(shape)} in the base the adapter was made for"
        if not _equal(_decode(text), getattr(torch, dtype, torch.float32), _sample(t), t.dtype):
            differ.append(name)
    if stored and not there:
        return f"it has no weights {', '.join(map(repr, list(stored)[:2]))}"
    return f"{len(differ)} of {compared} compared weights have other values, such as {differ[0]!r}" if differ else None


def _equal(a: Tensor, a_dtype: torch.dtype, b: Tensor, b_dtype: torch.dtype) -> bool:
    """Whether two samples are the same numbers, each in its own precision."""
    dtypes = {d for d in (a_dtype, b_dtype) if d.is_floating_point}
    step = max(torch.finfo(d).eps for d in dtypes)
    floor = max(torch.finfo(d).smallest_normal for d in dtypes)  # float16 cuts small numbers off
    step = 0.0 if len(dtypes) == 1 else step
    return bool(((a - b).abs() <= step * a.abs() + (floor if step else 0.0)).all())


def scaling_text(config: Any) -> str:
    """The config's fields that scale an adapter, as JSON."""
    fields = getattr(config, "__dataclass_fields__", {})
    values = {n: getattr(config, n) for n in _SCALING_FIELDS if n in fields}
    return json.dumps(values, default=str)


def as_saved(config: Any, metadata: Mapping[str, str]) -> Any:
    """The config with what training has made of it where the file was saved, if it has such fields and the file remembers; else itself."""
    trained = getattr(config, "as_saved", None)
    return config if trained is None or SCALING_KEY not in metadata else trained(json.loads(metadata[SCALING_KEY]))


def check_identity(
    metadata: Mapping[str, str],
    model: nn.Module,
    config: Any,
    *,
    check_base: Literal["warn", "error", "off"] = "warn",
    check_config: bool = True,
) -> None:
    """Compare what a file remembers with the base model and the config it is loaded with. Files of other libraries remember nothing.

    Another base is a warning by default: adapters are used on fine-tuned or merged relatives of their base on purpose, and shapes that do
    not fit have been refused before. Another scaling is an error: the numbers in adapter_config.json were changed after saving.

    Raises:
        LoadError: if they differ.
    """
    if check_config and SCALING_KEY in metadata:
        saved, now = json.loads(metadata[SCALING_KEY]), json.loads(scaling_text(config))
        changed = {k: v for k, v in saved.items() if k in now and list(_items(now[k])) != list(_items(v))}
        if changed:
            said = ", ".join(f"{k} is {now[k]!r}, and was {v!r} when the file was saved" for k, v in changed.items())
            raise LoadError(
                f"The config does not go with the adapter's tensors: {said}. Restore adapter_config.json, or if it is meant, "
                "pass check_config=False."
            )
    if check_base == "off" or not metadata.get(BASE_KEY):
        return
    difference = other_base(metadata[BASE_KEY], model)
    if difference is not None:
        text = f"This is not the base model the adapter was made for: {difference}. Its outputs will be others."
        if check_base == "error":
            raise LoadError(f"{text} Load the base (and revision) of adapter_config.json, or pass check_base='off'.")
        warnings.warn(f"{text} If that is meant, pass check_base='off'.", PeftWarning, stacklevel=2)


def _items(value: Any) -> Iterator[Any]:
    """Patterns are tables whose order counts; everything else is one value."""
    yield from value.items() if isinstance(value, Mapping) else [value]
