"""`veneer plan`: what a run would be, before anything trains."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.panel import Panel
from rich.table import Table

from ..errors import PeftError
from .say import aside, on_stdout, refuse
from .train import method_fields, options


def plan(
    context: typer.Context,
    config: Annotated[str | None, typer.Option(help="A YAML recipe, an adapter_config.json, or an adapter's folder.")] = None,
    model: Annotated[str | None, typer.Option(help="The model: a folder or a name on the Hub; its config is enough.")] = None,
    data: Annotated[str | None, typer.Option(help="Data to check as well.")] = None,
    task: Annotated[str | None, typer.Option(help="causal-lm or sequence-classification.")] = None,
    method: Annotated[str | None, typer.Option(help="lora or another method; its fields are options too: --r 8.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches per optimizer step.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per row.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the frozen weights.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Pack the frozen weights: nf4, int8 ...")] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help="Trade time for memory.")] = None,
    every_module: Annotated[bool, typer.Option("--all", help="Show every module by itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Before anything trains: each module hit and missed and why, parameters, work, memory, and every problem at once."""
    given = {k: v for k, v in locals().items() if k not in ("context", "config", "every_module", "as_json")}
    words = list(context.args)
    if config is None and words and not words[0].startswith("--"):  # as `veneer train` takes a recipe
        config = words.pop(0)
    try:
        fields = method_fields(words)
        given |= {name: fields.pop(word) for word, name in options().items() if word in fields}
        with aside():
            found = run(config, {**given, "method_fields": fields})
    except PeftError as e:
        refuse("plan", e)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, default=str))
    else:
        _show(found, every_module)
    if not found.ok:
        raise typer.Exit(2)


def run(path: str | None, given: dict[str, Any]) -> Any:
    """The plan of a recipe."""
    import warnings

    warnings.filterwarnings("ignore", module="transformers")
    from ..training.forecast import forecast, read_config

    return forecast(read_config(path, given))


def _show(found: Any, every_module: bool) -> None:
    out = on_stdout()
    hit = Table(title=f"{found.method}: hit", title_justify="left")
    for column in ("module", "kind", "weight", "rank", "layers", "trained parameters"):
        hit.add_column(column, justify="left" if column in ("module", "kind") else "right")
    rows: dict[Any, list[Any]] = {}
    for name, h in found.hits.items():
        key = (name if every_module else name.rpartition(".")[2], h.kind, h.shape, h.rank)
        rows.setdefault(key, []).append(h.parameters)
    for (name, kind, shape, rank), sizes in rows.items():
        hit.add_row(name, kind, "x".join(map(str, shape)), str(rank or ""), str(len(sizes)), f"{sum(sizes):,}")
    for name in found.whole:
        hit.add_row(f"{name} (whole)", "", "", "", "", "")
    out.print(hit)
    missed = Table(title="missed", title_justify="left")
    for column in ("module", "layers", "why"):
        missed.add_column(column)
    reasons: dict[tuple[str, str], int] = {}
    for name, why in found.missed.items():
        pair = (name if every_module else name.rpartition(".")[2], why)
        reasons[pair] = reasons.get(pair, 0) + 1
    for (name, why), count in reasons.items():
        missed.add_row(name, str(count), why)
    if reasons:
        out.print(missed)
    lines = []
    if found.all_parameters:
        share = found.trainable_parameters / found.all_parameters
        lines.append(f"{found.trainable_parameters:,} of {found.all_parameters:,} parameters train ({share:.2%})")
    lines += [f"{k}: {v / 2**20:,.1f} MiB" for k, v in found.memory.items()]
    lines += [f"{k}: {v / 1e9:,.1f} GFLOP" for k, v in found.flops.items()]
    lines += [f"note: {n}" for n in found.notes]
    out.print("\n".join(lines), highlight=False)
    if found.problems:
        text = "\n".join(f"{i}. {p}" for i, p in enumerate(found.problems, 1))
        out.print(Panel(text, title=f"{len(found.problems)} problems", border_style="red"))
