# ruff: noqa: I001
"""LoRA on a small UNet and a small transformer that draw digits from words: images of a class they have never seen, before and after.

    python examples/diffusion/run.py [--out FOLDER] [--quick]

Both denoisers and their CLIP text encoders are made from configs and first trained whole on scikit-learn's digits 0 to 7. Then a LoRA on both, the
frozen models beside it, learns "eight" and "nine" from 60 images each. The adapters are written as PEFT folders and as diffusers' file, which a fresh
pipeline loads; its images are what is drawn. A classifier trained on the real digits says how many are what the words asked for.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import veneer.compat  # first: diffusers asks once, when it is imported, whether PEFT is there

import diffusers
import numpy as np
import torch
import transformers
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import veneer
from veneer.formats import convert

NEW = (8, 9)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def prompts(labels: Any) -> Tensor:
    """Token ids (n, 3): begin, the digit's word (token n), end."""
    return torch.tensor([[10, int(n), 11] for n in labels])


def text_encoder() -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=4,
        bos_token_id=10, eos_token_id=11, pad_token_id=11,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)


class UNet:
    """Stable Diffusion in small, 8 x 8 pixels without a VAE."""

    name, lr, steps, targets = "unet", 4e-3, (350, 120), [*ATTENTION, "proj_in", "proj_out", "conv1", "conv2", "time_emb_proj"]

    @staticmethod
    def pipe() -> Any:
        net = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
        )  # fmt: skip
        return diffusers.StableDiffusionPipeline(
            vae=None, text_encoder=text_encoder(), tokenizer=None, unet=net, scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    @staticmethod
    def loss(pipe: Any, images: Tensor, labels: Tensor) -> Tensor:
        text = pipe.text_encoder(prompts(labels)).last_hidden_state
        noise, t = torch.randn_like(images), torch.randint(0, 1000, (len(images),))
        noisy = pipe.scheduler.add_noise(images, noise, t)
        return (pipe.unet(noisy, t, encoder_hidden_states=text, return_dict=False)[0] - noise).square().mean()

    @staticmethod
    @torch.no_grad()
    def draw(pipe: Any, labels: list[int]) -> Tensor:
        text = pipe.text_encoder(prompts(labels)).last_hidden_state
        images = pipe(
            prompt_embeds=text, height=64, width=64, guidance_scale=1.0, num_inference_steps=25, output_type="latent",
            generator=torch.Generator().manual_seed(5),
        ).images  # fmt: skip
        return images[:, 0]


class Flux:
    """Flux in small: a transformer on 2 x 2 patches, flow matching."""

    name, lr, steps, targets = (
        "transformer",
        3e-3,
        (800, 250),
        [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp", "proj_out", "linear"],
    )

    @staticmethod
    def pipe() -> Any:
        net = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
            pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=False,
        )  # fmt: skip
        return diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=text_encoder(), tokenizer=None, text_encoder_2=None,
            tokenizer_2=None, transformer=net,
        )  # fmt: skip

    @staticmethod
    def loss(pipe: Any, images: Tensor, labels: Tensor) -> Tensor:
        text = pipe.text_encoder(prompts(labels)).last_hidden_state
        x = diffusers.FluxPipeline._pack_latents(images, len(images), 1, 8, 8)
        places = diffusers.FluxPipeline._prepare_latent_image_ids(len(images), 4, 4, "cpu", torch.float32)
        noise, t = torch.randn_like(x), torch.sigmoid(torch.randn(len(x)))
        noisy = (1 - t[:, None, None]) * x + t[:, None, None] * noise
        out = pipe.transformer(
            hidden_states=noisy, timestep=t, encoder_hidden_states=text, pooled_projections=text[:, 1], txt_ids=torch.zeros(3, 3), img_ids=places,
            return_dict=False,
        )[0]  # fmt: skip
        return (out - (noise - x)).square().mean()

    @staticmethod
    @torch.no_grad()
    def draw(pipe: Any, labels: list[int]) -> Tensor:
        text = pipe.text_encoder(prompts(labels)).last_hidden_state
        packed = pipe(
            prompt_embeds=text, pooled_prompt_embeds=text[:, 1], height=64, width=64, num_inference_steps=25, output_type="latent",
            generator=torch.Generator().manual_seed(5),
        ).images  # fmt: skip
        return packed.view(len(labels), 4, 4, 1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(len(labels), 8, 8)


def train(kind: Any, pipe: Any, images: Tensor, labels: Tensor, steps: int) -> None:
    trained = [p for m in (getattr(pipe, kind.name), pipe.text_encoder) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=kind.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, kind.lr, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(0, len(images), (64,))
        kind.loss(pipe, images[rows], labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def run(kind: Any, out: Path, quick: bool) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Train one denoiser, adapt it, and return figures and images before and after."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    judge = LogisticRegression(max_iter=3000).fit(digits.data / 8 - 1, digits.target)
    seen = labels < min(NEW)
    pipe = kind.pipe()
    pipe.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    train(kind, pipe, images[seen], labels[seen], 20 if quick else kind.steps[0])
    pretrained = time.perf_counter() - started
    whole = {n: copy.deepcopy(getattr(pipe, n)) for n in (kind.name, "text_encoder")}

    asked = [n for n in NEW for _ in range(20)]
    before = kind.draw(pipe, asked)
    few = torch.cat([(labels == n).nonzero()[:60, 0] for n in NEW])
    started = time.perf_counter()
    for name, targets in ((kind.name, kind.targets), ("text_encoder", ["q_proj", "v_proj", "out_proj", "fc1", "fc2"])):
        config = veneer.LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        veneer.inject_adapter_in_model(config, getattr(pipe, name), "digits")
        getattr(pipe, name).peft_config = {"digits": config}
    train(kind, pipe, images[few], labels[few], 5 if quick else kind.steps[1])
    adapted = time.perf_counter() - started
    numbers = sum(p.numel() for n in whole for p in getattr(pipe, n).parameters() if p.requires_grad)

    for name in whole:  # PEFT's folders, diffusers' file, a fresh pipeline
        tensors = veneer.get_peft_model_state_dict(getattr(pipe, name), adapter_name="digits")
        veneer.checkpoint.write_adapter(
            {f"base_model.model.{k}": v for k, v in tensors.items()}, getattr(pipe, name).peft_config["digits"], out / name
        )
    convert(out, out / f"{kind.name}.safetensors", "diffusers")
    trained = kind.draw(pipe, asked)
    fresh = kind.pipe()
    fresh.set_progress_bar_config(disable=True)
    for name, model in whole.items():
        getattr(fresh, name).load_state_dict(model.state_dict())
    fresh.load_lora_weights(out / f"{kind.name}.safetensors", adapter_name="digits")
    after = kind.draw(fresh, asked)

    def right(drawn: Tensor) -> float:
        return float((judge.predict(drawn.clamp(-1, 1).flatten(1).numpy()) == np.array(asked)).mean())

    figures = {
        "asked for and drawn, before": right(before), "after": right(after), "trained numbers": numbers,
        "of all": sum(p.numel() for m in whole.values() for p in m.parameters()), "seconds of pretraining": pretrained, "seconds of LoRA": adapted,
        "loaded draws what was trained, largest difference": float((after - trained).abs().max()),
    }  # fmt: skip
    return figures, before, after


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("diffusion-out"))
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs")
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = {}
    figure, axes = plt.subplots(4, 1, figsize=(10, 5))
    for i, kind in enumerate((UNet, Flux)):
        record[kind.name], *pair = run(kind, args.out / kind.name, args.quick)
        for j, (when, drawn) in enumerate(zip(("before", "after"), pair, strict=True)):
            row = torch.cat([*drawn[:10], *drawn[20:30]], dim=1).clamp(-1, 1)
            axes[2 * i + j].imshow(row, cmap="gray_r")
            axes[2 * i + j].set_title(f'{kind.name}, {when} LoRA: ten times "eight", ten times "nine"', fontsize=8)
            axes[2 * i + j].axis("off")
    figure.tight_layout()
    figure.savefig(args.out / "images.png", dpi=120)
    (args.out / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
