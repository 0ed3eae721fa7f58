"""LoftQ: a quantised base and the factors that make up for what quantising lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import Start, singular, split, wide

_BLOCK = 64
# quantiles of a normal distribution, scaled to [-1, 1], zero included: the published NormalFloat4 levels
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass
class LoftQConfig:
    """Options of the LoftQ start.

    Args:
        loftq_bits: 4 (NormalFloat4, blocks of 64) or 8 (integers, a scale per row).
        loftq_iter: how often quantising and decomposing alternate.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1


def loftq(w: Tensor, r: int, scaling: float, config: LoftQConfig) -> Start:
    """Alternate Q = quantise(W - s B A) and s B A = the rank-r part of W - Q. Li et al. 2023, arXiv:2310.08659, algorithm 1.

    Raises:
        ConfigError: for a number of bits other than 4 and 8.
    """
    if config.loftq_bits not in (4, 8) or config.loftq_iter < 1:
        raise ConfigError(
            f"LoftQ quantises to 4 or 8 bits, in 1 or more iterations; got loftq_bits={config.loftq_bits}, loftq_iter={config.loftq_iter}."
        )
    quantise = nf4 if config.loftq_bits == 4 else int8
    full = wide(w)
    low = torch.zeros_like(full)
    for _ in range(config.loftq_iter):
        base = quantise(full - low)
        u, s, v = singular(full - base, r)
        low = (u * s) @ v
    a, b = split(u, s, v, scaling)
    return Start(a, b, base=base)


def nf4(w: Tensor) -> Tensor:
    """W in NormalFloat4: the nearest level, times the largest absolute value of 64 successive numbers. Dettmers 2023, arXiv:2305.14314."""
    levels = torch.tensor(_NF4, dtype=w.dtype, device=w.device)
    flat = w.flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    top = padded.abs().amax(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    edges = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.bucketize(padded / top, edges)] * top).flatten()[: len(flat)].view_as(w)


def int8(w: Tensor) -> Tensor:
    """W rounded to 255 even steps between plus and minus the largest absolute value of each row."""
    top = w.abs().amax(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    return (w / top * 127).round() / 127 * top


def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Let an adapter on a quantised model start with the best rank-r answer to what quantising lost: s B A = the rank-r part of W - Q.

    Args:
        model_path: folder or safetensors file with the unquantised weights; where left out, the folder the model was loaded from, or its
            files in the Hub's local cache. The network is not used.
        callback: called with the model and a layer's name after each layer; False puts that layer back as it was.

    Raises:
        ConfigError: if no layer of this adapter has a quantised weight.
        LoadError: if the unquantised weights are not found, or do not fit. No layer is changed then.
    """
    from ..engine.layer import adapted_layers
    from ..engine.original import original_weights

    root: nn.Module = peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model  # type: ignore[operator]
    layers = {n: m for n, m in adapted_layers(root) if adapter_name in m.attached and m.site.kind == "linear" and not m.site.codec.plain}
    if not layers:
        raise ConfigError(
            f"No layer with an adapter {adapter_name!r} has a quantised weight. Load the model quantised first, "
            'or start on the full weights with LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(...)).'
        )
    with original_weights(root, model_path) as stored:
        stored.check(
            {n: layer.frozen for n, layer in layers.items()}, {n: (layer.site.n_out, layer.site.n_in) for n, layer in layers.items()}
        )
        for name, layer in layers.items():
            base = wide(layer.frozen_weight())
            lost = stored.weight(name, layer.frozen).to(base) - base
            before = {leaf: layer.leaf(adapter_name, leaf).detach().clone() for leaf in ("lora_A", "lora_B")}
            a, b = split(*singular(lost, before["lora_A"].shape[0]), layer.scaling[adapter_name])
            layer.replace_leaves(adapter_name, {"lora_A": a, "lora_B": b})
            if callback is not None and not callback(peft_model, name):
                layer.replace_leaves(adapter_name, before)
