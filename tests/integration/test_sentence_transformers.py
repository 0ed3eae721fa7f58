"""sentence-transformers: adding an adapter, training it, saving and loading it; a cross-encoder whose head is trained whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses, modules

from .small import tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*pin_memory.*")
TEXTS = ["w5 w6 w7", "w8 w9", "w10 w11 w12 w13"]


def _encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "pad_token_id": 0,
    }
    transformers.BertModel(transformers.BertConfig(**shape, max_position_embeddings=32)).save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    return folder / "bert"


def _model(folder: Path) -> Any:
    word = modules.Transformer(str(folder), max_seq_length=16)
    return SentenceTransformer(modules=[word, modules.Pooling(word.get_embedding_dimension())], device="cpu")


def _train(model: Any, folder: Path) -> None:
    rows = Dataset.from_dict({"anchor": [f"w{i} w{i + 1}" for i in range(3, 19)], "positive": [f"w{i + 1} w{i + 2}" for i in range(3, 19)]})
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=8, learning_rate=5e-2, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    SentenceTransformerTrainer(model, args=args, train_dataset=rows, loss=losses.MultipleNegativesRankingLoss(model)).train()


def test_an_adapter_is_added_trained_saved_and_loaded(tmp_path: Path) -> None:
    base = _encoder(tmp_path)
    model = _model(base)
    before = model.encode(TEXTS)
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    assert np.array_equal(model.encode(TEXTS), before)  # an adapter that has not been trained does nothing
    _train(model, tmp_path / "run")
    after = model.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-3
    model.disable_adapters()
    assert np.array_equal(model.encode(TEXTS), before)
    model.enable_adapters()
    assert np.array_equal(model.encode(TEXTS), after)
    model.save_pretrained(str(tmp_path / "out"))
    files = {p.name for p in (tmp_path / "out").rglob("*")}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert np.allclose(again.encode(TEXTS), after, atol=1e-6)
    fresh = _model(base)
    fresh.load_adapter(str(tmp_path / "out"), "mine")
    assert np.allclose(fresh.encode(TEXTS), after, atol=1e-6)
    fresh.delete_adapter("mine")
    assert np.array_equal(fresh.encode(TEXTS), before)
