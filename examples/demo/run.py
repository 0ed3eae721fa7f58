"""`make demo`: SmolLM2-135M-Instruct learns Python's own documentation. Perplexity before and after, a sample of each, the adapter."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import assets
import torch

HELD_OUT = 12
PROMPT = "The for statement"


def topics(folder: Path) -> tuple[Path, Path]:
    """Python's documentation topics as (training, held-out) files; every sixth topic is held out, twelve in all."""
    from pydoc_data.topics import topics as found

    names = sorted(found)
    held = names[::6][:HELD_OUT]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, chosen in (("train", [n for n in names if n not in held]), ("held_out", held)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": found[n]}) + "\n" for n in chosen), encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]


@torch.no_grad()
def sample(model: torch.nn.Module, tokenizer: object) -> str:
    """What the model says after the prompt, greedily."""
    ids = tokenizer(PROMPT, return_tensors="pt")  # type: ignore[operator]
    out = model.generate(**ids, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)  # type: ignore[operator]
    return str(tokenizer.decode(out[0], skip_special_tokens=True))  # type: ignore[attr-defined]


def main() -> None:
    """Fetch, train, show."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import veneer
    from veneer.cli.train import run

    model = assets.smollm2()
    train, held_out = topics(assets.CACHE / "topics")
    out = Path(__file__).resolve().parents[2] / "runs" / "demo"
    shutil.rmtree(out, ignore_errors=True)
    record = run(
        None,
        {
            "model": str(model), "data": str(train), "eval_data": str(held_out), "out": str(out), "method": "lora", "method_fields": {"r": 8},
            "steps": 40, "batch_size": 8, "length": 64, "learning_rate": 2e-3, "dtype": "float32", "schedule": "cosine",
        },
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    print(f"\nbefore: {sample(base, tokenizer)!r}")
    tuned = veneer.PeftModel.from_pretrained(base, out)
    print(f"after:  {sample(tuned, tokenizer)!r}")
    before, after = record["before"]["perplexity"], record["after"]["perplexity"]
    print(f"\nheld-out perplexity {before:.1f} -> {after:.1f} in {record['seconds']:.0f} s; the adapter is in {out}")


if __name__ == "__main__":
    main()
