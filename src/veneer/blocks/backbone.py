"""Small copies of a decoder's backbone: found, made after the model of the large one, loaded, and set free as models of their own."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError

_INSIDE = ("", "model", "transformer", "decoder", "model.decoder", "gpt_neox", "model.language_model", "base_model")
_STACKS = ("layers", "h", "blocks")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_MIDDLE = ("intermediate_size", "ffn_dim", "n_inner")
_PROJECTED = "causal_lm_with_hidden_projection"  # a backbone saved together with its projection


def find_stack(model: nn.Module) -> tuple[nn.Module, str]:
    """The backbone of a decoder and the path of its stack of blocks in the model.

    Raises:
        ConfigError: if there is none where decoders have it.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(f"{type(model).__name__} is an encoder-decoder; a shadow goes along a decoder alone.")
    for path in _INSIDE:
        try:
            backbone = model.get_submodule(path)
        except AttributeError:
            continue
        for name in _STACKS:
            if isinstance(backbone._modules.get(name), nn.ModuleList):
                return backbone, f"{path}.{name}" if path else name
    raise ConfigError(
        f"{type(model).__name__} has no stack of decoder blocks where transformers' language models have it "
        f"({', '.join(_STACKS)} in {', '.join(p or 'the model' for p in _INSIDE)})."
    )


def width_of(config: Any) -> int:
    """The width of the hidden states, as a config has it."""
    return int(_read(config, _WIDTH))


def mirror(model: nn.Module, *, layers: int | None, width: int | None, heads: int | None, middle: int | None) -> nn.Module:
    """A fresh backbone of the class of the model's own, one layer deep by default, of its sizes where not given.

    Raises:
        ConfigError: if the class cannot be made from such a config.
    """
    large, _ = find_stack(model)
    config = copy.deepcopy(getattr(large, "config", None) or getattr(model, "config", None))
    if config is None:
        raise ConfigError(f"{type(model).__name__} has no config to make a small copy of its backbone from.")
    before = _read(config, _DEPTH)
    _write(config, _DEPTH, layers or 1)
    for names, value in ((_WIDTH, width), (_MIDDLE, middle), (_HEADS, heads)):
        if value is not None:
            _write(config, names, value)
    _cut(config, before, layers or 1)
    try:
        return type(large)(config)
    except Exception as e:  # whatever sizes the class cannot be
        raise ConfigError(f"No {type(large).__name__} can be made with the sizes of the shadow: {type(e).__name__}: {e}") from e


def _cut(config: Any, before: int, now: int) -> None:
    """What a config lists per layer, for another number of layers."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and "layer" in name and len(value) == before:
            setattr(config, name, (value + [value[-1]] * now)[:now])
    if isinstance(getattr(config, "max_window_layers", None), int):
        config.max_window_layers = min(config.max_window_layers, now)


def _read(config: Any, names: tuple[str, ...]) -> Any:
    name = next((n for n in names if hasattr(config, n)), None)
    if name is None:
        raise ConfigError(f"The config of the base model has none of {', '.join(names)}.")
    return getattr(config, name)


def _write(config: Any, names: tuple[str, ...], value: int) -> None:
    setattr(config, next((n for n in names if hasattr(config, n)), names[0]), int(value))


def load(name: str, *, empty: bool = False) -> tuple[nn.Module, nn.Linear | None]:
    """A pretrained backbone from a folder or the Hub, and the projection that was trained with it, where there is one.

    Args:
        empty: only as large as it is, with whatever values: its config is enough then.
    """
    try:
        from transformers import AutoConfig, AutoModel
        from transformers.utils import cached_file
    except ImportError as e:
        raise ImportError(f"shadow_model={name!r} is loaded with transformers: run `pip install transformers`.") from e
    raw = json.loads(Path(cached_file(name, "config.json") or "").read_text(encoding="utf-8"))
    if raw.get("model_type") != _PROJECTED:
        return AutoModel.from_config(AutoConfig.from_pretrained(name)) if empty else AutoModel.from_pretrained(name), None
    from ..checkpoint.load import read_safetensors

    inner: dict[str, Any] = dict(raw["shadow_model_config"])
    backbone: nn.Module = AutoModel.from_config(AutoConfig.for_model(inner.pop("model_type"), **inner))
    tensors = read_safetensors(cached_file(name, "model.safetensors") or "")[0]
    weight = tensors.get("shadow_hidden_projection.weight")
    if weight is None:
        raise ConfigError(f"{name!r} is a shadow with a projection, and its file has no 'shadow_hidden_projection.weight'.")
    backbone.load_state_dict({k.removeprefix("shadow_model."): t for k, t in tensors.items() if k.startswith("shadow_model.")})
    projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    projection.load_state_dict({"weight": weight})
    return backbone, projection


def accepts(module: nn.Module, name: str) -> bool:
    """Whether the module's forward has an argument of this name, or takes any."""
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def run(backbone: nn.Module, given: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """(last hidden states, cache) of a backbone."""
    out = backbone(**{k: v for k, v in given.items() if v is not None and accepts(backbone, k)})
    hidden = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0] if isinstance(out, tuple) else out
    return hidden, getattr(out, "past_key_values", None)


