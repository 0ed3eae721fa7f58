"""Small models from configs."""

from __future__ import annotations

from typing import Any

import torch
import transformers


def llama(**fields: Any) -> Any:
    """A Llama of two layers, width 32, 64 tokens."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = transformers.LlamaConfig(
        **{**shape, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, **fields}
    )
    return transformers.LlamaForCausalLM(config).eval()


def ids(rows: int = 3, length: int = 7, top: int = 64) -> torch.Tensor:
    """Token ids (rows, length), none of them special."""
    return torch.randint(3, top, (rows, length), generator=torch.Generator().manual_seed(1))


def stir(model: Any, std: float = 0.2) -> None:
    """Give every trainable tensor random values, so that adapters do something."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * std)


def tokenizer() -> Any:
    """One that knows the words w3 to w63, and the special tokens of `llama`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "</s>": 1, "<s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
