"""`python -m benchmarks [--quick] [--only lora,dora] [--out docs/benchmarks]`: tables on the screen, JSON and a picture in a folder."""

from __future__ import annotations

import dataclasses
import json
import platform
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import imports
from .models import Step, Token, adapted, decoder
from .timing import Ratio, interleaved

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 16}),
    "lora, dropout 0.1": ("LoraConfig", {"r": 16, "lora_dropout": 0.1}),
    "dora": ("LoraConfig", {"r": 16, "use_dora": True}),
    "vera": ("VeraConfig", {"r": 64}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "oft": ("OFTConfig", {"oft_block_size": 32}),
    "hra": ("HRAConfig", {"r": 8}),
    "loha": ("LoHaConfig", {"r": 8}),
    "fourierft": ("FourierFTConfig", {}),
}
LIBRARIES = ("veneer", "peft")


def measure(kind: Any, case: str, dtype: torch.dtype, rounds: int) -> dict[str, Ratio]:
    """The floor (nothing adapted, differentiated to the embeddings) and the case in both libraries."""
    config, fields = CASES[case]
    base = decoder(dtype)
    runs = {"floor": kind(base)}
    for library in LIBRARIES:
        runs[library] = kind(adapted(library, base, config, fields))
    return interleaved(runs, "floor", rounds)


def main(
    quick: Annotated[bool, typer.Option(help="Few rounds: a first impression.")] = False,
    only: Annotated[str | None, typer.Option(help="Cases to measure, with commas between.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for benchmarks.json and benchmarks.png.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Measure veneer beside PEFT; every figure is a ratio to the frozen model, the median over interleaved rounds with its quartiles."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    console = Console()
    cases = [c for c in CASES if only is None or c.partition(",")[0] in only.split(",")]
    rounds = 5 if quick else 15
    record: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "threads": threads}
    record["import_ms"] = {name: 1000 * imports.seconds(name, 3 if quick else 7) for name in LIBRARIES}
    console.print("import over torch: " + ", ".join(f"{k} {v:.0f} ms" for k, v in record["import_ms"].items()))
    for title, kind in (("training step", Step), ("one-token forward", Token)):
        table = Table(title=f"{title}, times the frozen model's")
        for column in ("case", "dtype", *LIBRARIES):
            table.add_column(column)
        rows = []
        for case in cases:
            for dtype in (torch.bfloat16, torch.float32):
                found = measure(kind, case, dtype, rounds if kind is Step else 4 * rounds)
                rows.append({"case": case, "dtype": str(dtype), **{k: dataclasses.asdict(v) for k, v in found.items()}})
                cells = [f"{found[n].median:.2f} ({found[n].low:.2f}-{found[n].high:.2f})" for n in LIBRARIES]
                table.add_row(case, str(dtype).removeprefix("torch."), *cells)
        console.print(table)
        record[title] = rows
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "benchmarks.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        _picture(record, out / "benchmarks.png")


def _picture(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = record["training step"]
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(rows) + 1))
    labels = [f"{r['case']}, {r['dtype'].removeprefix('torch.')}" for r in rows]
    for offset, (name, color) in enumerate((("veneer", "#2a6f97"), ("peft", "#bbbbbb"))):
        at = [i + 0.4 * offset for i in range(len(rows))]
        axes.barh(at, [r[name]["median"] for r in rows], height=0.38, color=color, label=name)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([i + 0.2 for i in range(len(rows))], labels)
    axes.invert_yaxis()
    axes.set_xlabel("training step, times the frozen model's")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
