"""X-LoRA: a small classifier reads the base's last hidden state and says, token by token, how much of each LoRA adapter acts.

Longer than other methods: it loads adapters, runs the model twice, gates each token, and offers what PEFT's model does.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ConfigError, PeftWarning, RouteError
from ..method import Leaf, Method, of_acting
from ..ops import LowRank, Sum, gated, per_token
from ..routes.classifier import Classifier
from ..routes.experts import Kept, kept, plain, stacked
from ..routes.passes import last_hidden_state
from ..routes.scalings import Scalings
from ..routes.unfilled import Unfilled

CLASSIFIER = "internal_xlora_classifier"
_PLAIN = (None, "dynamic", "dynamic_full")


@dataclass
class XLoraConfig(Method, peft_type="XLORA"):
    """y += g Σ_e c_e s_e B_e A_e x,  c = softmax(f(hidden) / T),  f an MLP of `xlora_depth` layers.   Buehler & Buehler 2024, arXiv:2402.07148.

    hidden (rows, tokens, hidden_size) is the last hidden state of a first pass, in which every expert has the gate `scaling_pass_value`; no
    gradient flows through it. f is shared by all layers, or has an output for each (`layerwise_scalings`). Its first layer maps to `xlora_size`,
    ReLU and dropout stand between layers. The classifier trains, the experts with `use_trainable_adapters` only.

    Args:
        adapters: the experts, LoRA adapters of linear and embedding layers by any names, each a folder or a name on the Hub. Where the adapter is
            loaded from a folder that holds experts of these names, those go before.
        hidden_size: by default what the model's config says.
        enable_softmax: apply the softmax above; else the classifier's outputs are the gates.
        enable_softmax_topk: another softmax over the `top_k_lora` largest gates of a token; the others are 0 in any case.
        global_scaling_weight: g.

    Unlike in PEFT, `generate` keeps a cache (two: the passes have one each) unless it searches with beams; a file holds the whole classifier, and one
    of PEFT's that lacks layers runs once they have been filled in by hand; models without `hidden_states` give their output as hidden state.
    """

    hidden_size: int | None = None
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    prefix: ClassVar[str] = "xlora_"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})
    stacking: ClassVar[Any] = "sum"
    starts_as_identity: ClassVar[bool] = False
    unmergeable: ClassVar[str] = "each token mixes the experts in its own way"
    routes: ClassVar[bool] = True
    tuner_methods: ClassVar[Any] = {name: of_acting(path) for name, path in {
        "get_latest_scalings": "scalings.latest", "get_scalings_log": "scalings.log", "get_bucketed_scalings_log": "scalings.bucketed",
        "clear_scalings_log": "scalings.clear", "enable_scalings_logging": "scalings.enable", "disable_scalings_logging": "scalings.disable",
        "set_topk_lora": "set_topk_lora", "set_scaling_pass_value": "set_scaling_pass_value",
        "get_global_scaling_weight": "get_global_scaling_weight", "set_global_scaling_weight": "set_global_scaling_weight",
    }.items()}  # fmt: skip
    examples: ClassVar[Any] = (
        {"adapters": {"a": "", "b": ""}, "xlora_depth": 2, "xlora_size": 6, "xlora_dropout_p": 0.0},
        {"adapters": {"0": "", "1": "", "2": ""}, "layerwise_scalings": True, "scaling_pass_value": 0.3},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapters and all(n.isdecimal() for n in self.adapters):  # PEFT's; its files put 10 before 2
            self.adapters = dict(sorted(self.adapters.items(), key=lambda item: int(item[0])))
        self.scalings = Scalings()
        self._unfilled = Unfilled()
        self._layers = 0
        if self.xlora_depth < 1 or self.xlora_size < 1 or self.softmax_temperature <= 0 or not 0 <= self.xlora_dropout_p < 1:
            raise ConfigError(
                "`xlora_depth`, `xlora_size` and `softmax_temperature` must be positive and `xlora_dropout_p` lie in [0, 1), got "
                f"{self.xlora_depth}, {self.xlora_size}, {self.softmax_temperature}, {self.xlora_dropout_p}."
            )
        if self.top_k_lora is not None and self.top_k_lora < 1:
            raise ConfigError(f"`top_k_lora` value must be at least 1, got {self.top_k_lora}.")
        if self.enable_softmax_topk and self.top_k_lora is None:
            warnings.warn(
                "`enable_softmax_topk` acts on the `top_k_lora` largest gates, and `top_k_lora` is not set.", PeftWarning, stacklevel=4
            )

    # ---------------------------------------------------------------- where it acts

    def experts(self) -> Mapping[str, str | None]:
        if not self.adapters:
            raise ConfigError("X-LoRA mixes LoRA adapters, and `adapters` names none: adapters={'name': 'folder', ...}.")
        return {n: path or None for n, path in self.adapters.items()}

    def along(self) -> Sequence[str]:
        return list(self.adapters or ()) if self.use_trainable_adapters else ()

    def meet(self, model: nn.Module) -> None:
        if self.hidden_size is None:
            config: Any = getattr(model, "config", None)
            config = config.get_text_config() if hasattr(config, "get_text_config") else config
            self.hidden_size = getattr(config, "hidden_size", None)
        if self.hidden_size is None:
            raise ConfigError("The model does not tell the width of its hidden states. Give `hidden_size`.")

    def default_targets(self, model: nn.Module) -> str:
        """A regular expression for the layers that experts stand on."""
        names = set(self.adapters or ())
        there = {path: m for path, m in model.named_modules() if names & set(m.__dict__.get("attached", ()))}
        if not there:
            raise ConfigError(
                f"None of the experts {sorted(names)} is in the model. get_peft_model loads them; injecting into a bare model does not."
            )
        for path, m in there.items():
            if m.site.kind not in self.kinds:  # type: ignore[union-attr]
                raise ConfigError(f"X-LoRA gates experts of {sorted(self.kinds)} layers, and {path!r} is a {m.site.kind} one.")  # type: ignore[union-attr]
        return "|".join(re.escape(path) for path in there)

    def check(self, site: Any) -> None:
        for name in self._here(site):
            plain(site, name)

    def leaves(self, site: Any) -> Mapping[str, Leaf]:
        return {}

    def shared(self, sites: Sequence[Any]) -> Mapping[str, Leaf]:
        self._layers = len(sites)
        return self._classifier.leaves()

    @property
    def _classifier(self) -> Classifier:
        outputs = len(self.adapters or ()) * (self._layers if self.layerwise_scalings else 1)
        return Classifier(
            self.hidden_size or 0, self.xlora_size, outputs, self.xlora_depth, self.xlora_dropout_p, CLASSIFIER, "xlora_router"
        )

    def _here(self, site: Any) -> list[str]:
        """The experts that stand on a layer."""
        return [n for n in self.adapters or () if n in site.layer.attached]

    # ---------------------------------------------------------------- a call

    def generating(self, asked: Callable[[str], Any]) -> Mapping[str, Any]:
        # caches of the first pass do not follow when rows change places, nor have they a fixed size
        other = (asked("num_beams") or 1) > 1 or asked("cache_implementation") not in _PLAIN
        return {"use_cache": False, "cache_implementation": None} if other else {}

    def facts(self, call: Any) -> Mapping[str, Tensor]:
        places = call.places
        if gone := [n for n in self.adapters or () if not any(n in each.layer.attached for each in places)]:
            raise RouteError(
                f"The adapter {call.adapter!r} mixes {gone}, which the model has no more. Load them: load_adapter(folder, name)."
            )
        self._unfilled.check_running(places[0])
        for each in call.unseen:
            self._known(each)
        hidden, training = self._hidden(call), places[0].training
        # of each row's dropout: a recomputation has to drop the same
        seeds = torch.randint(2**62, (len(hidden),)) if training else torch.full((len(hidden),), -1)
        scalings = self._scalings(places[0], hidden, seeds)
        self.scalings.note(scalings if scalings.shape[2] > 1 else scalings.expand(-1, -1, self._layers, -1))
        facts = {"gates": self._chosen(scalings)}
        return {**facts, "hidden": hidden, "seeds": seeds} if scalings.requires_grad else facts

    def _scalings(self, place: Any, hidden: Tensor, seeds: Tensor) -> Tensor:
        """(rows, tokens, layers or 1, experts)."""
        out: Tensor = self._classifier(place.tensor, hidden, seeds if place.training else None)
        out = out.unflatten(-1, (-1, len(self.adapters or ())))
        return (out / self.softmax_temperature).softmax(-1) if self.enable_softmax else out

    def _hidden(self, call: Any) -> Tensor:
        """The last hidden state of the first pass."""
        facts = None
        if self.scaling_pass_value != 0:
            device = next(t.device for t in call.inputs.values() if isinstance(t, Tensor))
            gates = torch.full((*call.shape, 1, len(self.adapters or ())), float(self.scaling_pass_value), device=device)
            facts = {"gates": self._chosen(gates)}
        hidden = last_hidden_state(call, facts)
        if hidden.shape[-1] != self.hidden_size:
            raise RouteError(f"The model's last hidden state has width {hidden.shape[-1]}, and `hidden_size` is {self.hidden_size}.")
        return hidden

    def _chosen(self, scalings: Tensor) -> Tensor:
        """The gates: the `top_k_lora` largest, scaled among themselves if asked."""
        if self.top_k_lora is not None:
            which = scalings.topk(min(self.top_k_lora, scalings.shape[-1]), -1).indices
            scalings = scalings * torch.zeros_like(scalings).scatter(-1, which, 1)
        if self.enable_softmax_topk:
            zero = scalings == 0
            scalings = scalings.masked_fill(zero, -torch.inf).softmax(-1).masked_fill(zero, 0)
        return scalings * self.global_scaling_weight

    def change(self, p: Any, site: Any) -> Change:
        gates = site.fact("gates")
        if gates.requires_grad and site.apart:
            gates = self._chosen(self._scalings(site, site.fact("hidden"), site.fact("seeds")))
        gates = gates[:, :, site.index if gates.shape[2] > 1 else 0]
        known = self._known(site)

        def gate(x: Tensor, which: list[int]) -> Tensor:
            return per_token(gates.to(x.device), x.shape[:-1] if x.is_floating_point() else x.shape, site.name)[..., which]

        terms = []
        for which, dropout, up, down, ranks in self._terms(site) if known.trained else known.value:
            terms.append(gated(up, down, ranks, functools.partial(gate, which=which), dropout, self.unmergeable))
        return Change(add=Sum(terms))

    def _known(self, site: Any) -> Kept[list[tuple[list[int], float, Tensor, Tensor, list[int]]]]:
        return kept(site, functools.partial(self._here, site), functools.partial(self._terms, site))

    def _terms(self, site: Any) -> list[tuple[list[int], float, Tensor, Tensor, list[int]]]:
        """The experts of a layer, those of one dropout together: (numbers, dropout, up, down, ranks)."""
        numbers = {n: i for i, n in enumerate(self.adapters or ())}
        groups: dict[float, dict[int, LowRank]] = {}
        for name in self._here(site):
            add = plain(site, name)
            groups.setdefault(add.dropout, {})[numbers[name]] = add
        return [
            (list(g), dropout, *stacked([(a.up * a.scale, a.down) for a in g.values()]), [len(a.down) for a in g.values()])
            for dropout, g in groups.items()
        ]

    # ---------------------------------------------------------------- files

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes = {n: s for n, s in self._classifier.shapes().items() if n.split(".")[2] in (self.adapters or ())}
        return self._unfilled.found(tensors, shapes, CLASSIFIER)

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self._unfilled.check_saving(tensors)
        return tensors

    # ---------------------------------------------------------------- what the model offers

    def set_topk_lora(self, value: int | None) -> None:
        """Let only so many experts act on a token; None: all."""
        self.top_k_lora = value

    def get_global_scaling_weight(self) -> float:
        """The factor of all experts."""
        return self.global_scaling_weight

    def set_global_scaling_weight(self, weight: float) -> None:
        """Set the factor of all experts."""
        self.global_scaling_weight = weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Set the gate of every expert in the first pass; None: one over their number."""
        self.scaling_pass_value = 1 / len(self.adapters or (1,)) if value is None else value
