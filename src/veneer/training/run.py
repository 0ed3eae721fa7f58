"""One run: load, attach, show, evaluate, train, evaluate, write."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..bases import codec_for
from ..checkpoint import load_into, read_adapter
from ..control import Control, FreezingSchedule, LayerStatistics, picture_of_schedule, picture_of_statistics, trainer_callback
from ..engine.route import find_switch
from ..engine.steps import carried, carry_on
from ..errors import ConfigError
from ..mapping import get_peft_model
from ..model import PeftModel
from ..planning import plan
from .attention import attend_as_before, attend_by_rows
from .controls import STATISTICS, controls_of, optimizer_of, rate_groups
from .data import Example, classification_examples, collate, end_to_end, language_examples, pack, read_rows, whole
from .loss import HeadlessLoss, keeps_rows_apart
from .processes import Filled, Shuffled, filled, is_first, processes
from .quantise import storage
from .recipe import Recipe

# in a checkpoint of the Trainer: what methods remember from step to step, the ranks that a file lacks, and the networks that make prompts
_REMEMBERED = "methods.safetensors"
_NETWORK = "network/"
_OTHERWISE = "Delete this checkpoint to go on from the one before it, or start anew in another --out."
_STARTED = "started.json"  # in a checkpoint: what its run was started with
# may change from one start of a run to the next; where model and data lie is no matter, what they are is compared by itself
_FREE = (
    "model",
    "data",
    "eval_data",
    "out",
    "steps",
    "epochs",
    "save_every",
    "statistics",
    "gradient_checkpointing",
    "resume",
    "resume_anyway",
)


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
    model = _load_for([*train, *held_out], recipe, labels, _pad(tokenizer))
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
    join = collate(_pad(tokenizer))
    model = _load_for([train[i] for i in order], recipe, labels, _pad(tokenizer))
    return model, lambda size: (join([train[i] for i in order[at : at + size]]) for at in range(0, len(order), size))


def _pad(tokenizer: Any) -> int:
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
                return pack(found, recipe.length, _pad(tokenizer))
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
        raise ConfigError(f"{model!r} has no tokenizer that transformers can load: {_first_line(e)}") from e


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
        raise ConfigError(f"{recipe.model!r} cannot be loaded for {recipe.task}: {_first_line(e)}") from e
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


def _first_line(e: BaseException) -> str:
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
        "steps": _steps(recipe, len(prepared.train)),
        "processes": processes(),
    }


def _steps(recipe: Recipe, rows: int) -> int:
    batches = math.ceil(rows / (recipe.batch_size * processes()))  # of a pass; its last batch and its last step may be smaller than others
    return recipe.steps or max(1, math.ceil(math.ceil(batches / recipe.accumulate) * recipe.epochs - 1e-9))


def _started(prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    """What the steps of a run hang on, each by its name."""
    found = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in (*_FREE, "method_fields")}
    found |= {f"method_fields.{k.replace('-', '_')}": v for k, v in recipe.method_fields.items()}
    told: dict[str, Any] = json.loads(
        json.dumps({**found, "processes": processes(), "rows": len(prepared.train), "data": prepared.digest}, default=str)
    )
    return told


def check_resumed(prepared: Prepared, recipe: Recipe, checkpoint: str) -> None:
    """Raise ConfigError if the run that the checkpoint is of was started with other data or settings; a checkpoint that does not tell goes unasked."""
    try:
        then = json.loads((Path(checkpoint) / _STARTED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(then, dict) or not {"rows", "data"} <= then.keys():
        return
    now = _started(prepared, recipe)
    changed = [k for k in sorted({*then, *now}) if k not in ("rows", "data") and then.get(k) != now.get(k)]
    said = [f"{k} was {then.get(k)!r} and is {now.get(k)!r}" for k in changed]
    if then["data"] != now["data"]:
        many = (
            f"{then['rows']:,} and are {now['rows']:,}"
            if then["rows"] != now["rows"]
            else f"as many ({now['rows']:,}), with other contents"
        )
        said.append(f"the training rows were {many}")
    if said and not recipe.resume_anyway:
        raise ConfigError(
            f"--resume: the run in {recipe.out!r} was started otherwise: {'; '.join(said)}. It would not be the run it was. Give what it was started with, "
            "start anew in another --out, or go on all the same with --resume-anyway (the learning rate and weight decay then stay those of the checkpoint)."
        )


def ended(recipe: Recipe) -> int:
    """The step at which a run in `out` came to its end, and left all that it leaves; 0 if none did. One that went on later need not have."""
    try:
        found = json.loads((Path(recipe.out) / "run.json").read_text(encoding="utf-8"))
        return int(found["plan"]["steps"]) if (Path(recipe.out) / "adapter_config.json").is_file() else 0
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def losses_of(checkpoint: str) -> list[dict[str, Any]]:
    """The losses of the steps up to a checkpoint."""
    told = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8")).get("log_history", [])
    return [{k: x.get(k) for k in ("step", "loss", "learning_rate")} for x in told if "loss" in x]


def forget_after(recipe: Recipe, step: int) -> None:
    """Take out of the statistics in `out` what was measured after a step, which a run that goes on from there measures again."""
    file = Path(recipe.out) / STATISTICS
    if not is_first() or not recipe.statistics or not file.is_file():
        return

    def before(line: str) -> bool:
        try:
            return int(json.loads(line)["step"]) <= step
        except ValueError:  # cut off
            return False

    kept = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if before(line)]
    beside = file.with_name(f".{file.name}")
    beside.write_text("".join(kept), encoding="utf-8")
    os.replace(beside, file)


def make_trainer(prepared: Prepared, recipe: Recipe, callbacks: Sequence[Any] = ()) -> Any:
    """transformers' Trainer, saving and resuming adapters by veneer's own files, with the chunked loss where the model allows it."""
    import transformers

    headless = HeadlessLoss.of(prepared.model) if recipe.task == "causal-lm" else None
    pad = _pad(prepared.tokenizer)
    # a method that routes may add to the model's loss
    theirs = recipe.task == "causal-lm" or any(getattr(c, "routes", False) for c in prepared.model.peft_config.values())
    half = any(p.dtype == torch.float16 for p in prepared.model.parameters())
    apart = recipe.packing == "rows" and headless is not None and keeps_rows_apart(prepared.model, headless)
    if apart and headless is not None and attend_by_rows(headless.inner) and not keeps_rows_apart(prepared.model, headless):
        attend_as_before(headless.inner)

    class AdapterTrainer(transformers.Trainer):  # type: ignore[misc]
        tokens = 0  # trained on in this run, without padding; other processes are taken to have as many
        louder = 1.0  # what the loss is multiplied by for the backward

        def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
            if half and not self.is_deepspeed_enabled:  # of a mean over many labels, gradients are too small for float16
                self.louder = 2.0 ** min(int(num_items_in_batch if num_items_in_batch is not None else 1024).bit_length(), 16)
            loss = super().training_step(model, inputs, num_items_in_batch) / self.louder
            if self.louder != 1.0 and self.accelerator.sync_gradients:
                torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], self.louder)
            return loss  # type: ignore[no-any-return]

        def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            if model.training:
                found = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
                self.tokens += int(found) * processes()
            if return_outputs:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if headless is None and theirs:
                return super().compute_loss(model, inputs, False, num_items_in_batch) * self.louder
            total, count = headless(model, inputs) if headless is not None else _summed(model, inputs)
            scale = float(num_items_in_batch) if num_items_in_batch is not None else max(count, 1)
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                total = total * self.accelerator.num_processes
            return total / scale * self.louder

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return Shuffled(len(prepared.train), recipe.batch_size * processes(), recipe.seed)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            folder = Path(output_dir or self.args.output_dir)
            self.model.save_pretrained(folder)
            (folder / _STARTED).write_text(json.dumps(_started(prepared, recipe)), encoding="utf-8")

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            network = _network(self.model)
            parts = dict(network._modules) if network is not None else {}
            load_into(self.model, "default", read_adapter(resume_from_checkpoint), check_base="error")
            if network is not None:  # the adapter's file has what it gave, and loading that has dropped it
                network._modules.update(parts)
                _carry_on(network, Path(resume_from_checkpoint) / _REMEMBERED)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            super()._save_optimizer_and_scheduler(output_dir)
            remembered = carried(find_switch(self.model), leaves=True)
            if (network := _network(self.model)) is not None:
                remembered |= {f"{_NETWORK}{k}": t.detach().contiguous() for k, t in network.state_dict().items()}
            if remembered and self.args.should_save:
                save_file(remembered, Path(output_dir) / _REMEMBERED)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            whole = checkpoint is None or self.is_fsdp_enabled or self.is_deepspeed_enabled or (Path(checkpoint) / "optimizer.pt").is_file()
            if not whole:
                raise ConfigError(
                    f"--resume: {checkpoint!r} has no optimizer.pt, without which the run would not go on as it was. {_OTHERWISE}"
                )
            try:
                super()._load_optimizer_and_scheduler(checkpoint)
            except (UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as e:
                raise ConfigError(f"--resume: the optimizer's state in {checkpoint!r} cannot be read: {_first_line(e)} {_OTHERWISE}") from e
            if checkpoint is not None and (file := Path(checkpoint) / _REMEMBERED).is_file():
                carry_on(find_switch(self.model), load_file(file))

        def _load_best_model(self) -> None:
            load_into(self.model, "default", read_adapter(self.state.best_model_checkpoint), check_config=False)

    steps = _steps(recipe, len(prepared.train))
    cpu = not torch.accelerator.is_available()
    args = transformers.TrainingArguments(
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and processes() > 1 else None,
        output_dir=str(Path(recipe.out) / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        warmup_steps=round(steps * recipe.warmup),
        weight_decay=recipe.weight_decay,
        lr_scheduler_type=recipe.schedule,
        max_grad_norm=1.0 if recipe.clipping is None else 0.0,  # of all gradients together, which would leave the layers nothing to clip
        seed=recipe.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it shows the loss 0 in the place of one that is no number
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 500,
        save_total_limit=2,
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        log_level="error",
    )
    # every process has read the same packed weights, and torchao's cannot be broadcast
    layers = [(path, m) for path, m in prepared.model.named_modules() if not codec_for(m).plain]
    packed = [f"{path}.{n}" for path, m in layers for n, p in m._parameters.items() if p is not None and not p.requires_grad]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(prepared.model, packed)
    own = optimizer_of(recipe, prepared.model)
    steering = controls_of(recipe, prepared.model)
    trainer = AdapterTrainer(
        model=prepared.model,
        args=args,
        train_dataset=Filled(prepared.train),
        eval_dataset=filled(prepared.held_out, recipe.batch_size * processes()) or None,
        data_collator=end_to_end if apart else collate(pad),
        callbacks=[*callbacks, *([trainer_callback(steering)] if steering else [])],
        optimizers=(own, None),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if headless is not None or not theirs:
        trainer.model_accepts_loss_kwargs = True  # the loss made here counts all labels of a step, whatever the model would do
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        headless = None  # the head's weight is in pieces then
    trainer.headless, trainer.steering = headless, steering
    return trainer


def _network(model: Any) -> nn.Module | None:
    """The prompt that a network makes which its file leaves out, if there is one."""
    held = model._modules.get("prompt_encoder")
    return held["default"] if held is not None and not model.peft_config["default"].resumable else None


def _carry_on(network: nn.Module, file: Path) -> None:
    """Give a prompt's network the numbers that a checkpoint has of it.

    Raises:
        ConfigError: if it has none.
    """
    kept = {k.removeprefix(_NETWORK): t for k, t in load_file(file).items() if k.startswith(_NETWORK)} if file.is_file() else {}
    if not kept:
        raise ConfigError(f"--resume: {str(file.parent)!r} lacks the network that makes the prompt, so it cannot go on. {_OTHERWISE}")
    network.load_state_dict(kept)


def _summed(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """(sum of a classifier's losses, number of labels that count)."""
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    return nn.functional.cross_entropy(logits.float(), inputs["labels"], reduction="sum"), int((inputs["labels"] != -100).sum())


@torch.no_grad()
def evaluate(trainer: Any, recipe: Recipe) -> dict[str, float]:
    """Perplexity and loss of a language model, or accuracy of a classifier, over the held-out rows, exact on any number of processes."""
    if trainer.eval_dataset is None:
        return {}
    model = trainer.model
    training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in trainer.get_eval_dataloader():
        batch = trainer._prepare_inputs(batch)
        if recipe.task != "causal-lm":
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            counts = batch["labels"] != -100
            sums += torch.tensor([float(((logits.argmax(-1) == batch["labels"]) & counts).sum()), int(counts.sum())], dtype=torch.float64)
        elif trainer.headless is not None:
            total, count = trainer.headless(model, batch)
            sums += torch.tensor([float(total), count], dtype=torch.float64)
        else:
            count = int((batch["labels"][:, 1:] != -100).sum())
            loss = float(model(**batch).loss)  # the mean of none is no number
            sums += torch.tensor([loss * count if count else 0.0, count], dtype=torch.float64)
    sums = trainer.accelerator.reduce(sums.to(trainer.args.device), "sum").cpu()
    model.train(training)
    mean = float(sums[0] / sums[1].clamp_min(1))
    return {"accuracy": mean} if recipe.task != "causal-lm" else {"loss": mean, "perplexity": math.exp(min(mean, 700))}


def finish(prepared: Prepared, recipe: Recipe, record: dict[str, Any], steering: Sequence[Control] = ()) -> None:
    """Write the adapter, the tokenizer's files, the pictures and, last, the record."""
    out = Path(recipe.out)
    prepared.model.save_pretrained(out)
    freezing = next((c for c in steering if isinstance(c, FreezingSchedule)), None)
    if recipe.rates or freezing is not None:
        _picture_schedule(record, recipe, prepared, freezing, out / "schedule.png")
    for control in steering:
        if isinstance(control, LayerStatistics) and control.records:
            picture_of_statistics(out / "statistics.png", control)
    prepared.tokenizer.save_pretrained(out)
    _picture(record["losses"], record.get("before", {}), record.get("after", {}), out / "loss.png")
    beside = out / ".run.json"
    beside.write_text(json.dumps(record, indent=2), encoding="utf-8")
    os.replace(beside, out / "run.json")


def _picture_schedule(record: dict[str, Any], recipe: Recipe, prepared: Prepared, freezing: FreezingSchedule | None, path: Path) -> None:
    """Each group's rate times what the schedule makes of it at each step."""
    import transformers

    steps = record["plan"]["steps"]
    one = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = transformers.get_scheduler(recipe.schedule, one, round(steps * recipe.warmup), steps)
    curve = []
    for _ in range(steps):
        curve.append(one.param_groups[0]["lr"])
        one.step()
        scheduler.step()
    picture_of_schedule(path, rate_groups(recipe, prepared.model), steps, lambda s: curve[s], freezing)


def new_record(prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    """The machine-readable account of a run, as far as it is known before it starts."""
    import transformers

    from .._version import __version__

    return {
        "veneer": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "recipe": dataclasses.asdict(recipe),
        "plan": overview(prepared, recipe),
        **({"labels": prepared.labels} if prepared.labels else {}),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "losses": [],
    }


def peak_memory() -> int:
    """The most memory this process has held, in bytes: on the accelerator if there is one, else on the host."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def _picture(losses: Sequence[dict[str, float]], before: dict[str, float], after: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([x["step"] for x in losses], [x["loss"] for x in losses], color="#2a6f97", label="training loss")
    for value, name, color in ((before.get("loss"), "held out, before", "#999999"), (after.get("loss"), "held out, after", "#c1121f")):
        if value is not None:
            axes.axhline(value, linestyle="--", color=color, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
