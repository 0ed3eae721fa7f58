"""`python -m benchmarks [--quick] [--only lora,dora] [--parts step,token] [--out docs/benchmarks/768.json]`: tables, a file, a picture."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import adapters, imports
from .cases import COMPILED, MEMORY, MERGES, MIXED, STEPS, TOKENS
from .memory import peak
from .models import Merge, Mixed, Step, Token, adapted, decoder, trained_whole
from .timing import Ratio, interleaved

LIBRARIES = ("veneer", "peft")
DTYPES = (torch.bfloat16, torch.float32)
PARTS = ("step", "token", "mixed", "merge", "memory", "attach", "import", "compiled")


class Bench:
    """One run: what to measure, how often, and what was found so far."""

    def __init__(self, console: Console, only: list[str] | None, rounds: int, hidden: int, layers: int, clock: Any) -> None:
        self.console, self.only, self.rounds, self.hidden, self.layers, self.clock = console, only, rounds, hidden, layers, clock
        self.record: dict[str, Any] = {"torch": torch.__version__, "machine": _processor()}
        self.record |= {"threads": torch.get_num_threads(), "hidden": hidden, "layers": layers}

    def cases(self, names: Any) -> list[str]:
        return [c for c in names if self.only is None or c.partition(",")[0] in self.only]

    def ratios(self, part: str, title: str, names: Any, kind: Any, rounds: int, dtypes: Any = DTYPES) -> None:
        """A table of a case a line: the floor (nothing adapted, for a step differentiated to the embeddings) and both libraries, taking turns."""
        rows = []
        for case in self.cases(names):
            config, fields = STEPS[case]
            for dtype in dtypes:
                base = decoder(dtype, self.hidden, self.layers)
                runs = {"floor": kind(base)}
                for library in LIBRARIES:
                    try:
                        runs[library] = kind(adapted(library, base, config, fields))
                    except Exception as e:  # one library that cannot is a finding, not the end of the run
                        self.console.print(f"{case}, {dtype}: {library} fails: {type(e).__name__}: {e}"[:300])
                if kind is Step and case == "lora":
                    runs["full"] = kind(trained_whole(base))
                found = interleaved(runs, "floor", rounds, clock=self.clock)
                rows.append({"case": case, "dtype": _short(dtype), **{k: dataclasses.asdict(v) for k, v in found.items()}})
                self.console.print(
                    f"{part:6} {case:18} {_short(dtype):8} " + "  ".join(f"{n} {_said(found[n])}" for n in found if n != "floor")
                )
                del runs
                gc.collect()
        self.record[part] = rows
        self._table(title, rows)

    def mixed(self) -> None:
        """A batch whose rows have different adapters."""
        rows = []
        for k in MIXED:
            base = decoder(torch.bfloat16, self.hidden, self.layers)
            runs = {"floor": Mixed(None, base)} | {n: Mixed(n, base, k) for n in LIBRARIES}
            found = interleaved(runs, "floor", 2 * self.rounds, clock=self.clock)
            rows.append({"case": f"{k} adapters", "dtype": "bfloat16", **{n: dataclasses.asdict(v) for n, v in found.items()}})
        self.record["mixed"] = rows
        self._table("16 rows of 8 tokens, each with one of K LoRA adapters, times the frozen model's", rows)

    def memory(self) -> None:
        """Peak memory that a step adds."""
        rows = []
        for case in self.cases(MEMORY):
            for dtype in DTYPES:
                base = decoder(dtype, self.hidden, self.layers)
                floor = peak(Step(base))
                held = {n: peak(Step(adapted(n, base, *STEPS[case]))) for n in LIBRARIES}
                rows.append({"case": case, "dtype": _short(dtype), "floor": floor, **held})
        table = Table("case", "dtype", "floor, MB", *LIBRARIES, title="peak memory added by one step, times the frozen model's")
        for r in rows:
            table.add_row(r["case"], r["dtype"], f"{r['floor'] / 1e6:.0f}", *(f"{r[n] / r['floor']:.2f}" for n in LIBRARIES))
        self.console.print(table)
        self.record["memory"] = rows

    def attach(self) -> None:
        """Many adapters."""
        found = {n: adapters.attaching(n, self.clock) | {"thousand linears": adapters.thousand(n, self.clock)} for n in LIBRARIES}
        table = Table("ms", *LIBRARIES, title="attaching LoRAs to 28 linears: the first, the sixtieth; switching; one on 1,000 linears")
        for what in found["veneer"]:
            table.add_row(what, *(f"{found[n][what]:.2f}" for n in LIBRARIES))
        self.console.print(table)
        self.record["attach"] = found

    def compiled(self) -> None:
        """LoRA with everything compiled by inductor, the frozen model too."""
        for part, kind, rounds in (("step", Step, self.rounds), ("token", Token, 20 * self.rounds)):
            torch._dynamo.reset()  # what was compiled for another part is not to be looked through
            title = f"compiled: {part}, times the compiled frozen model's"
            self.ratios(f"compiled {part}", title, COMPILED, lambda m, k=kind: k(torch.compile(m)), rounds, DTYPES[:1])

    def imports(self) -> None:
        """What an import costs over torch's."""
        self.record["import_ms"] = found = {n: 1000 * imports.seconds(n, 3) for n in LIBRARIES}
        self.console.print("import over torch: " + ", ".join(f"{k} {v:.0f} ms" for k, v in found.items()))

    def _table(self, title: str, rows: list[dict[str, Any]]) -> None:
        table = Table("case", "dtype", *LIBRARIES, title=title)
        for r in rows:
            table.add_row(r["case"], r["dtype"], *(_said(Ratio(**r[n]) if n in r else None) for n in LIBRARIES))
        self.console.print(table)


