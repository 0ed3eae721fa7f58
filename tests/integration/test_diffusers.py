"""diffusers with veneer as PEFT: LoRA files of PEFT, diffusers and kohya, several at once, fused and taken out, deleted, swapped in compiled models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from veneer.formats import convert

from .small import stir

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
WORDS = torch.arange(3, 10)[None]  # a prompt's token ids


def _text_encoder() -> Any:
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return transformers.CLIPTextModel(config).eval()


def _unet() -> Any:
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16,
    )  # fmt: skip
    return net.eval()


def _transformer() -> Any:
    torch.manual_seed(0)
    net = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return net.eval()


class _Unet:
    """A Stable Diffusion pipeline in small."""

    denoiser, targets = "unet", [*ATTENTION, "proj_in", "conv1", "time_emb_proj"]

    @staticmethod
    def pipe() -> Any:
        scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
        return diffusers.StableDiffusionPipeline(
            vae=None, text_encoder=_text_encoder(), tokenizer=None, unet=_unet(), scheduler=scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    @staticmethod
    def inputs(text: Tensor) -> dict[str, Any]:
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        return {"sample": x, "timestep": torch.tensor([7]), "encoder_hidden_states": text}


class _Flux:
    """A Flux pipeline in small."""

    denoiser, targets = "transformer", [*ATTENTION, "add_k_proj", "proj_mlp", "norm1.linear"]

    @staticmethod
    def pipe() -> Any:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return diffusers.FluxPipeline(
            scheduler=scheduler,
            vae=None,
            text_encoder=_text_encoder(),
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=_transformer(),
        )

    @staticmethod
    def inputs(text: Tensor) -> dict[str, Any]:
        x = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(3))
        places = torch.stack([torch.zeros(16), torch.arange(16.0) // 4, torch.arange(16.0) % 4], dim=1)
        return {
            "hidden_states": x, "timestep": torch.tensor([0.5]), "encoder_hidden_states": text, "pooled_projections": text.mean(1),
            "txt_ids": torch.zeros(text.shape[1], 3), "img_ids": places,
        }  # fmt: skip


KINDS = pytest.mark.parametrize("kind", [_Unet, _Flux], ids=["unet", "transformer"])
TEXT = ["q_proj", "v_proj", "out_proj", "fc1"]


@torch.no_grad()
def _run(kind: Any, pipe: Any) -> Tensor:
    text = pipe.text_encoder(WORDS).last_hidden_state
    return getattr(pipe, kind.denoiser)(**kind.inputs(text), return_dict=False)[0]


def _trained(kind: Any, folder: Path, r: int = 4, alpha: int = 6, std: float = 0.2, **fields: Any) -> Tensor:
    """PEFT folders of both models in `folder`, and what the pipeline with them computes."""
    pipe = kind.pipe()
    for name, targets in ((kind.denoiser, kind.targets), ("text_encoder", TEXT)):
        if name == "text_encoder":  # patterns have to fit
            fields = {
                k: {{"to_q": "q_proj", "to_k": "v_proj"}[n]: v for n, v in t.items()} if isinstance(t, dict) else t
                for k, t in fields.items()
            }
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **fields)
        model = get_peft_model(getattr(pipe, name), config)
        stir(model, std)
        model.save_pretrained(folder / name)
        setattr(pipe, name, model.eval())
    return _run(kind, pipe)


def _file(kind: Any, folder: Path, to: str = "diffusers", **fields: Any) -> tuple[Path, Tensor]:
    want = _trained(kind, folder / "peft", **fields)
    convert(folder / "peft", folder / f"{to}.safetensors", to)
    return folder / f"{to}.safetensors", want


def _weights(pipe: Any, kind: Any) -> dict[str, Tensor]:
    return {
        f"{n}.{k}": v.clone() for n in (kind.denoiser, "text_encoder") for k, v in getattr(pipe, n).state_dict().items() if "lora_" not in k
    }


def _near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@KINDS
@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3}}], ids=["plain", "rslora", "patterns"]
)
def test_a_converted_file_gives_the_trained_output(kind: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    file, want = _file(kind, tmp_path, **fields)
    pipe = kind.pipe()
    before = _run(kind, pipe)
    pipe.load_lora_weights(file, adapter_name="a")
    assert _near(_run(kind, pipe), want) and not torch.allclose(before, want, atol=1e-2)
    assert sorted(pipe.get_active_adapters()) == ["a"]


def test_a_kohya_file_gives_the_trained_output(tmp_path: Path) -> None:
    file, want = _file(_Unet, tmp_path, "kohya")
    pipe = _Unet.pipe()
    pipe.load_lora_weights(file, adapter_name="k")
    assert _near(_run(_Unet, pipe), want)


@KINDS
def test_what_diffusers_saves_is_what_diffusers_and_peft_load(kind: Any, tmp_path: Path) -> None:
    pipe = kind.pipe()
    denoiser = getattr(pipe, kind.denoiser)
    denoiser.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=kind.targets))
    pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=TEXT))
    stir(denoiser), stir(pipe.text_encoder)
    want = _run(kind, pipe)
    from peft.utils import get_peft_model_state_dict

    parts = {
        f"{kind.denoiser}_lora_layers": get_peft_model_state_dict(denoiser),
        "text_encoder_lora_layers": get_peft_model_state_dict(pipe.text_encoder),
        f"{kind.denoiser}_lora_adapter_metadata": denoiser.peft_config["default"].to_dict(),
        "text_encoder_lora_adapter_metadata": pipe.text_encoder.peft_config["default"].to_dict(),
    }
    for part in parts.values():
        part.pop("runtime_config", None)
    pipe.save_lora_weights(tmp_path, **parts)
    again = kind.pipe()
    again.load_lora_weights(tmp_path)
    assert _near(_run(kind, again), want)
    convert(tmp_path, tmp_path / "peft", "peft")
    fresh = kind.pipe()
    for name in (kind.denoiser, "text_encoder"):
        setattr(fresh, name, PeftModel.from_pretrained(getattr(fresh, name), tmp_path / "peft" / name).eval())
    assert _near(_run(kind, fresh), want)


@KINDS
def test_several_adapters_with_weights_fused_taken_out_and_deleted(kind: Any, tmp_path: Path) -> None:
    one, _ = _file(kind, tmp_path / "one", r=4)
    two, _ = _file(kind, tmp_path / "two", r=2, alpha=4, std=0.3)
    pipe = kind.pipe()
    start, base = _run(kind, pipe), _weights(pipe, kind)
    pipe.load_lora_weights(one, adapter_name="one")
    alone = _run(kind, pipe)
    pipe.load_lora_weights(two, adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.7, -0.4])
    both = _run(kind, pipe)

    # the weighted sum of both changes, computed here
    from veneer.formats import FORMATS

    plain = kind.pipe()
    for file, weight in ((one, 0.7), (two, -0.4)):
        for component, part in FORMATS["diffusers"].read(file).items():
            for path, f in part.layers.items():
                w = getattr(plain, component).get_submodule(path).weight
                change = (
                    torch.einsum("or...,ri...->oi...", f.up.flatten(1), f.down)
                    if f.down.ndim == 2
                    else torch.tensordot(f.up.flatten(1), f.down, 1)
                )
                w.data += weight * f.scale * change
    assert _near(_run(kind, plain), both) and not torch.allclose(both, start, atol=1e-2)

    pipe.fuse_lora(components=[kind.denoiser, "text_encoder"], adapter_names=["one", "two"])
    assert _near(_run(kind, pipe), both)
    pipe.unfuse_lora(components=[kind.denoiser, "text_encoder"])
    assert torch.equal(_run(kind, pipe), both)
    pipe.set_adapters("one", 1.0)
    assert _near(_run(kind, pipe), alone)
    pipe.fuse_lora(components=[kind.denoiser], lora_scale=0.5)
    halves = _run(kind, pipe)
    pipe.unfuse_lora(components=[kind.denoiser])
    assert not _near(halves, alone) and _near(_run(kind, pipe), halves)  # diffusers itself scales the layers and leaves them so
    pipe.set_adapters("one", 1.0)
    assert _near(_run(kind, pipe), alone)

    pipe.disable_lora()
    assert torch.equal(_run(kind, pipe), start)
    pipe.enable_lora()
    pipe.delete_adapters("two")
    assert _near(_run(kind, pipe), alone) and {n for names in pipe.get_list_adapters().values() for n in names} == {"one"}
    pipe.unload_lora_weights()
    assert torch.equal(_run(kind, pipe), start)
    after = _weights(pipe, kind)
    assert after.keys() == base.keys() and all(torch.equal(after[k], base[k]) for k in base)


@KINDS
def test_swapping_in_a_compiled_denoiser_compiles_once(kind: Any, tmp_path: Path) -> None:
    targets = kind.targets
    files = [_file(type("K", (kind,), {"targets": targets}), tmp_path / str(r), r=r, alpha=alpha)[0] for r, alpha in ((4, 6), (8, 3))]
    text = _text_encoder()(WORDS).last_hidden_state.detach()
    want = []
    for file in files:
        pipe = kind.pipe()
        _denoiser_only(pipe, kind, file)
        with torch.no_grad():
            want.append(getattr(pipe, kind.denoiser)(**kind.inputs(text), return_dict=False)[0])
    pipe = kind.pipe()
    denoiser = getattr(pipe, kind.denoiser)
    denoiser.enable_lora_hotswap(target_rank=8)
    _denoiser_only(pipe, kind, files[0])
    torch._dynamo.reset()
    compiled = torch.compile(denoiser, backend="aot_eager")
    with torch.no_grad():
        assert _near(compiled(**kind.inputs(text), return_dict=False)[0], want[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for i in (1, 0, 1):
                _denoiser_only(pipe, kind, files[i], hotswap=True)
                assert _near(compiled(**kind.inputs(text), return_dict=False)[0], want[i])
    assert not torch.allclose(want[0], want[1], atol=1e-2)


def _denoiser_only(pipe: Any, kind: Any, file: Path, hotswap: bool = False) -> None:
    getattr(pipe, kind.denoiser).load_lora_adapter(str(file), prefix=kind.denoiser, adapter_name="a", hotswap=hotswap, use_safetensors=True)


@KINDS
def test_training_through_diffusers_reaches_the_adapter_alone(kind: Any) -> None:
    pipe = kind.pipe()
    denoiser = getattr(pipe, kind.denoiser)
    before = copy.deepcopy(denoiser.state_dict())
    denoiser.requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=4, target_modules=kind.targets))
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    inputs = kind.inputs(_text_encoder()(WORDS).last_hidden_state.detach())
    losses = []
    for _ in range(12):
        loss = (denoiser(**inputs, return_dict=False)[0] - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    now = {k.replace(".base_layer", ""): v for k, v in denoiser.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(now[k], before[k]) for k in before)


def test_a_pipelines_module_names_undo_kohyas_underscores(tmp_path: Path) -> None:
    """A file without veneer's note, with the pipeline's folder and without."""
    from safetensors.torch import load_file, save_file

    from veneer.formats import FORMATS

    file, _ = _file(_Unet, tmp_path, "kohya")
    save_file(load_file(file), tmp_path / "bare.safetensors")
    pipe = _Unet.pipe()
    for name in ("unet", "text_encoder"):
        getattr(pipe, name).save_pretrained(tmp_path / "pipe" / name)
    pipe.save_config(tmp_path / "pipe")
    given = FORMATS["kohya"].read(tmp_path / "bare.safetensors", model=tmp_path / "pipe")
    guessed = FORMATS["kohya"].read(tmp_path / "bare.safetensors")
    paths = {c: set(part.layers) for c, part in given.items()}
    assert paths == {c: {p.removeprefix("text_model.") for p in part.layers} for c, part in guessed.items()}
    assert paths == {c: set(part.layers) for c, part in FORMATS["peft"].read(tmp_path / "peft").items()}


def test_after_deleting_the_acting_adapter_another_acts(tmp_path: Path) -> None:
    """As with PEFT, whose layers choose again; also where the adapters are not on the same layers."""
    narrow = type("N", (_Unet,), {"targets": ATTENTION})
    one, _ = _file(narrow, tmp_path / "one")
    two, want = _file(_Unet, tmp_path / "two", std=0.3)
    pipe = _Unet.pipe()
    start = _run(_Unet, pipe)
    pipe.load_lora_weights(one, adapter_name="one")
    pipe.load_lora_weights(two, adapter_name="two")
    pipe.set_adapters("one")
    with pytest.warns(UserWarning, match="Setting active adapter to two"):
        pipe.delete_adapters("one")
    assert pipe.get_active_adapters() == ["two"] and _near(_run(_Unet, pipe), want)
    pipe.delete_adapters("two")
    assert pipe.get_active_adapters() == [] and torch.equal(_run(_Unet, pipe), start)
    pipe.load_lora_weights(two, adapter_name="two")  # on layers that had chosen for themselves
    assert pipe.get_active_adapters() == ["two"] and _near(_run(_Unet, pipe), want)


def test_deleting_one_of_two_acting_adapters_leaves_the_other(tmp_path: Path) -> None:
    one, _ = _file(_Unet, tmp_path / "one")
    two, want = _file(_Unet, tmp_path / "two", std=0.3)
    pipe = _Unet.pipe()
    pipe.load_lora_weights(one, adapter_name="one")
    pipe.load_lora_weights(two, adapter_name="two")
    pipe.set_adapters(["one", "two"])
    pipe.delete_adapters("one")
    assert pipe.get_active_adapters() == ["two"] and _near(_run(_Unet, pipe), want)


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize("model", [False, True], ids=["by words", "by the pipeline"])
def test_kohyas_own_files_load_once_converted(to: str, model: bool, tmp_path: Path) -> None:
    """Without veneer's note, as kohya writes them: the text encoder's layers are at `text_model.` there, and not in transformers 5."""
    from safetensors.torch import load_file, save_file

    fields = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3}}
    file, want = _file(_Unet, tmp_path, "kohya", **fields)
    tensors = load_file(file)
    assert any(k.startswith("lora_te_text_model_encoder_layers_0_") for k in tensors)
    save_file(tensors, tmp_path / "bare.safetensors")
    pipe = _Unet.pipe()
    for name in ("unet", "text_encoder"):
        getattr(pipe, name).save_pretrained(tmp_path / "pipe" / name)
    pipe.save_config(tmp_path / "pipe")
    convert(tmp_path / "bare.safetensors", tmp_path / "out", to, model=tmp_path / "pipe" if model else None)
    if to == "diffusers":
        pipe.load_lora_weights(tmp_path / "out")
    else:
        for name in ("unet", "text_encoder"):
            setattr(pipe, name, PeftModel.from_pretrained(getattr(pipe, name), tmp_path / "out" / name).eval())
    assert _near(_run(_Unet, pipe), want)