def alone(model: Any, backbone: nn.Module, projection: nn.Module | None, head: Any, table: Any) -> nn.Module:
    """A backbone with a head as a model of the class of the large one: what it saves, transformers loads.

    A projection between them is multiplied into the head. Modules are shared, not copied.

    Args:
        table: the input embeddings, for a backbone that has none of its own.
    """
    backbone = _shell(backbone)
    if table is not None:
        name = next(
            (n for n, m in backbone._modules.items() if isinstance(m, nn.Embedding) and m.num_embeddings == table.num_embeddings), TABLE
        )
        backbone._modules[name] = table
    config: Any = copy.deepcopy(backbone.config)
    if projection is not None:
        head = _behind(head, projection)
    own: Any = backbone.get_input_embeddings()  # type: ignore[operator]
    config.tie_word_embeddings = getattr(own, "weight", None) is getattr(head, "weight", head)
    with torch.device("meta"):
        small: Any = type(model)(config)
    path = next(n for n, m in model.named_modules() if m is find_stack(model)[0])
    parent, _, name = path.rpartition(".")
    small.get_submodule(parent)._modules[name] = backbone
    if model.get_output_embeddings() is not None:
        small.set_output_embeddings(head)
    else:
        small._modules[next(n for n in CLASSIFIERS if n in model._modules)] = head
    left = [n for n, p in small.named_parameters() if p.is_meta]
    if left:
        raise ConfigError(
            f"A {type(model).__name__} has more than a backbone and a head ({left[0]!r}), so a shadow cannot stand alone as one."
        )
    if getattr(model, "generation_config", None) is not None:
        small.generation_config = copy.deepcopy(model.generation_config)
    out: nn.Module = small.train(model.training)
    return out


TABLE = "embed_tokens"  # what a backbone loses that is fed with the large one's embeddings, as in PEFT
CLASSIFIERS = ("score", "classifier")


def _shell(module: nn.Module) -> nn.Module:
    """The module with places of its own for the same modules and tensors."""
    out = copy.copy(module)
    out._modules, out._parameters, out._buffers = dict(module._modules), dict(module._parameters), dict(module._buffers)
    return out


@torch.no_grad()
def _behind(head: Any, projection: nn.Module) -> nn.Linear:
    p: Any = projection.weight
    out = nn.Linear(p.shape[1], head.weight.shape[0], bias=getattr(head, "bias", None) is not None, device=p.device, dtype=p.dtype)
    out.weight.copy_(head.weight.float() @ p.float())
    if out.bias is not None:
        out.bias.copy_(head.bias)
    return out
