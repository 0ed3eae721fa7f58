"""`veneer inspect`: what is in an adapter's folder or file."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.panel import Panel
from rich.table import Table

from ..errors import ConfigError, PeftError
from .say import aside, on_stdout, refuse


def inspect(
    path: Annotated[str, typer.Argument(help="An adapter's folder, or a file of tensors.")],
    model: Annotated[str | None, typer.Option(help="The base model's folder or name: then ΔW of every method is measured.")] = None,
    picture: Annotated[str | None, typer.Option(help="Draw the spectra into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Method, base, ranks, norms and spectra of each layer, and what is wrong."""
    from ..planning.inspection import inspect_adapter

    try:
        with aside():
            found = inspect_adapter(path, _base(model, path) if model is not None else None)
            if picture is not None:
                found.picture(picture)
    except PeftError as e:
        refuse("inspect", e)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, default=str))
    else:
        _show(found)
    if not found.ok:
        raise typer.Exit(2)


def _base(name: str, path: str) -> Any:
    from pathlib import Path

    import transformers

    from ..training.recipe import TASKS

    try:
        task = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8-sig"))["task_type"]
    except (OSError, ValueError, LookupError, TypeError):  # the inspection tells of a damaged one
        task = None
    auto: Any = {
        TASKS["causal-lm"]: transformers.AutoModelForCausalLM, TASKS["sequence-classification"]: transformers.AutoModelForSequenceClassification,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM, "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    }.get(str(task), transformers.AutoModel)  # fmt: skip
    try:
        return auto.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise ConfigError(f"--model {name!r} cannot be loaded: {(str(e).strip().splitlines() or [''])[0]}") from e


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"


def _show(found: Any) -> None:
    out = on_stdout()
    lines = [f"{found.method} on {found.base or 'an unknown base model'}"]
    lines.append(
        f"{found.parameters:,} numbers in {len(found.layers)} layers, {found.bytes / 2**20:,.1f} MiB, {', '.join(found.dtypes) or 'no tensors'}"
    )
    if found.ranks:
        lines.append("ranks: " + ", ".join(f"{r} on {n} layers" for r, n in found.ranks.items()))
    lines += [f"{k}: {v!r}" for k, v in found.config.items()]
    out.print("\n".join(lines), highlight=False)
    table = Table("layer", "rank", "‖ΔW‖", "σ₁", "effective rank", "spectrum", "norms of the tensors")
    for name, v in found.layers.items():
        norms = ", ".join(f"{n.removesuffix('.weight')} {x:.3g}" for n, x in v.norms.items())
        table.add_row(
            name,
            str(v.rank or ""),
            _number(v.delta),
            _number(v.singular[0] if v.singular else None),
            _number(v.effective_rank),
            _bars(v.singular),
            norms,
        )
    if found.layers:
        out.print(table)
    for n in found.notes:
        out.print(f"note: {n}", highlight=False)
    if found.problems:
        text = "\n".join(f"{i}. {'' if p.fatal else 'suspicious: '}{p}" for i, p in enumerate(found.problems, 1))
        out.print(Panel(text, title=f"{len(found.problems)} problems", border_style="red" if not found.ok else "yellow"))


def _bars(s: list[float], width: int = 16) -> str:
    """The first singular values as bars, the largest one full."""
    top = s[0] if s and s[0] > 0 else 0.0
    return "".join("▁▂▃▄▅▆▇█"[min(int(x / top * 7.999), 7)] for x in s[:width]) if top else ""
