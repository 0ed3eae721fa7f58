"""`python -m benchmarks.page`: docs/benchmarks.md from the runs in docs/benchmarks, so that no figure is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .cases import AIMS, TOKEN_AIMS

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
PAGE = FOLDER.with_suffix(".md")


def text() -> str:
    """The page."""
    files = [f for f in FOLDER.glob("*.json") if f.stem.partition("-")[0].isdigit()]  # `768.json`; of a further machine `768-without.json`
    runs = [(f.stem.partition("-")[2], json.loads(f.read_text(encoding="utf-8"))) for f in files]
    parts = [
        "# Measured",
        "Written by `python -m benchmarks.page` from the runs in `docs/benchmarks` (`python -m benchmarks --out docs/benchmarks/768.json`). A figure is the "
        "median of ratios to the frozen model, taken in turn in one run; in brackets the quartiles. *aim*: what was set out to be reached. Why each "
        "figure is what it is: [performance.md](performance.md).",
        "![training steps](benchmarks/768.png)",
    ]
    for further, run in sorted(runs, key=lambda r: (r[0], r[1]["hidden"])):
        parts += _run(run, ", a processor without 16-bit products" if further else "")
    if (FOLDER / "compiled.json").is_file():
        parts += _compiled(json.loads((FOLDER / "compiled.json").read_text(encoding="utf-8")))
    if (FOLDER / "train.json").is_file():
        parts += _train(json.loads((FOLDER / "train.json").read_text(encoding="utf-8")))
    return "\n\n".join(parts) + "\n"


def _compiled(run: dict[str, Any]) -> list[str]:
    """What `python -m benchmarks --parts compiled` found."""
    return [
        "## Compiled",
        f"`torch.compile` (inductor) of the frozen model and of both adapted ones, torch {run['torch']}, {run['machine']}, {run['threads']} thread(s), "
        f"{run['layers']} layer(s) of a Llama, hidden {run['hidden']}. A training step, 4 x 160 tokens, over the compiled frozen model's:",
        _ratios(run["compiled step"], {}),
        "One token without gradients:",
        _ratios(run["compiled token"], {}),
    ]


def _train(run: dict[str, Any]) -> list[str]:
    """What `python -m benchmarks.train` found."""
    rows, quality, each = run["start"], run["quality"], [run[n] for n in ("veneer", "peft", "peft_flat", "floor")]
    return [
        "## End to end",
        f"SmolLM2-135M in bfloat16, LoRA r = 16 on all seven projections, {run['steps']} steps of 4 rows, {run['threads']} thread(s), torch "
        f"{run['torch']}: questions and answers cut from Python's documentation. Both have the same rows in the same order, the same start and the same "
        "rate. PEFT runs under transformers' Trainer, and pads each batch to its longest row or, without padding, takes `DataCollatorWithFlattening`; veneer "
        "lays the rows end to end (`packing: rows`), attends to each by itself and multiplies by the vocabulary only for answers.",
        f"{rows['rows']} rows of {rows['shortest']} to {rows['longest']} tokens, {rows['tokens']:,} in all, {rows['padded']:,} with padding, "
        f"{rows['answers']:,} of answers.",
        _table(
            ["", "veneer", "PEFT", "PEFT without padding", "frozen model, veneer's rows"],
            [
                ["seconds of the process's own time", *(f"{r['cpu_seconds']:.1f}" for r in each)],
                ["seconds", *(f"{r['seconds']:.1f}" for r in each)],
                ["tokens without padding per second of its own time", *(f"{rows['tokens'] / r['cpu_seconds']:.0f}" for r in each)],
                ["memory added by training, MB", *(f"{r['added_mb']:,.0f}" for r in each)],
                ["peak of the process, MB", *(f"{r['peak_mb']:,.0f}" for r in each)],
                [
                    f"held-out perplexity, {quality['start']:.2f} at the start",
                    *(f"{quality[n]:.2f}" for n in ("veneer", "peft", "peft_flat")),
                    "",
                ],
            ],
        ),
    ]


def _run(run: dict[str, Any], where: str) -> list[str]:
    out = [
        f"## Hidden {run['hidden']}{where}",
        f"torch {run['torch']}, {run['machine']}, {run['threads']} thread(s), {run['layers']} layer(s) of a Llama.",
    ]
    if run.get("step"):
        out += ["A training step, 4 x 160 tokens, over the frozen model's:", _ratios(run["step"], AIMS)]
        if whole := [f"{_said(r['full'])} in {r['dtype']}" for r in run["step"] if "full" in r]:
            out.append(f"With those weights themselves training, and no adapter: {', '.join(whole)}.")
    if run.get("token"):
        out += ["One token without gradients:", _ratios(run["token"], TOKEN_AIMS)]
    if run.get("mixed"):
        out += [
            "16 rows of 8 tokens, each with one of so many LoRA adapters:",
            _ratios(run["mixed"], {"1 adapters": (1.25, None), "16 adapters": (1.6, None)}),
        ]
    if run.get("merge"):
        out += ["Merging and unmerging, over two passes over the weights:", _ratios(run["merge"], {})]
    if run.get("memory"):
        rows = [[f"{r['case']}, {r['dtype']}", *(f"{r[n] / r['floor']:.2f}" for n in ("veneer", "peft"))] for r in run["memory"]]
        out += ["Peak memory of a step over what was there before, times the frozen model's:", _table(["", "veneer", "PEFT"], rows)]
    if run.get("attach"):
        found = run["attach"]
        rows = [[what, *(f"{found[n][what]:.2f}" for n in ("veneer", "peft"))] for what in found["veneer"]]
        out += [
            "Milliseconds to attach LoRA to 28 linears (the first adapters, the last of 60), to switch, and to attach to 1,000 linears:",
            _table(["", "veneer", "PEFT"], rows),
        ]
    if run.get("import_ms"):
        out.append("Import over torch's: " + ", ".join(f"{k} {v:.0f} ms" for k, v in run["import_ms"].items()) + ".")
    return out


def _ratios(rows: list[dict[str, Any]], aims: dict[str, tuple[float | None, float | None]]) -> str:
    lines = []
    for r in rows:
        aim = aims.get(r["case"], (None, None))[r["dtype"] == "float32"]
        lines.append([f"{r['case']}, {r['dtype']}", *(_said(r.get(n)) for n in ("veneer", "peft")), "" if aim is None else f"{aim:.2f}"])
    return _table(["", "veneer", "PEFT", "aim"], lines)


def _said(r: dict[str, float] | None) -> str:
    return "fails" if r is None else f"{r['median']:.2f} ({r['low']:.2f}–{r['high']:.2f})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
