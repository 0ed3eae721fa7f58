"""One small model per kind of place a method can act on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SiteCase:
    """A model, the config fields that target it, and inputs.

    Attributes:
        kind: the kind of site.  model: makes the model.  inputs: makes a batch of `rows` rows.
        fields: what a config needs in order to hit it.
        mergeable: False where no weight of the layer can hold a change that reads all inputs (grouped convolutions).
        passes: False where torch's own layer holds gradients back: padding rows of a table, rows cut to a norm.
        loose: by how much more than usual two outputs may differ, where a storage rounds what it is given.
    """

    kind: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    fields: dict[str, Any]
    mergeable: bool = True
    passes: bool = True
    loose: float = 1.0


class _Wrap(nn.Module):
    """A module under the name `site`, its output through a fixed nonlinearity."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.site(x)
        return torch.tanh(y) + y


class _Attention(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.site = nn.MultiheadAttention(16, 4, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.site(x, x, x, need_weights=False)[0]
        return y


class _Heads(nn.Module):
    """Attention of three query heads on one key head, or of four heads behind a fused projection."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.head_dim = 4
        if fused:
            self.c_attn, self.c_proj = nn.Linear(16, 48), nn.Linear(16, 16)
        else:
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(*n) for n in ((16, 12), (16, 4), (16, 4), (12, 16)))

    def forward(self, x: Tensor) -> Tensor:
        fused = "c_attn" in self._modules
        parts = self.c_attn(x).chunk(3, -1) if fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in parts)
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not fused)
        z = z.transpose(1, 2).flatten(2)
        y: Tensor = self.c_proj(z) if fused else self.o_proj(z)
        return y


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        mixed = hidden_states.cumsum(1) / torch.arange(1, hidden_states.shape[1] + 1).unsqueeze(-1).to(hidden_states)
        y: Tensor = hidden_states + torch.tanh(self.mlp(self.norm(mixed)))
        return y


class _Decoder(nn.Module):
    """A stack of blocks, made from a config, as transformers' decoders are."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.inward = nn.Linear(16, config.hidden_size)
        self.layers = nn.ModuleList(_Block(config.hidden_size) for _ in range(config.num_hidden_layers))

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        h: Tensor = self.inward(inputs_embeds)
        for block in self.layers:
            h = block(h)
        return h


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=12, num_hidden_layers=3)
        self.model = _Decoder(self.config)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        h: Tensor = self.model(inputs_embeds)
        return h


class _Table(nn.Module):
    """Holds a parameter of its own: two or three dimensions, the latter as experts."""

    def __init__(self, *shape: int, transposed: bool = False) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape) / 4)
        if transposed:
            self.is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        if self.w.ndim == 2:
            return nn.functional.linear(x, self.w)
        w = self.w if getattr(self, "is_transposed", False) else self.w.transpose(1, 2)
        return torch.matmul(x.unsqueeze(0), w).sum(0)


class _Scaled(nn.Embedding):
    """An embedding with a forward of its own."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class _Halved(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.5


class _SamePadding(nn.Conv2d):
    """A convolution that pads by itself."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (0, 1, 1, 0)))


