"""`veneer check`: what a runtime can serve, before and after training."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from .say import aside


def check(
    context: typer.Context,
    adapter: Annotated[
        str | None, typer.Argument(help="The trained adapter; before training, give --method and its fields instead.")
    ] = None,
    runtime: Annotated[str, typer.Option(help="vllm, llama.cpp, diffusers or mlx.")] = "vllm",
    method: Annotated[str | None, typer.Option(help="lora or another method; its fields are options too: --r 24 --use-dora.")] = None,
    max_rank: Annotated[int | None, typer.Option(help="The runtime's own limit, such as vLLM's --max-lora-rank.")] = None,
    model_type: Annotated[str | None, typer.Option(help="The base model's type, as its config.json has it.")] = None,
) -> None:
    """Say what a runtime can't serve of an adapter and what to change; the exit code is 1 then."""
    from ..config import PeftConfig
    from ..errors import ConfigError, PeftError, hint
    from ..formats import check as run
    from ..method import config_class
    from .train import method_fields

    words = [*([adapter] if adapter else []), *context.args]  # an option that typer does not know is taken for the adapter
    path = words.pop(0) if words and not words[0].startswith("--") else None
    try:
        fields = method_fields(words)
        if (path is None) == (method is None):
            raise ConfigError("Give an adapter's folder or file, or else --method with its fields, and not both.")
        if path is not None and fields:
            raise ConfigError(f"Fields such as --{next(iter(fields))} go with --method; {path!r} has a config of its own.")
        kind = str(method).upper().replace("-", "_")
        known = [f.name for f in dataclasses.fields(config_class(kind)) if f.init] if path is None else []
        for name in fields:
            if name not in known:
                raise ConfigError(f"--method {method} has no field {name!r}.{hint(name, known)}")
        asked = path if path is not None else PeftConfig.from_peft_type(peft_type=kind, **fields)
        with aside():
            findings = run(asked, runtime, max_rank=max_rank, model_type=model_type)
    except (PeftError, ValueError, ImportError) as e:
        typer.echo(f"veneer check: {e}", err=True)
        raise typer.Exit(2) from None
    if not findings:
        typer.echo(f"{runtime} serves it.")
        return
    for finding in findings:
        typer.echo(f"{runtime}: {finding.what}\n  {finding.change}")
    raise typer.Exit(1)
