"""The models that are measured: Llama-shaped decoders, bare or with an adapter of either library."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def decoder(dtype: torch.dtype, hidden: int = 768, layers: int = 2) -> nn.Module:
    """A Llama without a head, frozen."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, vocab_size=1024, use_cache=False,
    )  # fmt: skip
    model: nn.Module = LlamaModel(config).to(dtype)
    return model.requires_grad_(False)


def adapted(library: str, base: nn.Module, config: str, fields: Mapping[str, Any]) -> Any:
    """A copy of the base with an adapter: `config` is the name of a config class, the same in both libraries."""
    import importlib

    lib = importlib.import_module(library)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lib.get_peft_model(copy.deepcopy(base), getattr(lib, config)(target_modules=list(TARGETS), **fields))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.01)
    return model


def trained_whole(base: nn.Module) -> nn.Module:
    """A copy of the base of which the weights that adapters would change train themselves."""
    model = copy.deepcopy(base)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            module.requires_grad_(True)
    return model


class Step:
    """One training step without the optimizer: forward and backward of everything that trains, and to the embeddings."""

    def __init__(self, model: nn.Module, batch: int = 4, length: int = 160) -> None:
        self.model = model.train()
        inner: Any = model
        hidden = inner.config.hidden_size
        torch.manual_seed(1)
        self.x = torch.randn(batch, length, hidden, dtype=inner.dtype).requires_grad_()

    def __call__(self) -> None:
        out: Tensor = self.model(inputs_embeds=self.x).last_hidden_state
        out.sum().backward()
        self.x.grad = None
        for p in self.model.parameters():
            p.grad = None


class Token:
    """One token through the model, no gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        inner: Any = model
        self.x = torch.randn(1, 1, inner.config.hidden_size, dtype=inner.dtype)

    @torch.no_grad()
    def __call__(self) -> None:
        self.model(inputs_embeds=self.x)


class Merge:
    """Adapters merged and taken out again; of a bare model, two passes over the weights that they change."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.weights = [m.weight for n, m in model.named_modules() if n.rpartition(".")[2] in TARGETS and isinstance(m, nn.Linear)]

    @torch.no_grad()
    def __call__(self) -> None:
        if hasattr(self.model, "merge_adapter"):
            self.model.merge_adapter()
            self.model.unmerge_adapter()
            return
        for _ in range(2):
            for w in self.weights:
                w.mul_(1)


class Mixed:
    """16 rows of 8 tokens over K adapters, no gradients; with no adapters, the frozen model."""

    def __init__(self, library: str | None, base: nn.Module, adapters: int = 0, rows: int = 16, length: int = 8) -> None:
        inner: Any = base
        torch.manual_seed(1)
        self.x = torch.randn(rows, length, inner.config.hidden_size, dtype=inner.dtype)
        self.model, self.more = base.eval(), {}
        if library is not None:
            import importlib

            lib = importlib.import_module(library)
            config = lib.LoraConfig(r=16, target_modules=list(TARGETS), init_lora_weights=False)
            model = lib.get_peft_model(copy.deepcopy(base), config, adapter_name="a0")
            for k in range(1, adapters):
                model.add_adapter(f"a{k}", config)
            self.model, self.more = model.eval(), {"adapter_names": [f"a{i * adapters // rows}" for i in range(rows)]}

    @torch.no_grad()
    def __call__(self) -> None:
        self.model(inputs_embeds=self.x, **self.more)
