"""A tokenizer of a few words and a tiny Llama for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SENTENCE = "the cat dog sat ran on a mat rug yes no hello you how are fine"
WORDS = ["<pad>", "<eos>", "<unk>", "<user>", "<bot>", *SENTENCE.split()]


def word_tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def save_word_llama(folder: Path) -> None:
    """Write the model, always the same, and the tokenizer."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
