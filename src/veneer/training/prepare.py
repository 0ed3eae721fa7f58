"""What a run needs, loaded and checked before anything is written: the data, the model, its adapter."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..mapping import get_peft_model
from ..model import PeftModel
from ..planning import plan
from .data import Example, classification_examples, collate, language_examples, pack, read_rows, whole
from .processes import processes
from .quantise import storage
from .recipe import Recipe


@dataclasses.dataclass
class Prepared:
    """A model with its adapter and its data, ready to train."""

    model: PeftModel
    tokenizer: Any
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    labels: list[str]
    left_out: int = 0  # rows of which nothing counts within the length

    @functools.cached_property
    def digest(self) -> str:
        """Of the training rows; every checkpoint says it."""
        return hashlib.sha256(json.dumps([sorted(r.items()) for r in self.train]).encode()).hexdigest()


def prepare(recipe: Recipe) -> Prepared:
    """Load and check everything; nothing is written.

    Raises:
        ConfigError: for whatever does not fit; one error, in words.
    """
    recipe.check()
    config = recipe.config()
    tokenizer, train, held_out, labels, left_out = _read_data(recipe)
    torch.manual_seed(recipe.seed)
    model = _load_for([*train, *held_out], recipe, labels, pad_of(tokenizer))
    peft = get_peft_model(model, config)
    _check_disk(recipe.out, peft)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        peft.prepare_model_for_gradient_checkpointing(model)
    return Prepared(peft, tokenizer, train, held_out, labels, left_out)


def read_model(recipe: Recipe, rows: int) -> tuple[Any, Callable[[int], Iterator[dict[str, Tensor]]]]:
    """The model without an adapter, and a function that gives so many rows of its training data in batches of a size.

    Raises:
        ConfigError: for whatever does not fit.
    """
    tokenizer, train, _, labels, _ = _read_data(recipe)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed)).tolist()[:rows]
    join = collate(pad_of(tokenizer))
    model = _load_for([train[i] for i in order], recipe, labels, pad_of(tokenizer))
    return model, lambda size: (join([train[i] for i in order[at : at + size]]) for at in range(0, len(order), size))


def pad_of(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0


def _read_data(recipe: Recipe) -> tuple[Any, list[dict[str, Any]], list[dict[str, Any]], list[str], int]:
    """(tokenizer, training rows, held-out rows, labels, how many rows are left out)."""
    rows = read_rows(recipe.data)
    held = read_rows(recipe.eval_data) if recipe.eval_data else []
    tokenizer = _tokenizer(recipe.model)
    left_out = 0
    if recipe.task == "causal-lm":
        labels: list[str] = []
        examples = language_examples(rows, tokenizer, recipe.data)
        apart = recipe.packing == "rows"

        def rows_of(found: list[Example]) -> list[dict[str, Any]]:
            nonlocal left_out
            if not apart:
                return pack(found, recipe.length, pad_of(tokenizer))
            kept = whole(found, recipe.length)
            left_out += len(found) - len(kept)
            return kept

        if held:
            train, held_out = rows_of(examples), rows_of(language_examples(held, tokenizer, str(recipe.eval_data)))
        else:
            train, held_out = _split(rows_of(examples), recipe)
    else:
        labels = sorted({str(r["label"]) for r in rows if "label" in r})
        if len(labels) < 2 and any("label" in r for r in rows):
            raise ConfigError(f"{recipe.data}: all rows have the label {labels[0]!r}; a classifier needs two or more.")
        train = classification_examples(rows, tokenizer, recipe.length, labels, recipe.data)
        if held:
            held_out = classification_examples(held, tokenizer, recipe.length, labels, str(recipe.eval_data))
        else:
            train, held_out = _split(train, recipe)
    if held and not held_out:
        raise ConfigError(
            f"{recipe.eval_data!r} gives nothing to evaluate on: within {recipe.length} tokens there is no row whose prediction counts."
        )
    if not train:
        raise ConfigError(f"{recipe.data!r} gives no training rows: within {recipe.length} tokens there is none whose prediction counts.")
    return tokenizer, train, held_out, labels, left_out


def _split(rows: list[dict[str, Any]], recipe: Recipe) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    count = min(round(len(rows) * recipe.eval_fraction), max(len(rows) - 1, 0))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    return [rows[i] for i in sorted(order[count:])], [rows[i] for i in sorted(order[:count])]


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    check_model(model)
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as e:
        raise ConfigError(f"{model!r} has no tokenizer that transformers can load: {first_line(e)}") from e


def check_model(model: str) -> None:
    """Raise ConfigError for what is plainly no model."""
    path = Path(model)
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if path.is_dir() and not (path / "config.json").exists():
        raise ConfigError(f"The folder {model!r} holds no model: it has no config.json.")
    if looks_local and not path.exists():
        raise ConfigError(f"There is no model folder {model!r}.")


def _load_for(rows: Sequence[dict[str, Any]], recipe: Recipe, labels: Sequence[str], pad: int) -> Any:
    """The model, which has been found to suit these rows and the task."""
    model = _load(recipe, labels, pad)
    _check_positions(model, max(len(r["input_ids"]) for r in rows))
    if recipe.task == "causal-lm":
        _check_causal(model, rows, recipe.model)
    return model


def _load(recipe: Recipe, labels: Sequence[str], pad: int) -> Any:
    import transformers

    dtype: Any = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[recipe.dtype]
    options: dict[str, Any] = {"dtype": dtype}
    try:
        if recipe.quantize is not None:
            own = getattr(transformers.AutoConfig.from_pretrained(recipe.model), "dtype", None) or torch.float32
            options["quantization_config"] = storage(recipe.quantize, own if dtype == "auto" else dtype, recipe.task != "causal-lm")
        if recipe.task == "causal-lm":
            return transformers.AutoModelForCausalLM.from_pretrained(recipe.model, **options)
        names = dict(enumerate(labels))
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            recipe.model, num_labels=len(labels), id2label=names, label2id={v: k for k, v in names.items()}, **options
        )
        model.config.get_text_config().pad_token_id = pad  # decoders read the last token that is none
        return model
    except (OSError, ValueError) as e:
        raise ConfigError(f"{recipe.model!r} cannot be loaded for {recipe.task}: {first_line(e)}") from e
    except RuntimeError as e:
        if "ignore_mismatched_sizes" not in str(e):
            raise
        raise ConfigError(
            f"{recipe.model!r} has a head for another number of labels than the {len(labels)} of the data. Take the model without its head, or its labels."
        ) from e


@torch.no_grad()
def _check_positions(model: Any, longest: int) -> None:
    """Raise ConfigError if rows are longer than the model's table of positions: found out by trying the last one."""
    place = {"input_ids": torch.zeros(1, 1, dtype=torch.long), "position_ids": torch.tensor([[longest - 1]])}
    try:
        model(**{k: v.to(model.device) for k, v in place.items()})
    except IndexError as e:
        have = getattr(model.config, "max_position_embeddings", "fewer")
        raise ConfigError(f"The data have rows of {longest} tokens, and the model has {have} positions. Give a smaller --length.") from e
    except Exception:  # a model that takes no positions
        return


