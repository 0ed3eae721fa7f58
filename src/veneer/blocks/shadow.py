"""ShadowPEFT: a small network runs beside a decoder, corrects what enters its blocks and learns from what leaves them.

Over 150 lines: the shadow starts anew at each call of the model, with a loss of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..change import Beside
from ..errors import ConfigError, RouteError
from ..method import Leaf, Method
from . import backbone as small
from .cached import keep, mine

_BACKBONE, _PROJECTION, _HEAD = "shadow_backbone.default", "shadow_projection.default", "shadow_head.default"


@dataclass
class ShadowConfig(Method, peft_type="SHADOW"):
    """s₀ = P·B(x);  before block l  h ← h + α·W_up·W_down(h − s);  after it  s ← (1 − g) s + g T(h),  g = σ(G(h)).

    B is a small backbone of the base model's class (or a pretrained one), P a projection where its width is another, W_down (r, d) and W_up (d, r)
    are linear, T and G two layers with a GELU. To the loss is added `auxiliary_loss_weight` times that of the head on s₀, so that B becomes a model
    that also stands alone: `unload_shadow()`. In generate, B's keys and values are further layers of the base model's cache. One adapter acts on a row.

    Different from PEFT: the last block's T and G, whose s nobody reads, do not train; the unused embeddings of a B that shares the base model's
    do not train either; hidden states that the model returns are tensors; gradients accumulated with `num_items_in_batch` are right.
    """

    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    init_weights: bool = True
    shadow_model: str = "mirror"
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.05
    layers_to_transform: list[int] | int | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None

    prefix: ClassVar[str] = "shadow_"
    kinds: ClassVar[frozenset[str]] = frozenset({"block"})
    unmergeable: ClassVar[str] = "the shadow follows the input from block to block; unload_shadow() gives it as a model of its own"
    routes: ClassVar[bool] = True
    tuner_methods: ClassVar[Any] = {
        "unload_shadow": lambda tuner, *args, **kwargs: tuner.ask_acting("unload_shadow", tuner, *args, **kwargs)
    }
    examples: ClassVar[Any] = ({"r": 3}, {"r": 3, "update_hidden_size": 5, "shadow_hidden_size": 8, "shadow_num_hidden_layers": 2})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r <= 0:
            raise ConfigError(f"`r` should be a positive integer value but the value passed is {self.r}")
        sizes = ("shadow_num_hidden_layers", "shadow_hidden_size", "shadow_num_attention_heads", "shadow_intermediate_size")
        given = [n for n in sizes if getattr(self, n) is not None]
        if self.shadow_model != "mirror" and given:
            raise ConfigError(f"A pretrained shadow_model ({self.shadow_model!r}) has its own sizes. Leave out {', '.join(given)}.")

    def default_targets(self, model: nn.Module) -> list[str]:
        """Every block of the decoder, or those of `layers_to_transform`."""
        _, path = small.find_stack(model)
        count = len(model.get_submodule(path))  # type: ignore[arg-type]
        wanted = self.layers_to_transform
        numbers = range(count) if wanted is None or wanted == [] else [wanted] if isinstance(wanted, int) else sorted(wanted)
        return [f"{path}.{i}" for i in numbers]

    def scale(self) -> float:
        return self.shadow_alpha

    def dropout(self) -> float:
        return self.shadow_dropout

    def check_together(self, others: Sequence[Method]) -> None:
        if others:
            raise RouteError("ShadowPEFT requires exactly one active adapter: each has a shadow of its own. Activate one of them.")

    # ---------------------------------------------------------------- along the blocks

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        d, m = site.n_in, self.update_hidden_size or self.r
        read = site.index < site.count - 1  # whether anything reads the s behind this block
        out = {
            "down": Leaf((self.r, d), _linear(d), container="shadow_down", attr="weight", on_disk="shadow_down.default.weight"),
            "up": Leaf(
                (d, self.r), nn.init.zeros_ if self.init_weights else _linear(self.r),
                container="shadow_up", attr="weight", on_disk="shadow_up.default.weight",
            ),
        }  # fmt: skip
        for part in ("transform", "gate"):
            for i, n_out, n_in in ((0, m, d), (2, d, m)):
                for attr, shape in (("weight", (n_out, n_in)), ("bias", (n_out,))):
                    name = f"shadow_update_{part}"
                    out[f"{part}_{i}_{attr}"] = Leaf(
                        shape, _linear(n_in), container=name, attr=f"{i}.{attr}", on_disk=f"{name}.default.{i}.{attr}", trainable=read
                    )
        return out

    def change(self, p: Any, site: Any) -> Beside:
        states, at = site.fact("states"), site.index

        def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
            return F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))

        def two(part: str, h: Tensor) -> Tensor:
            w0, b0, w2, b2 = (getattr(p, f"{part}_{name}") for name in ("0_weight", "0_bias", "2_weight", "2_bias"))
            return linear(F.gelu(linear(h, w0, b0)), w2, b2)

        def before(h: Tensor) -> Tensor:
            s = states[at]
            if s.shape[:-1] != h.shape[:-1]:
                raise RouteError(f"{site.name!r} got hidden states of shape {tuple(h.shape)}, and the shadow has {tuple(s.shape)}.")
            d = h - s.to(h)
            d = F.dropout(d, site.dropout) if site.dropout else d
            correction: Tensor = site.scaling * linear(linear(d, p.down), p.up)
            return h + correction

        def after(h: Tensor) -> None:
            s = states[at]
            if at < site.count - 1:
                s = torch.lerp(s.to(h), two("transform", h), torch.sigmoid(two("gate", h)))
                states.setdefault(at + 1, s)  # a block that runs again finds it there
            if not torch.is_grad_enabled():
                del states[at]  # nothing runs this block again

        return Beside(before, after)

    # ---------------------------------------------------------------- the small network

    def modules(self, model: nn.Module, sites: Sequence[Any], *, empty: bool = False) -> Mapping[str, nn.Module]:
        _check_row([s.name for s in sites])
        where, dtype = next((p.device, p.dtype) for p in model.parameters() if p.is_floating_point())
        width, projection = sites[0].n_in, None
        if self.shadow_model == "mirror":
            network = small.mirror(
                model, layers=self.shadow_num_hidden_layers, width=self.shadow_hidden_size, heads=self.shadow_num_attention_heads,
                middle=self.shadow_intermediate_size,
            )  # fmt: skip
        else:
            network, projection = small.load(self.shadow_model, empty=empty)
        own = small.width_of(network.config)
        if projection is None and own != width:
            projection = nn.Linear(own, width, bias=False)
        if projection is not None and (projection.in_features, projection.out_features) != (own, width):
            raise ConfigError(
                f"The projection of {self.shadow_model!r} is {projection.in_features}->{projection.out_features}, and the shadow and the base "
                f"model have the widths {own} and {width}."
            )
        if self.share_embeddings and self.shadow_model == "mirror" and projection is None and small.accepts(network, "inputs_embeds"):
            network._modules.pop(small.TABLE, None)
            _freeze(network)
        elif self.shadow_model != "mirror":
            _freeze(network)
        out: dict[str, nn.Module] = {_BACKBONE: network}
        if projection is not None:
            out[_PROJECTION] = projection
        if self.task_type == "SEQ_CLS":
            head = next((h for n in small.CLASSIFIERS if (h := getattr(model, n, None)) is not None), None)
            if head is not None:
                out[_HEAD] = copy.deepcopy(getattr(head, "original_module", head)).requires_grad_(True)
        return {name: module.to(where, dtype).train(model.training) for name, module in out.items()}

    def facts(self, call: Any) -> Mapping[str, Any]:
        parts = call.home.modules_of(call.adapter)
        given = dict(call.inputs)
        cached = given.get("use_cache")
        given["use_cache"] = bool(getattr(getattr(call.model, "config", None), "use_cache", False)) if cached is None else cached
        given["past_key_values"] = mine(given.get("past_key_values"), call.adapter, parts[_BACKBONE]) if given["use_cache"] else None
        share = self.share_embeddings and self.shadow_model == "mirror" and _PROJECTION not in parts
        if given.get("inputs_embeds") is None and given.get("input_ids") is None:
            raise RouteError("A shadow needs the input: give input_ids or inputs_embeds, by name.")
        if share and given.get("inputs_embeds") is None:
            given["inputs_embeds"] = call.model.get_input_embeddings()(given["input_ids"])
        if given.get("inputs_embeds") is not None:
            given.pop("input_ids", None)
        names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache")
        hidden, call.memory["cache"] = small.run(parts[_BACKBONE], {**{n: given.get(n) for n in names}, "return_dict": True})
        start = parts[_PROJECTION](hidden) if _PROJECTION in parts else hidden
        if call.at is not None:
            start = start.index_select(0, torch.tensor(call.at, device=start.device))
        return {"states": {0: start}, "start": [start]}

    def finish(self, call: Any, output: Any) -> Any:
        states, (start,) = call.facts["states"], call.facts.pop("start")
        for at, s in states.items():  # for blocks that a backward runs again; the graph need not be kept for them
            states[at] = s.detach().requires_grad_(s.requires_grad)
        keep(output, call.memory.pop("cache"), call.adapter)
        labels = call.inputs.get("labels")
        call.home.last_shadow_loss = None
        old = None if labels is None else output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
        if old is None:
            return output
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.auxiliary_loss_weight > 0):
            loss = self._loss(call, start, labels)
        if loss is None:
            return output
        total = old + self.auxiliary_loss_weight * loss
        call.home.last_shadow_loss = loss.detach()  # for logs: trainers drop what a model's output has beside its fields
        if isinstance(output, tuple):
            return (total, *output[1:])
        output.loss, output.shadow_loss = total, loss.detach()
        return output

    def _loss(self, call: Any, start: Tensor, labels: Tensor) -> Tensor | None:
        """The task's loss of the head on s₀, of the adapter's own rows, as their part of that of the whole batch."""
        own = labels if call.at is None else labels[torch.tensor(call.at, device=labels.device)]
        heads = call.home.modules_of(call.adapter)
        if self.task_type == "CAUSAL_LM":
            logits = call.model.get_output_embeddings()(start)[:, :-1].float()
            total = F.cross_entropy(logits.flatten(0, 1), own[:, 1:].flatten().to(logits.device), ignore_index=-100, reduction="sum")
            items = call.inputs.get("num_items_in_batch")
            items = (labels[:, 1:] != -100).sum() if items is None else items
            return total / (items.to(total.device) if isinstance(items, Tensor) else items)
        if _HEAD not in heads:
            return None
        mask = call.inputs.get("attention_mask")
        last = torch.full((len(start),), start.shape[1] - 1, device=start.device)
        if mask is not None:
            mask = mask if call.at is None else mask[torch.tensor(call.at, device=mask.device)]
            last = (mask.ne(0) * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        logits = heads[_HEAD](start[torch.arange(len(start), device=start.device), last]).float()
        return _classified(logits, own.to(logits.device)) * (len(own) / len(labels))

    # ---------------------------------------------------------------- alone

    def unload_shadow(self, tuner: Any, adapter_name: str | None = None, copy: bool = False) -> nn.Module:
        """The small network with the head, without the base model: a model of the base model's class, which generates and is saved as such.

        Args:
            adapter_name: whose; by default the active adapter's.
            copy: make its modules copies; else it shares them with this model.

        Raises:
            RouteError: for an adapter that is not there.
            ConfigError: if the base model's class has more than a backbone and a head.
        """
        from ..engine.route import check_known

        name = adapter_name or tuner.active_adapters[0]
        check_known([name], list(tuner.parts))
        parts = tuner.modules_of(name)
        config, model = tuner.peft_config[name], tuner.model
        share = config.share_embeddings and config.shadow_model == "mirror" and _PROJECTION not in parts
        head = parts.get(_HEAD) or _own(model.get_output_embeddings(), name)
        if head is None:
            raise ConfigError(f"{type(model).__name__} has no head that the shadow could take over.")
        made = (parts[_BACKBONE], parts.get(_PROJECTION), head, _own(model.get_input_embeddings(), name) if share else None)
        return small.alone(model, *(_copied(made) if copy else made))


def _linear(n_in: int) -> Any:
    """How a linear layer's weight and bias start."""
    return lambda t: nn.init.uniform_(t, -(n_in**-0.5), n_in**-0.5)


