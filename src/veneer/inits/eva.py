"""EVA: A from the directions in which a layer's inputs vary most, and the ranks where they explain most."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, hint
from .base import singular
from .calibration import check_reached, targets

_PREFIX = "base_model.model."  # of a PeftModel's names


@dataclass
class EvaConfig:
    """Options of the EVA start.

    Args:
        rho: a layer's rank may grow to rho · r;  1 keeps all ranks.
        tau: cosine similarity from which on a layer's directions count as settled.
        use_label_mask, label_mask_value: leave out positions whose label has this value.
        whiten: divide each direction by the root of its singular value.
        adjust_scaling_factors: change alpha with the rank, so that the scaling stays.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ConfigError(f"eva_config: `rho` must be >= 1.0, got {self.rho}.")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"eva_config: `tau` must be between 0.0 and 1.0, got {self.tau}.")


@dataclass
class Spectrum:
    """The running decomposition of rows that come in batches: X - mean ≈ U S V over all of them, cut to k. Ross et al. 2008, section 3.

    Attributes:
        s: singular values (k,);  v: directions (k, n_in);  mean: of the rows (n_in,);  count: how many there were.
        energy: the sum of squares of X - mean, in all directions.
        alike: |cosine| of each direction with what it was before the last batch.
    """

    k: int
    s: Tensor | None = None
    v: Tensor | None = None
    mean: Tensor | None = None
    count: int = 0
    energy: float = 0.0
    alike: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in rows x (rows, n_in)."""
        x = x.float()
        mean = x.mean(0)
        rows = x - mean
        energy = float(rows.double().square().sum())
        if self.s is None or self.v is None or self.mean is None:
            self.mean = mean
        else:
            whole = self.count + len(x)
            shift = (self.mean - mean) * (self.count * len(x) / whole) ** 0.5
            rows = torch.cat([self.s.unsqueeze(1) * self.v, rows, shift.unsqueeze(0)])
            energy += self.energy + float(shift.double().square().sum())
            self.mean = (self.count * self.mean + len(x) * mean) / whole
        _, s, v = singular(rows, self.k)
        if self.v is not None:
            self.alike = (self.v * v[: len(self.v)]).sum(1).abs()
        self.s, self.v, self.energy, self.count = s, v, energy, self.count + len(x)

    def shares(self) -> list[float]:
        """The share of the energy that each direction explains."""
        return [] if self.s is None else (self.s.double().square() / max(self.energy, 1e-30)).tolist()

    def settled(self, rank: int, tau: float) -> bool:
        """Whether the last batch left the first `rank` directions as they were."""
        return self.alike is not None and len(self.alike) >= rank and bool((self.alike[:rank] >= tau).all())


def deal(spectra: Mapping[str, Spectrum], wanted: Mapping[str, int], rho: float) -> dict[str, int]:
    """Ranks within the sum of the wanted ones, to the directions that explain the largest share of their layer's inputs."""
    if rho == 1:
        return dict(wanted)
    shares = sorted(((share, name) for name, s in spectra.items() for share in s.shares()), key=lambda pair: -pair[0])
    ranks = dict.fromkeys(spectra, 0)
    for _, name in shares[: sum(wanted.values())]:
        ranks[name] += 1
    return ranks


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """Run the model on a batch that is a dict of its arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Any], peft_config: Any) -> Tensor:
    """(row, position) of every position that counts: attended to, and with a label where labels are asked for.

    Raises:
        ConfigError: if the batch is no dict with input_ids.
    """
    if not isinstance(model_input, Mapping) or "input_ids" not in model_input:
        raise ConfigError(
            "EVA looks for `input_ids` in each batch. For other models pass prepare_model_inputs_fn=None and prepare_layer_inputs_fn=None."
        )
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]).bool() if mask is None else mask.bool()
    options = peft_config.eva_config
    if options.use_label_mask and model_input.get("labels") is not None:
        mask = mask & (model_input["labels"] != options.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows (tokens, n_in) of a layer's input at the positions that count."""
    x: Tensor = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    return x[model_input.T[0], model_input.T[1]] if x.ndim == 3 else x


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[..., Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable[..., Any] | dict[str, Callable[..., Any]] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """A (rank, n_in) per layer, by the layer's name; ranks are dealt out by explained variance within r · layers in all.

    Paischer et al. 2024, arXiv:2410.07170, algorithm 1: the principal components of each layer's inputs batch by batch, until the
    directions that are dealt a rank have settled everywhere, or the data end (PEFT begins them anew, forever if they never settle).

    Args:
        model: a model with an adapter of init_lora_weights="eva", or one without adapters and `peft_config`.
        dataloader: batches, each what `forward_fn(model, batch)` takes.
        prepare_model_inputs_fn: (batch, config) -> what is handed to prepare_layer_inputs_fn. None: the batch.
        prepare_layer_inputs_fn: (layer's inputs, that, name) -> the rows (rows, n_in) that count; a dict has one per layer name.
            None: all rows.

    Raises:
        ConfigError: if the config is not for EVA, or the data do not reach every layer or are too few.
    """
    adapted = peft_config is None or adapter_name in getattr(model, "peft_config", {})
    layers, config = _adapted(model, adapter_name) if adapted else (dict(targets(model, peft_config)), peft_config)
    options = config.eva_config
    if options is None or config.init_lora_weights != "eva":
        raise ConfigError('EVA needs LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(...)).')
    prefix = _PREFIX if adapted and hasattr(model, "get_base_model") else ""
    wanted = {n: config.at(n).r for n in layers}
    spectra = {n: Spectrum(max(1, round(wanted[n] * options.rho))) for n in layers}
    ranks = dict(wanted)
    current: list[Any] = [None]
    readers: dict[int, tuple[Any, Any, Spectrum]] = {}  # layers that read the very same tensor share its decomposition

    def prepared(name: str) -> Callable[..., Any] | None:
        if isinstance(prepare_layer_inputs_fn, dict):
            return prepare_layer_inputs_fn.get(f"{prefix}{name}", prepare_layer_inputs_fn.get(name))
        return prepare_layer_inputs_fn

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            args = args or tuple(kwargs.values())
            x, prepare, spectrum = args[0], prepared(name), spectra[name]
            seen, how, other = readers.get(id(x), (lambda: None, None, spectrum))
            if seen() is x and how is prepare and other.k == spectrum.k:
                spectra[name] = other
                return
            readers[id(x)] = weakref.ref(x), prepare, spectrum
            if spectrum.settled(ranks[name], options.tau):
                return
            rows = x if prepare is None else prepare(args, current[0], f"{prefix}{name}")
            rows = _gathered(rows.detach().reshape(-1, rows.shape[-1]), gather_distributed_inputs)
            if not bool(torch.isfinite(rows).all()):
                raise ConfigError(
                    f"The inputs of {name!r} are not finite, so they have no directions. Give data on which the model does not overflow."
                )
            if len(rows):
                spectrum.update(rows)

        return hook

    handles = [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in layers.items()]
    try:
        with torch.no_grad(), _at_rest(model):
            for batch in _shown(dataloader, show_progress_bar):
                moved = _moved(batch, next(model.parameters()).device)
                current[0] = prepare_model_inputs_fn(moved, config) if prepare_model_inputs_fn is not None else moved
                readers.clear()
                (forward_fn or forward_fn_dict)(model, moved)
                ranks = deal(spectra, wanted, options.rho)
                if all(s.settled(ranks[n], options.tau) for n, s in spectra.items()):
                    break
    finally:
        for handle in handles:
            handle.remove()
    check_reached(spectra, [n for n, s in spectra.items() if s.v is not None], "The data never reached")
    for name, s in spectra.items():
        assert s.v is not None
        if s.count < min(s.k, s.v.shape[1]):
            raise ConfigError(
                f"The data give {s.count} rows to {name!r}, and EVA looks there for {s.k} directions (rho · r). Give more data."
            )
    return {f"{prefix}{n}": _directions(spectra[n], ranks[n], options.whiten) for n in layers}


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[..., Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable[..., Any] | dict[str, Callable[..., Any]] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give an EVA adapter its start, from data or from what `get_eva_state_dict` gave; layers dealt no rank lose the adapter.

    The ranks are written into the config. The adapter's tensors become new parameters: build the optimizer afterwards.

    Raises:
        ConfigError: if neither data nor a state dict is given, it does not fit, or the model has no such adapter; nothing is changed.
    """
    if dataloader is None and eva_state_dict is None:
        raise ConfigError("Give a dataloader, or an eva_state_dict computed before: EVA's start comes from data.")
    layers, config = _adapted(model, adapter_name)
    merged = [n for n, m in layers.items() if adapter_name in m.merged_adapters]
    if merged:
        raise ConfigError(f"The adapter {adapter_name!r} is merged into {merged[0]!r}. Call unmerge_adapter() first.")
    if eva_state_dict is None:
        assert dataloader is not None
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    starts = {n.removeprefix(_PREFIX): a for n, a in eva_state_dict.items()}
    strange = [n for n in (*starts, *layers) if n not in starts or n not in layers]
    if strange:
        raise ConfigError(
            f"The eva_state_dict and the adapter {adapter_name!r} are not of the same layers: only one of them has {strange[0]!r}"
            f"{f' and {len(strange) - 1} more' if strange[1:] else ''}.{hint(strange[0], {*starts, *layers} - {strange[0]})}"
        )
    for name, layer in layers.items():
        if starts[name].ndim != 2 or starts[name].shape[1] != layer.site.n_in:
            raise ConfigError(
                f"The eva_state_dict has a tensor {tuple(starts[name].shape)} for {name!r}, which needs (rank, {layer.site.n_in})."
            )
    here = {n: config.at(n) for n in layers}
    ranks = {n: len(a) for n, a in starts.items() if len(a)}
    if not ranks:
        raise ConfigError("The eva_state_dict gives no layer a rank, so nothing would be left to train.")
    alphas = {n: here[n].lora_alpha for n in ranks}
    if config.eva_config.adjust_scaling_factors:
        power = 0.5 if config.use_rslora else 1
        alphas = {n: x if ranks[n] == here[n].r else x * (ranks[n] / here[n].r) ** power for n, x in alphas.items()}
    for name, layer in layers.items():
        if name not in ranks:
            layer.take_off(adapter_name)
            continue
        updates = {"r": ranks[name], "lora_alpha": alphas[name], "rank_pattern": {}, "alpha_pattern": {}}
        layer.replace_leaves(adapter_name, {"lora_A": starts[name], "lora_B": torch.zeros(layer.site.n_out, ranks[name])}, updates)
    config.rank_pattern, config.alpha_pattern = _pattern(ranks, config.r), _pattern(alphas, config.lora_alpha)
    if len(ranks) < len(layers):
        _narrow(config, _root(model), ranks)


def _root(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, no-any-return]


def _adapted(model: nn.Module, adapter_name: str) -> tuple[dict[str, Any], Any]:
    from ..engine.layer import adapted_layers

    layers = {n: m for n, m in adapted_layers(_root(model)) if adapter_name in m.attached and "lora_A" in m.attached[adapter_name].leaves}
    config = getattr(model, "peft_config", {}).get(adapter_name)  # type: ignore[union-attr]
    if not layers or config is None or getattr(config, "eva_config", None) is None:
        raise ConfigError(f'The model has no adapter {adapter_name!r} of LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(...)).')
    return layers, config


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A rank_pattern or alpha_pattern that says just this; a name that is the end of another one has to be anchored."""
    return {f"^{n}" if any(m.endswith(f".{n}") for m in values) else n: x for n, x in sorted(values.items()) if x != default}


def _narrow(config: Any, root: nn.Module, kept: Iterable[str]) -> None:
    """Let the config target the kept layers and no other."""
    config.target_modules = set(kept)
    others = [n.replace(".base_layer", "") for n, _ in root.named_modules()]
    if any(o.endswith(f".{n}") for o in others for n in kept):  # a list would hit those, too
        config.target_modules = "|".join(re.escape(n) for n in sorted(kept))
        config.layers_to_transform = config.layers_pattern = None  # for lists only, and all said


def _directions(s: Spectrum, rank: int, whiten: bool) -> Tensor:
    assert s.v is not None and s.s is not None
    v = s.v[:rank].clone()
    return v / s.s[:rank].clamp_min(1e-6 * max(float(s.s[0]), 1.0)).sqrt().unsqueeze(1) if whiten else v


def _gathered(x: Tensor, wanted: bool) -> Tensor:
    dist = torch.distributed
    if not wanted or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    sizes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, x.shape[0])
    most = max(sizes)
    padded = torch.nn.functional.pad(x, (0, 0, 0, most - x.shape[0]))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([p[:n] for p, n in zip(parts, sizes, strict=True)])


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """No adapter and no dropout acts inside; each module's mode is as before afterwards."""
    from ..engine.route import disabled

    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with disabled(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {k: _moved(v, device) for k, v in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_moved(v, device) for v in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


def _shown(batches: Iterable[Any], show: bool) -> Iterator[Any]:
    if not show:
        yield from batches
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield from batches
        return
    yield from tqdm(batches, desc="Initializing with EVA", unit="batch")