class _Hooked(_Wrap):
    """Its linear layer carries a hook that counts."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 8))
        self.site.register_forward_hook(_count)


def _count(module: Any, args: Any, output: Any) -> None:
    module.calls = getattr(module, "calls", 0) + 1


def _floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape)


def _tokens(rows: int) -> Tensor:
    return torch.randint(0, 20, (rows, 7))


def _modules(**extra: Any) -> dict[str, Any]:
    return {"target_modules": ["site"], **extra}


def _block() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.Sequential(nn.LayerNorm(8), nn.GELU()), nn.Linear(8, 12))


def _transformers_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D as Theirs

    conv = Theirs(8, 12)
    nn.init.normal_(conv.bias)  # theirs starts as zeros, where a scaling of the bias has no effect
    return _Wrap(conv)


SITES: dict[str, SiteCase] = {
    "linear": SiteCase("linear", lambda: _Wrap(nn.Linear(12, 8)), _floats(5, 12), _modules()),
    "linear_square": SiteCase("linear", lambda: _Wrap(nn.Linear(16, 16, bias=False)), _floats(16), _modules()),
    "linear_subclass": SiteCase("linear", lambda: _Wrap(_Halved(12, 8)), _floats(5, 12), _modules()),
    "linear_hooked": SiteCase("linear", _Hooked, _floats(5, 12), _modules()),
    "conv1d_transformers": SiteCase("linear", _transformers_conv1d, _floats(5, 12), _modules()),
    "embedding": SiteCase("embedding", lambda: _Wrap(nn.Embedding(20, 12, padding_idx=0)), _tokens, _modules(), passes=False),
    "embedding_max_norm": SiteCase("embedding", lambda: _Wrap(nn.Embedding(20, 12, max_norm=2.0)), _tokens, _modules(), passes=False),
    "embedding_scaled": SiteCase("embedding", lambda: _Wrap(_Scaled(20, 12)), _tokens, _modules()),
    "conv1d": SiteCase("conv", lambda: _Wrap(nn.Conv1d(4, 8, 3, stride=2, padding=1)), _floats(4, 9), _modules()),
    "conv2d": SiteCase("conv", lambda: _Wrap(nn.Conv2d(4, 8, 3, padding=2, dilation=2)), _floats(4, 6, 6), _modules()),
    "conv2d_reflect": SiteCase("conv", lambda: _Wrap(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")), _floats(4, 6, 6), _modules()),
    "conv2d_1x1": SiteCase("conv", lambda: _Wrap(nn.Conv2d(4, 8, 1)), _floats(4, 6, 6), _modules()),
    "conv2d_groups": SiteCase("conv", lambda: _Wrap(nn.Conv2d(4, 8, 3, groups=2)), _floats(4, 6, 6), _modules(), mergeable=False),
    "conv2d_subclass": SiteCase("conv", lambda: _Wrap(_SamePadding(4, 8, 2)), _floats(4, 6, 6), _modules()),
    "conv3d_1x1x1": SiteCase("conv", lambda: _Wrap(nn.Conv3d(4, 8, 1)), _floats(4, 3, 3, 3), _modules()),
    "attention": SiteCase("attention", _Attention, _floats(5, 16), _modules()),
    "parameter_2d": SiteCase(
        "parameter", lambda: _Wrap(_Table(8, 12)), _floats(12), {"target_modules": [], "target_parameters": ["site.w"]}
    ),
    "parameter_3d": SiteCase(
        "parameter", lambda: _Wrap(_Table(3, 8, 12)), _floats(12), {"target_modules": [], "target_parameters": ["site.w"]}
    ),
    "parameter_3d_transposed": SiteCase(
        "parameter", lambda: _Wrap(_Table(3, 12, 8, transposed=True)), _floats(12), {"target_modules": [], "target_parameters": ["site.w"]}
    ),
    "module_layer_norm": SiteCase("module", lambda: _Wrap(nn.LayerNorm(12)), _floats(5, 12), _modules()),
    "module_rms_norm": SiteCase("module", lambda: _Wrap(nn.RMSNorm(12)), _floats(5, 12), _modules()),
    "module_batch_norm": SiteCase("module", lambda: _Wrap(nn.BatchNorm1d(12)), _floats(12), _modules()),
    "module_linear": SiteCase("module", lambda: _Wrap(nn.Linear(12, 8)), _floats(5, 12), _modules()),
    "module_embedding": SiteCase("module", lambda: _Wrap(nn.Embedding(20, 12, padding_idx=0)), _tokens, _modules(), passes=False),
    "module_nested": SiteCase("module", lambda: _Wrap(_block()), _floats(5, 12), _modules()),
    "block": SiteCase("block", _Stack, _floats(5, 16), {"target_modules": None}),
    "self_attention": SiteCase("self_attention", lambda: _Wrap(_Heads()), _floats(5, 16), {"target_modules": "site"}),
    "self_attention_fused": SiteCase("self_attention", lambda: _Wrap(_Heads(fused=True)), _floats(5, 16), {"target_modules": "site"}),
}
