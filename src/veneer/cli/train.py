"""`veneer train`: fine-tune a model on data, and show what is happening."""

from __future__ import annotations

import inspect
import math
import os
import signal
import sys
import threading
import time
import warnings
from typing import Annotated, Any

import typer
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import ConfigError, PeftError
from ..training.processes import is_first, processes
from .say import on_stderr, refuse

_console = on_stderr(quiet=not is_first())  # of several processes one speaks


def train(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(help="A YAML file with any of the options below.")] = None,
    model: Annotated[str | None, typer.Option(help="The model: a folder or a name on the Hub.")] = None,
    data: Annotated[str | None, typer.Option(help="jsonl, csv, parquet, text, a folder of those, or a name on the Hub.")] = None,
    out: Annotated[str | None, typer.Option(help="The folder for the adapter, the record and the loss picture.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Data to evaluate on.")] = None,
    eval_fraction: Annotated[float | None, typer.Option(help="Share of the data held out if there is no --eval-data.")] = None,
    task: Annotated[str | None, typer.Option(help="causal-lm or sequence-classification.")] = None,
    method: Annotated[str | None, typer.Option(help="lora or another method; its fields are options too: --r 8 --lora-alpha 16.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; else --epochs.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step and process.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches whose gradients are added up per step.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per row.")] = None,
    packing: Annotated[str | None, typer.Option(help="stream: text cut into full rows; rows: rows apart, without padding.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Of AdamW.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps in which the rate rises.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, cosine, constant ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the frozen weights: auto, float32, bfloat16, float16.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Pack the frozen weights: nf4, fp4, int8, torchao-int8, quanto-int4 ...")] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help="Trade time for memory.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    resume: Annotated[bool | None, typer.Option(help="Go on from the last checkpoint in --out.")] = None,
    resume_anyway: Annotated[
        bool | None, typer.Option(help="With --resume: also with other data or settings than it was started with.")
    ] = None,
) -> None:
    """Fine-tune a model on data. Fields of the method's config are options as well."""
    given = {k: v for k, v in locals().items() if k not in ("context", "recipe")}
    words = [*([recipe] if recipe else []), *context.args]  # an option that typer does not know is taken for the recipe
    path = words.pop(0) if words and not words[0].startswith("--") else None
    try:
        run(path, {**given, "method_fields": method_fields(words)})
    except (PeftError, KeyboardInterrupt) as e:
        if isinstance(e, KeyboardInterrupt):
            _console.print("Interrupted. What was saved stays; run the same command with --resume to go on.", style="yellow")
            raise typer.Exit(130) from None
        refuse("train", e, _console)


def method_fields(words: list[str]) -> dict[str, Any]:
    """`--r 8 --use-dora --target-modules q_proj,v_proj` as fields.

    Raises:
        ConfigError: for a word that is no option.
    """
    import yaml

    fields: dict[str, Any] = {}
    i = 0
    while i < len(words):
        if not words[i].startswith("--"):
            raise ConfigError(f"What is {words[i]!r} for? Fields of the method are given as --name value.")
        name, has, value = words[i][2:].partition("=")
        if not has and i + 1 < len(words) and not words[i + 1].startswith("--"):
            i += 1
            has, value = "=", words[i]
        try:
            fields[name.replace("-", "_")] = yaml.safe_load(value) if has else True
        except yaml.YAMLError:  # a regular expression, such as [qv]_proj
            fields[name.replace("-", "_")] = value
        i += 1
    return fields


def options() -> dict[str, str]:
    """The options of `veneer train` as they are written, with _ for -, and the fields of a recipe that they give."""
    names = [name for name in inspect.signature(train).parameters if name not in ("context", "recipe")]
    return {"lr": "learning_rate", **{name: name for name in names}}