def _check_causal(model: Any, rows: Sequence[dict[str, Any]], name: str) -> None:
    """Raise ConfigError if what the model says of a token hangs on tokens behind it, one of which is the answer: found out by a gradient, which is zero where
    nothing hangs on them, and not by what configs say."""
    row = max(rows[:64], key=lambda r: len(r["input_ids"]))["input_ids"]
    ids = torch.as_tensor(row)[None, :8].to(model.device)
    held: list[Tensor] = []

    def take(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1]

    try:
        hook = model.get_input_embeddings().register_forward_hook(take)
        try:
            with torch.enable_grad():
                earlier = model(input_ids=ids).logits[0, :-1].float().square().mean()
                (grad,) = torch.autograd.grad(earlier, held[:1])
        finally:
            hook.remove()
    except Exception:  # a model that tells no embeddings, or that takes no gradients yet
        return
    reach = grad.float().abs().amax((0, 2))
    if reach[-1] > 1e-6 * reach.max():
        raise ConfigError(
            f"{name!r} sees tokens that come later: a {type(model).__name__} would find each answer in its input, and learn nothing. For --task "
            'causal-lm take a decoder (Llama, Qwen, GPT-2 …), or write "is_decoder": true into the config.json of a model that knows the switch, as '
            "BERT does. Encoders are trained to classify: --task sequence-classification."
        )


def first_line(e: BaseException) -> str:
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__


def _check_disk(out: str, model: nn.Module) -> None:
    """There has to be room for the adapter, its optimizer state and a checkpoint or two."""
    folder = Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    need = 12 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) + 2**20
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ConfigError(
            f"There is no room on the disk for {out!r}: the run needs about {need / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free."
        )
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{str(folder)!r} cannot be written to. Give another --out.")


def overview(prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    """What is going to be trained: modules by kind, parameters, memory in bytes."""
    found = plan(prepared.model, batch_size=recipe.batch_size, length=recipe.length, accumulate=recipe.accumulate, simulate=False)
    return {
        "modules": found.groups(),
        "trained_whole": found.whole,
        "trainable_parameters": found.trainable_parameters,
        "all_parameters": found.all_parameters,
        "memory": found.memory,
        "train_rows": len(prepared.train),
        "held_out_rows": len(prepared.held_out),
        "left_out_rows": prepared.left_out,
        "steps": steps_of(recipe, len(prepared.train)),
        "processes": processes(),
    }


def steps_of(recipe: Recipe, rows: int) -> int:
    batches = math.ceil(rows / (recipe.batch_size * processes()))  # of a pass; its last batch and its last step may be smaller than others
    return recipe.steps or max(1, math.ceil(math.ceil(batches / recipe.accumulate) * recipe.epochs - 1e-9))
