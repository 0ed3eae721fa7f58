"""EVA: A from the directions in which a layer's inputs vary most, and the ranks where they explain most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError


@dataclass
class EvaConfig:
    """Options of the EVA start.

    Args:
        rho: a layer's rank may grow to rho · r;  1 keeps all ranks.
        tau: cosine similarity from which on a layer's directions count as settled.
        use_label_mask, label_mask_value: leave out positions whose label has this value.
        whiten: divide the directions by their singular values.
        adjust_scaling_factors: change alpha with the rank, so that alpha / r stays.
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
class _Spectrum:
    """The running decomposition of one layer's inputs: X ≈ · S V, over all rows seen so far."""

    k: int
    s: Tensor | None = None
    v: Tensor | None = None
    energy: float = 0.0
    count: int = 0
    settled: bool = False

    def update(self, x: Tensor, tau: float) -> None:
        x = x.float()
        self.energy += float(x.square().sum())
        self.count += x.shape[0]
        stacked = x if self.v is None or self.s is None else torch.cat([self.s.unsqueeze(1) * self.v, x])
        _, s, v = torch.linalg.svd(stacked, full_matrices=False)
        s, v = s[: self.k], v[: self.k]
        if self.v is not None and self.v.shape == v.shape:
            self.settled = bool((torch.nn.functional.cosine_similarity(self.v, v, dim=1).abs() >= tau).all())
        self.s, self.v = s, v


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """Run the model on a batch that is a dict of its arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Any], peft_config: Any) -> Tensor:
    """(row, position) of every position that counts: attended to, and with a label where labels are asked for."""
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

    Paischer et al. 2024, arXiv:2410.07170, algorithm 1: the inputs' singular vectors batch by batch, until they settle or the data end.

    Args:
        model: a PeftModel with an adapter of init_lora_weights="eva", or a bare model with `peft_config`.
        prepare_layer_inputs_fn: turns a layer's input into rows; a dict gives one per layer name. None: flattened as it is.

    Raises:
        ConfigError: if the config is not for EVA, or no data come.
    """
    layers, config = _layers(model, peft_config, adapter_name)
    options = config.eva_config
    if options is None or config.init_lora_weights != "eva":
        raise ConfigError('EVA needs LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(...)).')
    spectra = {n: _Spectrum(max(1, round(config.at(n).r * options.rho))) for n in layers}
    current: list[Any] = [None]
    done_with: dict[int, tuple[Tensor, _Spectrum]] = {}  # layers that read the very same tensor share its decomposition

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            spectrum = spectra[name]
            x = args[0]
            twin = done_with.get(id(x))
            if twin is not None and twin[1].k == spectrum.k:
                spectra[name] = twin[1]
                return
            done_with[id(x)] = (x, spectrum)
            if spectrum.settled:
                return
            prepare = prepare_layer_inputs_fn.get(name) if isinstance(prepare_layer_inputs_fn, dict) else prepare_layer_inputs_fn
            rows = x if prepare is None else prepare(args, current[0], name)
            spectrum.update(_gathered(rows.detach().reshape(-1, rows.shape[-1]), gather_distributed_inputs), options.tau)

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in layers.items()]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _off(model):
            for batch in _shown(dataloader, show_progress_bar):
                moved = _moved(batch, next(model.parameters()).device)
                current[0] = prepare_model_inputs_fn(moved, config) if prepare_model_inputs_fn is not None else moved
                done_with.clear()
                (forward_fn or forward_fn_dict)(model, moved)
                if all(s.settled for s in spectra.values()):
                    break
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    unseen = [n for n, s in spectra.items() if s.v is None]
    if unseen:
        raise ConfigError(
            f"The data never reached {unseen[0]!r} (and {len(unseen) - 1} more); EVA needs at least one batch that runs every target."
        )
    ranks = _deal(spectra, {n: config.at(n).r for n in layers}, options.rho)
    return {n: _directions(spectra[n], ranks[n], options.whiten) for n in layers}


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
    """Give a PeftModel's EVA adapter its start, from data or from what `get_eva_state_dict` gave; layers dealt no rank lose the adapter.

    Raises:
        ConfigError: if neither data nor a state dict is given, or the model has no such adapter.
    """
    if dataloader is None and eva_state_dict is None:
        raise ConfigError("Give a dataloader, or an eva_state_dict computed before: EVA's start comes from data.")
    layers, config = _adapted(model, adapter_name)
    if eva_state_dict is None:
        assert dataloader is not None
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name, gather_distributed_inputs, show_progress_bar
        )  # fmt: skip
    names = {n.removeprefix("base_model.model."): a for n, a in eva_state_dict.items()}
    missing = [n for n in layers if n not in names]
    if missing:
        raise ConfigError(f"The eva_state_dict has nothing for {missing[0]!r} (and {len(missing) - 1} more).")
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        a = names[name]
        here = config.at(name)
        r = a.shape[0]
        if r == 0:
            layer.delete_adapter(adapter_name)
            continue
        alpha = here.lora_alpha * r / here.r if config.eva_config.adjust_scaling_factors else here.lora_alpha
        if config.use_rslora and config.eva_config.adjust_scaling_factors:
            alpha = here.lora_alpha * (r / here.r) ** 0.5
        layer.replace_leaves(
            adapter_name,
            {"lora_A": a, "lora_B": torch.zeros(layer.site.n_out, r)},
            {"r": r, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}},
        )
        ranks[name], alphas[name] = r, alpha
    config.rank_pattern = {n: r for n, r in ranks.items() if r != config.r}
    config.alpha_pattern = {n: x for n, x in alphas.items() if x != config.lora_alpha}
    config.target_modules = set(ranks)


def _adapted(model: nn.Module, adapter_name: str) -> tuple[dict[str, Any], Any]:
    from ..engine.inject import adapted_layers

    root = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    layers = {n: m for n, m in adapted_layers(root) if adapter_name in m.attached}
    config = getattr(model, "peft_config", {}).get(adapter_name)  # type: ignore[union-attr]
    if not layers or config is None or config.eva_config is None:
        raise ConfigError(f'The model has no adapter {adapter_name!r} of LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(...)).')
    return layers, config


def _layers(model: nn.Module, config: Any, adapter_name: str) -> tuple[dict[str, nn.Module], Any]:
    if config is None:
        return _adapted(model, adapter_name)
    from .corda import _targets

    return dict(_targets(model, config)), config


def _off(model: nn.Module) -> Any:
    from ..engine.route import disabled

    return disabled(model)


def _deal(spectra: Mapping[str, _Spectrum], wanted: Mapping[str, int], rho: float) -> dict[str, int]:
    """Ranks within the sum of the wanted ones, to the directions that explain the largest share of their layer's inputs."""
    if rho == 1:
        return dict(wanted)
    shares = []
    for name, s in spectra.items():
        assert s.s is not None
        shares += [(float(v) / max(s.energy, 1e-30), name) for v in s.s.square()]
    shares.sort(key=lambda pair: -pair[0])
    ranks = dict.fromkeys(spectra, 0)
    for _, name in shares[: sum(wanted.values())]:
        ranks[name] += 1
    return ranks


def _directions(s: _Spectrum, rank: int, whiten: bool) -> Tensor:
    assert s.v is not None and s.s is not None
    v = s.v[:rank]
    return (v / (s.s[:rank].unsqueeze(1) / max(s.count, 1) ** 0.5).clamp_min(1e-12) if whiten else v).contiguous().clone()


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


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
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
