"""The prompts of a model: what `PeftModel.prompt_encoder` is, and what a prompt model has in the place of a tuner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engine import inject
from ..engine.holders import Keyed
from ..engine.route import BASE, Choice, Switch, check_known
from ..engine.wrapper import adapter_modules, check_reduced, warn_of_heir
from ..errors import ConfigError, RouteError
from ..types import name_of
from .base import Prompt, PromptModule
from .cpt import CPTConfig
from .feed import Drawn, as_cache, as_tokens, check_one_text, continued, in_decoder, key_values, named, seen
from .generate import for_generate
from .shape import embedding_table, is_encoder_decoder

_INPUTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "past_key_values", "generation_config")


class Prompts(Keyed):
    """The prompts by adapter's name, one of which acts at a time (or one per row of the batch). The base model stays as it is.

    Args:
        model: the user's model.
        config: the first adapter's config.
        adapter_name: its name.
        empty: do not compute start values that a file is going to replace.

    Attributes:
        peft_config: the adapters' configs, by name.
        switch: which adapter acts; shared with the modules trained whole.

    Raises:
        ConfigError: if the config does not fit the model.
    """

    def __init__(self, model: nn.Module, config: Prompt, adapter_name: str, *, empty: bool = False) -> None:
        super().__init__()
        self._base = (model,)  # in a tuple: it is the PeftModel's child, not this module's
        self.switch = Switch([adapter_name])
        self.peft_config: dict[str, Any] = {}
        self.inject(config, adapter_name, empty=empty)

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self._base[0]

    def inject(
        self,
        config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        autocast_adapter_dtype: bool = True,
        empty: bool = False,
    ) -> inject.Plan:
        """Add one more prompt; arguments as of a tuner's, of which a prompt needs the fewest: it is small, and always float32."""
        model, table = self.model, embedding_table(self.model)
        weight = getattr(table, "weight", None)
        if table is None or weight is None:
            raise ConfigError(
                f"{type(model).__name__} tells no input embeddings (get_input_embeddings), so a prompt cannot go before them."
            )
        config.fill(model)
        check_checkpointing(model, config, training=True)
        made = config.module(table, start=not empty and not config.inference_mode)
        if any(t.device != weight.device for t in (*made.parameters(), *made.buffers())):  # `to` swaps tensors even if it has nothing to do
            made = made.to(weight.device)
        plan = inject.attach_saved(model, config, adapter_name, self.switch)
        self[adapter_name] = made
        self.peft_config[adapter_name] = config
        acting = adapter_name in (self.switch.chosen().names or ()) and not config.inference_mode
        self.set_requires_grad(adapter_name, acting)
        made.train(model.training)
        plan.modules["prompt_encoder"] = sum(p.numel() for p in made.parameters())
        return plan

    # ---------------------------------------------------------------- which one acts

    def adapters(self) -> list[str]:
        return list(self._modules)

    @property
    def active_adapters(self) -> list[str]:
        return list(self.switch.chosen().names or ())

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let one prompt act, and train (not in inference mode).

        Raises:
            RouteError: for a name that is not there, or several.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        check_known(names, self.adapters())
        _one(names)
        inject.choose(self.model, self.switch, names, inference_mode)
        for name in self.adapters():
            self.module_of(name).set_requires_grad(name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these prompts, and the modules trained with them, get gradients, or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_known(names, self.adapters())
        inject.mark_trainable(self.model, names, requires_grad)
        for name in names:
            self.module_of(name).set_requires_grad(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take a prompt off. If it acted, the first that is left does, and trains, with a warning."""
        check_known([adapter_name], self.adapters())
        before = self.active_adapters
        for _, wrapper in list(adapter_modules(self.model)):
            wrapper.take_off(adapter_name)
        del self._modules[adapter_name], self.peft_config[adapter_name]
        left = [n for n in before if n != adapter_name] or self.adapters()[:1]
        self.switch.set(left)
        if left and left[0] not in before:
            warn_of_heir(adapter_name, left[0], stacklevel=4)
            self.set_requires_grad(left, not self.peft_config[left[0]].inference_mode)

    def take_off(self) -> None:
        """Put the user's model back as it was."""
        inject.unwrap(self.model, lambda wrapper: wrapper.inside())
        inject.thaw(self.model, self.switch)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A prompt changes no weight."""
        return False

    def module_of(self, name: str) -> PromptModule:
        """The module that holds one prompt."""
        return cast(PromptModule, self._modules[name])

    # ---------------------------------------------------------------- running

    def draw(self, choice: Choice, batch: int, task_ids: Tensor | None = None) -> tuple[Drawn, Any]:
        """The prompts of a batch, and a config that tells how they are fed.

        Raises:
            RouteError: if more than one would act on a row.
        """
        names = list(choice.rows) if choice.rows is not None else _one(list(choice.names or ())) * batch
        if len(names) != batch:
            raise RouteError(f"There are {len(names)} adapter names for {batch} rows of the batch.")
        if task_ids is not None and len(task_ids) != batch:
            raise ValueError(f"There are {len(task_ids)} task_ids for {batch} rows of the batch.")
        distinct = list(dict.fromkeys(n for n in names if n != BASE))
        config = self.peft_config[distinct[0]]
        if len(distinct) == 1 and BASE not in names:
            prompt = self.module_of(distinct[0]).prompt(task_ids)
            return Drawn(prompt.expand(batch, *prompt.shape[-2:])), config
        if is_encoder_decoder(self.model) and (config.into == "cache" or config.in_decoder):
            raise RouteError("In the decoder of an encoder-decoder the rows of a batch cannot have different prompts. Run them one by one.")
        rows: dict[int, Tensor] = {}
        for name in distinct:
            at = [i for i, n in enumerate(names) if n == name]
            mine = task_ids[at] if task_ids is not None else None
            prompt = self.module_of(name).prompt(mine)[..., : self.peft_config[name].num_virtual_tokens, :]
            rows |= dict(zip(at, prompt.expand(len(at), *prompt.shape[-2:]), strict=True))
        some = next(iter(rows.values()))
        n = max(len(p) for p in rows.values())
        empty = some.new_zeros(0, some.shape[1])
        padded = [torch.cat([p.new_zeros(n - len(p), p.shape[1]), p]) for p in (rows.get(i, empty) for i in range(batch))]
        lengths = torch.tensor([len(rows.get(i, empty)) for i in range(batch)], device=some.device)
        own = torch.arange(n, device=some.device) >= (n - lengths)[:, None]
        return Drawn(torch.stack(padded), None if bool(own.all()) else own), config

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward with the prompt that acts here and now."""
        choice = self.switch.current(None)
        extra = {name: kwargs.pop(name, None) for name in ("task_ids", "input_type_mask")}
        if not choice.enabled or not any(n != BASE for n in (choice.rows or choice.names or ())):
            return model(*args, **kwargs)
        kw = {k: v for k, v in named(model.forward, args, kwargs).items() if v is not None}
        drawn, config = self.draw(choice, _batch(kw), extra["task_ids"])
        check_checkpointing(model, config, model.training)
        for name in choice.acting if model.training else ():
            check_reduced(name, "prompt_encoder", self.module_of(name).parameters())
        both = is_encoder_decoder(model)
        labels, items = (kw.get("labels"), kw.get("num_items_in_batch")) if isinstance(config, CPTConfig) else (None, None)
        if labels is not None:
            if choice.rows is not None:
                raise RouteError("CPT's loss is that of one prompt: with `adapter_names`, leave the labels out.")
            del kw["labels"]
        fed = self.feed(model, drawn, config, kw, both)
        out = model(**fed)
        if config.into == "cache":
            _check_used(model, fed["past_key_values"], drawn)
        if labels is None:
            return out
        logits = out[0] if isinstance(out, tuple) else out.logits
        loss = config.loss(logits, labels, extra["input_type_mask"], items)
        return (loss, *out) if isinstance(out, tuple) else type(out)(**{**out, "loss": loss})

    def feed(self, model: nn.Module, drawn: Drawn, config: Any, kw: dict[str, Any], both: bool) -> dict[str, Any]:
        """The arguments of the model's forward with the prompt put in."""
        if seen(kw):
            return continued(kw, drawn, both and (config.into == "cache" or config.in_decoder))
        check_one_text(kw)
        if config.into == "cache":
            return as_cache(model, drawn, config, kw)
        n = config.num_virtual_tokens
        if both and config.in_decoder and drawn.n > n:
            in_decoder(model, drawn.prompt[:, n:], kw)
        first = Drawn(drawn.prompt[:, :n]) if drawn.own is None else drawn
        if both and "encoder_outputs" in kw:
            mask = kw.get("attention_mask")
            if mask is not None and mask.shape[1] == kw["encoder_outputs"][0].shape[1] - first.n:
                kw["attention_mask"] = torch.cat([first.mask(mask), mask], 1)
            return kw
        return as_tokens(model, first, kw, name_of(config.task_type))

    def for_generate(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], copies: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the model's generate with the prompt that acts here and now; `copies`: rows that each one becomes."""
        choice = self.switch.current(None)
        task_ids = kwargs.pop("task_ids", None)
        if not choice.enabled or not any(n != BASE for n in (choice.rows or choice.names or ())):
            return args, kwargs
        # None may be an answer here, such as for eos_token_id
        kw = {k: v for k, v in named(model.generate, args, kwargs).items() if v is not None or k not in _INPUTS}
        if "inputs" in kw:
            kw[getattr(model, "main_input_name", "input_ids")] = kw.pop("inputs")
        drawn, config = self.draw(choice, _batch(kw), task_ids)
        return (), for_generate(model, drawn, config, kw, copies)

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Any:
        """The prompt that acts: embeddings (batch, rows, width), or a cache."""
        drawn, config = self.draw(self.switch.current(None), batch_size, task_ids)
        return key_values(self.model, drawn, config) if config.into == "cache" else drawn.prompt

    def to_save(self, adapter_name: str) -> Tensor:
        """What the file has as `prompt_embeddings`."""
        check_known([adapter_name], self.adapters())
        _, _, attribute, owner = next(iter(self.module_of(adapter_name).slots()))
        value: Tensor = getattr(owner, attribute)
        return value.detach().cpu()


_ROWS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "labels",
    "input_features",
    "input_values",
    "pixel_values",
)


def _one(names: list[str]) -> list[str]:
    if len(names) != 1:
        raise RouteError(f"One prompt can act at a time, not {len(names)} ({names}). Choose one, or one per row with `adapter_names`.")
    return names


def _batch(kw: Mapping[str, Any]) -> int:
    for name in _ROWS:
        if isinstance(kw.get(name), Tensor):
            return int(kw[name].shape[0])
    raise RouteError(
        "A prompt needs the input: give input_ids or inputs_embeds, or what else the model is called with (input_features, pixel_values …)."
    )


def check_checkpointing(model: Any, config: Any, training: bool) -> None:
    """Refuse a prompt in the cache where checkpointed layers would drop it."""
    if config.into == "cache" and training and getattr(model, "is_gradient_checkpointing", False):
        kind = name_of(config.peft_type)
        raise ConfigError(
            f"{kind} does not work with gradient checkpointing: checkpointed layers take no cache, and the prompt is one. "
            "Switch it off (model.gradient_checkpointing_disable()), or use prompt tuning."
        )


def _check_used(model: nn.Module, cache: Any, drawn: Drawn) -> None:
    """Raise unless the model has read the cache that it was given."""
    if not torch.compiler.is_compiling() and int(cache.get_seq_length()) <= drawn.n:
        raise ConfigError(f"{type(model).__name__} makes no use of past_key_values, so the prompt has no effect. Use prompt tuning.")
