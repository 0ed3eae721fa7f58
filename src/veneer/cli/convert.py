"""`veneer convert`: an adapter in another format."""

from __future__ import annotations

from typing import Annotated

import typer

from .say import aside


def convert(
    source: Annotated[str, typer.Argument(help="The adapter: a folder of PEFT or MLX, a .safetensors of kohya or diffusers, a .gguf.")],
    out: Annotated[str, typer.Argument(help="The file or folder to write.")],
    to: Annotated[str, typer.Option("--to", help="peft, kohya, diffusers, gguf or mlx.")],
    model: Annotated[
        str | None, typer.Option(help="The base model's folder: needed for GGUF, and for kohya's names where they are ambiguous.")
    ] = None,
    component: Annotated[str | None, typer.Option(help="unet, transformer, text_encoder or text_encoder_2.")] = None,
    rank: Annotated[int | None, typer.Option(help="Pad every layer to this rank with zeros; the change stays the same.")] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="One rank and one alpha in all layers; what differs goes into B.")] = False,
) -> None:
    """Write an adapter in another library's format, and say what is not as it was."""
    from ..errors import PeftError
    from ..formats import convert as run

    try:
        with aside():
            made = run(source, out, to, model=model, component=component, rank=rank, uniform=uniform)
    except (PeftError, ImportError) as e:
        typer.echo(f"veneer convert: {e}", err=True)
        raise typer.Exit(2) from None
    layers = ", ".join(f"{n} layers{f' of {c}' if c else ''}" for c, n in made.layers.items())
    typer.echo(f"{made.source} -> {made.to}: {layers}, in {out}")
    for note in made.notes or ["Nothing was rounded or left out: the way back gives the same bits."]:
        typer.echo(f"  {note}")
