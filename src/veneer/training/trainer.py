"""transformers' Trainer for adapters: its checkpoints, its loss, its batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..bases import codec_for
from ..checkpoint import load_into, read_adapter
from ..control import trainer_callback
from ..engine.route import find_switch
from ..engine.steps import carried, carry_on
from ..errors import ConfigError
from .attention import attend_as_before, attend_by_rows
from .controls import controls_of, optimizer_of
from .data import collate, end_to_end
from .loss import HeadlessLoss, keeps_rows_apart
from .prepare import Prepared, first_line, pad_of, steps_of
from .processes import Filled, Shuffled, filled, processes
from .recipe import Recipe
from .resume import STARTED, started

# in a checkpoint of the Trainer: what methods remember from step to step, the ranks that a file lacks, and the networks that make prompts
_REMEMBERED = "methods.safetensors"
_NETWORK = "network/"
_OTHERWISE = "Delete this checkpoint to go on from the one before it, or start anew in another --out."


def make_trainer(prepared: Prepared, recipe: Recipe, callbacks: Sequence[Any] = ()) -> Any:
    """transformers' Trainer, saving and resuming adapters by veneer's own files, with the chunked loss where the model allows it."""
    import transformers

    headless = HeadlessLoss.of(prepared.model) if recipe.task == "causal-lm" else None
    pad = pad_of(prepared.tokenizer)
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
            (folder / STARTED).write_text(json.dumps(started(prepared, recipe)), encoding="utf-8")

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
                raise ConfigError(f"--resume: the optimizer's state in {checkpoint!r} cannot be read: {first_line(e)} {_OTHERWISE}") from e
            if checkpoint is not None and (file := Path(checkpoint) / _REMEMBERED).is_file():
                carry_on(find_switch(self.model), load_file(file))

        def _load_best_model(self) -> None:
            load_into(self.model, "default", read_adapter(self.state.best_model_checkpoint), check_config=False)

    steps = steps_of(recipe, len(prepared.train))
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
