"""The base models of the golden cases, rebuilt from their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

CASES = Path(__file__).parent / "cases"


class Mlp(nn.Module):
    def __init__(self, n_in: int = 12, n_mid: int = 16, n_out: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(n_in, n_mid, bias=bias), nn.Linear(n_mid, n_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(torch.tanh(self.lin0(x)))


class DeepMlp(nn.Module):
    def __init__(self, width: int = 12, mid: int = 16, depth: int = 3, n_out: int = 6, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, mid, bias=bias), "down": nn.Linear(mid, width, bias=bias)}) for _ in range(depth)
        )
        self.head = nn.Linear(width, n_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = x + block["down"](torch.tanh(block["up"](x)))  # type: ignore[index]
        return self.head(x)


class EmbNet(nn.Module):
    def __init__(self, vocab: int = 20, width: int = 12, n_out: int = 6, bias: bool = True) -> None:
        super().__init__()
        self.emb, self.lin0 = nn.Embedding(vocab, width), nn.Linear(width, n_out, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lin0(torch.tanh(self.emb(tokens)))


class ConvNet(nn.Module):
    def __init__(
        self, dims: int = 2, c_in: int = 4, c_mid: int = 8, c_out: int = 6, kernel: int = 3, stride: int = 1, padding: int = 1, groups: int = 1,
        n_out: int = 5, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.conv0 = conv(c_in, c_mid, kernel, stride=stride, padding=padding, groups=groups, bias=bias)
        self.conv1 = conv(c_mid, c_out, 1, bias=bias)
        self.lin0 = nn.Linear(c_out, n_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.conv1(torch.tanh(self.conv0(x))).flatten(2).mean(-1))


class GptConvNet(nn.Module):
    def __init__(self, n_in: int = 12, n_mid: int = 16, n_out: int = 8) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c0, self.c1 = Conv1D(n_mid, n_in), Conv1D(n_out, n_mid)

    def forward(self, x: Tensor) -> Tensor:
        return self.c1(torch.tanh(self.c0(x)))


class MhaNet(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4, n_out: int = 6) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(width, heads, batch_first=True)
        self.lin0 = nn.Linear(width, n_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x, need_weights=False)[0])


class NormNet(nn.Module):
    def __init__(self, n_in: int = 12, n_mid: int = 16, n_out: int = 8) -> None:
        super().__init__()
        self.lin0, self.norm, self.lin1 = nn.Linear(n_in, n_mid), nn.LayerNorm(n_mid), nn.Linear(n_mid, n_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.norm(self.lin0(x)))


class Experts(nn.Module):
    """x W_eᵀ summed over the experts; layout "eoi" stores (E, out, in), "eio" (E, in, out)."""

    def __init__(self, n_in: int, n_out: int, experts: int, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.w = nn.Parameter(torch.randn((experts, n_out, n_in) if layout == "eoi" else (experts, n_in, n_out)))
        if layout == "eio":
            self.is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        w = self.w.transpose(1, 2) if self.layout == "eoi" else self.w
        return torch.matmul(x.unsqueeze(0), w).sum(0)


class Mix(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.randn(n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.m.T


class ExpertNet(nn.Module):
    def __init__(self, n_in: int = 12, n_mid: int = 10, n_out: int = 6, experts: int = 3, layout: str = "eoi") -> None:
        super().__init__()
        self.experts, self.mix = Experts(n_in, n_mid, experts, layout), Mix(n_mid, n_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.experts(x)))


_PLAIN = {
    "mlp": Mlp, "deep_mlp": DeepMlp, "emb_net": EmbNet, "conv_net": ConvNet, "gpt_conv_net": GptConvNet, "mha_net": MhaNet, "norm_net": NormNet,
    "expert_net": ExpertNet,
}  # fmt: skip
_TRANSFORMERS = {
    "llama_causal_lm": ("LlamaConfig", "LlamaForCausalLM"), "gpt2_causal_lm": ("GPT2Config", "GPT2LMHeadModel"),
    "t5_seq2seq_lm": ("T5Config", "T5ForConditionalGeneration"), "bert_seq_cls": ("BertConfig", "BertForSequenceClassification"),
    "bert_token_cls": ("BertConfig", "BertForTokenClassification"), "bert_qa": ("BertConfig", "BertForQuestionAnswering"),
    "bert_features": ("BertConfig", "BertModel"),
}  # fmt: skip


def build(name: str, **args: Any) -> nn.Module:
    """A base model by its builder's name, freshly made."""
    if name in _PLAIN:
        return _PLAIN[name](**args).eval()  # type: ignore[no-any-return]
    import transformers

    config, model = _TRANSFORMERS[name]
    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**args)).eval()
    return made


def rebuild(folder: Path) -> nn.Module:
    """The base model of a case, with its weights."""
    spec = json.loads((folder / "base.json").read_text())
    model = build(spec["builder"], **spec["args"]).to(getattr(torch, spec.get("dtype", "float32")))
    result = model.load_state_dict(load_file(folder / "base.safetensors"), strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= set(spec.get("tied", ()))
    return model.eval()


@torch.no_grad()
def call(model: nn.Module, case: dict[str, Any], io: dict[str, Tensor], **extra: Any) -> Tensor:
    """The output of a case that is compared."""
    spec = case["call"]
    args = [io[f"input.{n}"] for n in spec.get("positional", ())]
    kwargs = {n: io[f"input.{n}"] for n in (*spec.get("keyword", ()), *spec.get("peft_only", ()))}
    out = model(*args, **kwargs, **extra)
    field = spec.get("output", "tensor")
    found: Tensor = out if field == "tensor" else getattr(out, field)
    return found
