"""MiniLM learns to tell which of 25 classes a WordNet gloss belongs to: accuracy before and after, through `veneer train`."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import assets

TRAIN, HELD_OUT = 4000, 2000


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    """The rows as jsonl with the columns text and label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows), encoding="utf-8")
    return str(path)


def main() -> None:
    """Fetch, train, show."""
    from veneer.cli.train import run

    rows = assets.wordnet_glosses()
    random.Random(0).shuffle(rows)
    folder = assets.CACHE / "glosses"
    out = Path(__file__).resolve().parents[2] / "runs" / "text_classification"
    shutil.rmtree(out, ignore_errors=True)
    record = run(
        None,
        {
            "model": str(assets.minilm()), "task": "sequence-classification", "out": str(out),
            "data": write(folder / "train.jsonl", rows[:TRAIN]), "eval_data": write(folder / "held_out.jsonl", rows[TRAIN : TRAIN + HELD_OUT]),
            "method": "lora", "method_fields": {"r": 8, "lora_alpha": 16},
            "epochs": 1, "batch_size": 32, "length": 40, "learning_rate": 2e-3, "dtype": "float32",
        },
    )  # fmt: skip
    before, after = record["before"]["accuracy"], record["after"]["accuracy"]
    print(f"\nheld-out accuracy {before:.1%} -> {after:.1%} in {record['seconds']:.0f} s; the adapter is in {out}")


if __name__ == "__main__":
    main()