def _copied(made: Any) -> Any:
    return copy.deepcopy(made)


def _freeze(network: Any) -> None:
    """Let the embeddings of a backbone not train."""
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            table = getattr(network, name)()
        except (AttributeError, NotImplementedError):  # it has none, or none is left
            continue
        if isinstance(table, nn.Module):
            table.requires_grad_(False)


def _check_row(names: Sequence[str]) -> None:
    """Raise ConfigError unless these are blocks of one stack, one after the other: the shadow goes from each to the next."""
    stacks = {n.rpartition(".")[0] for n in names}
    numbers = [n.rpartition(".")[2] for n in names]
    if len(stacks) > 1 or not all(n.isdecimal() for n in numbers) or len({int(n) - i for i, n in enumerate(numbers)}) > 1:
        raise ConfigError(f"The blocks beside a shadow have to follow one another in one stack, these do not: {', '.join(names)}.")


def _own(module: Any, adapter: str) -> Any:
    """A module of the base model, or the copy that the adapter trains of it."""
    copies = getattr(module, "modules_to_save", None)
    return module if copies is None else copies._modules.get(adapter, module.original_module)


def _classified(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of a classifier as transformers' models have it: regression, one label, or several."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).view(-1))
    if labels.dtype in (torch.long, torch.int):
        return F.cross_entropy(logits, labels.view(-1).long())
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