def run(path: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Run a recipe and return its record."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module="transformers")
    if not is_first():
        warnings.filterwarnings("ignore")
    import torch
    from transformers.utils import logging

    from ..training.prepare import prepare
    from ..training.recipe import read_recipe
    from ..training.record import evaluate, finish, new_record, peak_memory
    from ..training.resume import check_resumed, ended, forget_after, losses_of
    from ..training.trainer import make_trainer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    recipe = read_recipe(path, given)
    recipe.check()
    checkpoint, at = _checkpoint(recipe) if recipe.resume else (None, 0)
    prepared = prepare(recipe)
    record = new_record(prepared, recipe)
    steps = record["plan"]["steps"]
    if at > steps or at == steps == ended(recipe):
        raise ConfigError(f"--resume: {checkpoint!r} is {at} steps on, and the recipe asks for {steps}. Give more --steps to train on.")
    if checkpoint is not None:
        check_resumed(prepared, recipe, checkpoint)
        record["losses"], record["resumed_at"] = losses_of(checkpoint), at
    forget_after(recipe, at)
    watcher = _watcher(record)
    trainer = watcher.trainer = make_trainer(prepared, recipe, [watcher])
    first = trainer.is_world_process_zero()
    if first:
        _show(record, recipe)
    record["before"] = evaluate(trainer, recipe)
    started = time.perf_counter()
    with watcher.shown(first):
        if at < steps:
            with watcher.ending_steps():
                trainer.train(resume_from_checkpoint=checkpoint)
        else:  # it was cut off between its last step and its end
            trainer._load_from_checkpoint(checkpoint)
    record["seconds"] = time.perf_counter() - started
    record["after"] = evaluate(trainer, recipe)
    record["tokens_per_second"] = trainer.tokens / max(record["seconds"], 1e-9)
    record["peak_memory"] = peak_memory()
    if first:
        finish(prepared, recipe, record, trainer.steering)
        _report(record, recipe)
    trainer.accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return record


def _checkpoint(recipe: Any) -> tuple[str, int]:
    """The last checkpoint that is whole, and its step."""
    found = recipe.checkpoint()
    if found is None:
        folder = os.path.join(recipe.out, "checkpoints")
        raise ConfigError(f"--resume: there is no checkpoint in {folder!r}. Leave --resume out to start anew, and save with --save-every.")
    return str(found[0]), found[1]


def _watcher(record: dict[str, Any]) -> Any:
    from contextlib import contextmanager

    import transformers

    class Watcher(transformers.TrainerCallback):  # type: ignore[misc]
        """Keeps the losses and moves the bar."""

        def __init__(self) -> None:
            self.bar: Progress | None = None
            self.task: Any = None
            self.trainer: Any = None
            self.since = time.perf_counter()
            self.interrupted = False

        @contextmanager
        def shown(self, show: bool) -> Any:
            if not show:
                yield
                return
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            with Progress(*columns, console=_console) as self.bar:
                self.task = self.bar.add_task("", total=None)
                yield

        @contextmanager
        def ending_steps(self) -> Any:
            """Within the block, Ctrl-C ends the training with the step under way, and a checkpoint of it: what the midst of a step leaves is none to go on
            from. Again, it ends at once, as it does on several processes, which may not all have come as far."""
            before = signal.getsignal(signal.SIGINT)
            if processes() > 1 or threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
                yield
                return

            def first(*_: Any) -> None:
                self.interrupted = True
                signal.signal(signal.SIGINT, before)
                _console.print("Interrupted. The step is brought to its end and saved; Ctrl-C again ends at once.", style="yellow")

            signal.signal(signal.SIGINT, first)
            try:
                yield
            finally:
                signal.signal(signal.SIGINT, before)
            if self.interrupted:
                raise KeyboardInterrupt

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.interrupted:
                control.should_save = control.should_training_stop = True

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.since = time.perf_counter()
            if self.bar is not None:
                self.bar.update(self.task, total=state.max_steps, completed=state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not logs or "loss" not in logs:
                return
            if not all(math.isfinite(logs.get(name) or 0.0) for name in ("loss", "grad_norm")):
                raise ConfigError(
                    f"Step {state.global_step} had a loss of {logs['loss']} and a gradient of norm {logs.get('grad_norm')}, so the adapter is spoilt and the "
                    "run ends here. Take a lower --learning-rate, or where the dtype is float16 --dtype bfloat16 or float32. Checkpoints from before stay."
                )
            record["losses"].append({"step": state.global_step, "loss": logs["loss"], "learning_rate": logs.get("learning_rate")})
            if self.bar is not None:
                speed = self.trainer.tokens / max(time.perf_counter() - self.since, 1e-9)
                self.bar.update(self.task, completed=state.global_step, description=f"loss {logs['loss']:.3f}  {speed:,.0f} tokens/s")

    return Watcher()


def _show(record: dict[str, Any], recipe: Any) -> None:
    plan = record["plan"]
    table = Table(title=f"{recipe.method} on {recipe.model}", title_justify="left")
    table.add_column("module")
    table.add_column("layers", justify="right")
    table.add_column("trained parameters", justify="right")
    for name, group in plan["modules"].items():
        table.add_row(name, str(group["count"]), f"{group['parameters']:,}")
    for name in plan["trained_whole"]:
        table.add_row(f"{name} (whole)", "", "")
    _console.print(table)
    memory = {k: f"{v / 2**20:,.0f} MiB" for k, v in plan["memory"].items()}
    share = plan["trainable_parameters"] / plan["all_parameters"]
    _console.print(
        f"{plan['trainable_parameters']:,} of {plan['all_parameters']:,} parameters train ({share:.2%}); weights {memory['weights']}, "
        f"gradients {memory['gradients']}, optimizer {memory['optimizer']}\n"
        f"{plan['train_rows']:,} training rows, {plan['held_out_rows']:,} held out, {plan['steps']:,} steps of {recipe.batch_size} x {recipe.length} tokens"
        + f" on each of {plan['processes']} processes"
        * (plan["processes"] > 1)
    )
    if plan["left_out_rows"]:
        _console.print(
            f"{plan['left_out_rows']:,} rows are left out: within {recipe.length} tokens there is nothing in them to learn. A greater --length takes them in.",
            style="yellow",
        )


def _report(record: dict[str, Any], recipe: Any) -> None:
    lines = [f"{name}: {value:.4g} -> {record['after'][name]:.4g}" for name, value in record["before"].items()]
    lines.append(
        f"{record['seconds']:.1f} s, {record['tokens_per_second']:,.0f} tokens/s, peak memory {record['peak_memory'] / 2**20:,.0f} MiB"
        + " of the first process" * (processes() > 1)
    )
    lines.append(f"adapter, run.json and loss.png are in {recipe.out}")
    _console.print(Panel("\n".join(lines), title="done", border_style="green"))
    sys.stderr.flush()