def _processor() -> str:
    """The processor's name where the system tells it, and what the library of products may use of it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"{name} (ONEDNN_MAX_CPU_ISA={limit})" if limit else name


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _said(r: Ratio | None) -> str:
    return "–" if r is None else f"{r.median:.2f} ({r.low:.2f}–{r.high:.2f})"


def main(
    quick: Annotated[bool, typer.Option(help="Few rounds: a first impression.")] = False,
    only: Annotated[str | None, typer.Option(help="Cases to measure, with commas between.")] = None,
    parts: Annotated[str, typer.Option(help="Tables to measure, with commas between.")] = ",".join(PARTS[:-1]),
    out: Annotated[
        Path | None, typer.Option(help="The file for the figures (.json); a picture of the steps goes beside it (.png).")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 768,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 2,
    shared: Annotated[bool, typer.Option(help="The machine is used by others: one thread, and the process's own time.")] = False,
) -> None:
    """Measure veneer beside PEFT; every figure is a ratio to the frozen model, the median over interleaved rounds with its quartiles."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1 if shared else threads)
    clock = time.process_time if shared else time.perf_counter
    bench = Bench(Console(width=120), only.split(",") if only else None, 5 if quick else 15, hidden, layers, clock)
    wanted = parts.split(",")
    if unknown := [p for p in wanted if p not in PARTS]:
        raise typer.BadParameter(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if "step" in wanted:
        bench.ratios("step", "training step, times the frozen model's", STEPS, Step, bench.rounds)
    if "token" in wanted:
        bench.ratios("token", "one-token forward without gradients, times the frozen model's", TOKENS, Token, 20 * bench.rounds)
    if "merge" in wanted:
        bench.ratios("merge", "merging and unmerging, times two passes over the weights", MERGES, Merge, bench.rounds)
    others = {"mixed": bench.mixed, "memory": bench.memory, "attach": bench.attach, "import": bench.imports, "compiled": bench.compiled}
    for name, run in others.items():
        if name in wanted:
            run()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(bench.record, indent=1), encoding="utf-8")
        if bench.record.get("step"):
            _picture(bench.record["step"], out.with_suffix(".png"))


def _picture(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.35 * len(rows) + 1))
    labels = [f"{r['case']}, {r['dtype']}" for r in rows]
    for offset, (name, color) in enumerate((("veneer", "#2a6f97"), ("peft", "#bbbbbb"))):
        at = [i + 0.4 * offset for i in range(len(rows))]
        axes.barh(at, [r[name]["median"] if name in r else 0 for r in rows], height=0.38, color=color, label=name)
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
