"""LoftQ: a quantised base and the factors that make up for what quantising lost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import Start, wide

_BLOCK = 64
# quantiles of a normal distribution, scaled to [-1, 1], zero included: the published NormalFloat4 levels
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
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
    quantise = _nf4 if config.loftq_bits == 4 else _int8
    full = wide(w)
    low = torch.zeros_like(full)
    for _ in range(config.loftq_iter):
        base = quantise(full - low)
        u, s, v = torch.linalg.svd(full - base, full_matrices=False)
        root = s[:r].sqrt()
        a, b = root.unsqueeze(1) * v[:r], u[:, :r] * root
        low = b @ a
    return Start(a / scaling, b, base=base)


def _nf4(w: Tensor) -> Tensor:
    levels = torch.tensor(_NF4, dtype=w.dtype, device=w.device)
    flat = w.flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    top = padded.abs().amax(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    edges = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.bucketize(padded / top, edges)] * top).flatten()[: len(flat)].view_as(w)


def _int8(w: Tensor) -> Tensor:
    top = w.abs().amax(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    return (w / top * 127).round() / 127 * top
