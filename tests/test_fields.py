"""Every field of every weight method's config acts, or is refused, or is said to have no effect."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from veneer.errors import ConfigError, PeftWarning
from veneer.method import Method, Targeted, load_methods
from veneer.testing import Case, examples, sites_of
from veneer.testing.laws import move

METHODS: list[Any] = [m for m in load_methods().values() if issubclass(m, Method)]
COMMON = {f.name for f in dataclasses.fields(Targeted)} - {"init_weights"}

_ASA = {"num_subspaces": 3, "use_asa": True, "init_warmup": 0, "final_warmup": 4, "mask_interval": 1, "asa_target_subspaces": 1}
# (method, field): (what stands beside it, a value of the field[, the value it is compared with]), where the rule of `_other` finds none that tells
VALUES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("AdaLoraConfig", "beta1"): ({"target_r": 1}, 0.0),
    ("AdaLoraConfig", "beta2"): ({"target_r": 1, "beta1": 0.5}, 0.0, 0.99),
    ("AdaLoraConfig", "loftq_config"): ({}, {"loftq_bits": 4}),
    ("AdaLoraConfig", "deltaT"): ({"target_r": 1}, 2),
    ("AdaLoraConfig", "target_r"): ({}, 1),
    ("AdaLoraConfig", "rank_pattern"): ({}, {"site.lora_E": [True, False, True, False]}),
    ("AdaLoraConfig", "tinit"): ({"target_r": 1}, 2),
    ("AdaLoraConfig", "tfinal"): ({"target_r": 1}, 7),
    ("AdamssConfig", "asa_importance_beta"): (_ASA, 0.0, 0.99),
    ("AdamssConfig", "asa_schedule_exponent"): (_ASA, 1.0, 9.0),
    ("AdamssConfig", "asa_target_subspaces"): (_ASA, 2),
    ("AdamssConfig", "final_warmup"): (_ASA, 6),
    ("AdamssConfig", "init_warmup"): (_ASA, 2),
    ("AdamssConfig", "mask_interval"): (_ASA, 3),
    ("AdamssConfig", "svd_threshold"): ({"use_dynamic_rank": True}, 0.9999, 1e-9),
    ("AdamssConfig", "use_asa"): (_ASA, True, False),
    ("AdamssConfig", "use_dynamic_rank"): ({"svd_threshold": 0.9999}, True),
    ("BOFTConfig", "boft_block_num"): ({"boft_block_size": 0}, 2, 3),
    ("BOFTConfig", "boft_block_size"): ({}, 6),
    ("C3AConfig", "block_size"): ({}, 2),
    ("C3AConfig", "block_size_pattern"): ({}, {"site": 2}),
    ("DeftConfig", "alpha"): ({}, 5),
    ("DeftConfig", "decomposition_method"): ({}, "qr"),
    ("DeftConfig", "init_scale"): ({"init_weights": False}, 2.0),
    ("FourierFTConfig", "random_loc_seed"): ({}, 1),
    ("GloraConfig", "config_A_B"): ({}, "vector"),
    ("GloraConfig", "config_C"): ({}, "none"),
    ("GloraConfig", "config_D_E"): ({}, "vector"),
    ("GraloraConfig", "gralora_k"): ({}, 4),
    ("IA3Config", "feedforward_modules"): ({"target_modules": ["site"]}, ["site"]),
    ("LoHaConfig", "use_effective_conv2d"): ({"site": "conv2d"}, True),
    ("LoKrConfig", "use_effective_conv2d"): ({"site": "conv2d", "r": 1}, True),
    ("LoKrConfig", "decompose_both"): ({"r": 1}, True),
    ("LoKrConfig", "decompose_factor"): ({}, 4),
    ("LoKrConfig", "rank_dropout_scale"): ({"rank_dropout": 0.5}, True),
    ("MissConfig", "mini_r"): ({"init_weights": "mini"}, 2, 4),
    ("OFTConfig", "eps"): ({"coft": True}, 0.1),
    ("OFTConfig", "oft_block_size"): ({}, 6),
    ("OFTConfig", "r"): ({"oft_block_size": 0}, 2, 3),
    ("OFTConfig", "num_cayley_neumann_terms"): ({}, 2),
    ("PeanutConfig", "act_fn"): ({}, "relu"),
    ("PsoftConfig", "ab_svd_init"): ({"psoft_mag_a": False, "psoft_orth": False}, "pissa_init"),
    ("PsoftConfig", "cayley_neumann_eps"): ({"use_cayley_neumann": True}, 0.1),
    ("PsoftConfig", "num_cayley_neumann_terms"): ({"use_cayley_neumann": True}, 2),
    ("PsoftConfig", "psoft_svd"): ({"psoft_svd_lowrank_niter": 0}, "lowrank"),
    ("PsoftConfig", "psoft_svd_lowrank_niter"): ({"psoft_svd": "lowrank"}, 0),
    ("PsoftConfig", "random_seed"): ({"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 0}, 1),
    ("PolyConfig", "n_splits"): ({}, 4),
    ("PolyConfig", "n_tasks"): ({}, 3),
    ("PveraConfig", "generator_seed"): ({}, 3),
    ("RoadConfig", "group_size"): ({}, 2),
    ("RoadConfig", "variant"): ({}, "road_2"),
    ("SupertuningConfig", "lora_dropout"): ({"r": 2}, 0.5),
    ("ShadowConfig", "shadow_num_hidden_layers"): ({}, 2),
    ("ShadowConfig", "shadow_hidden_size"): ({}, 8),
    ("ShadowConfig", "update_hidden_size"): ({}, 7),
    ("XLoraConfig", "top_k_lora"): ({}, 1),
    ("TinyLoraConfig", "init_v_bound"): ({"init_weights": "uniform"}, 0.5),
    ("TrainableTokensConfig", "token_indices"): ({}, [1, 2]),
    ("WaveFTConfig", "n_frequency"): ({"proportional_parameters": False}, 11),
    ("WaveFTConfig", "proportional_parameters"): ({"n_frequency": 9, "n_frequency_pattern": {"site": 5}}, True),
    ("WaveFTConfig", "random_loc_seed"): ({}, 1),
    ("WaveFTConfig", "wavelet_family"): ({}, "db2"),
}
# fields that this small world cannot show at work, with where that is shown
ELSEWHERE: dict[str, dict[str, str]] = {
    "AdaLoraConfig": {
        "trainable_token_indices": "no table in the model: test_model_api",
        "ensure_weight_tying": "no tied weights in the model: test_model_api",
        "megatron_core": "says what megatron_config, which is refused, would take",
        "qalora_group_size": "of use_qalora, which is refused",
        "runtime_config": "of this run only",
        "total_step": "required",
    },
    "AdamssConfig": {"asa_uncertainty_beta": "of schedules.Importance, as AdaLoRA's beta2"},
    "FrodConfig": {
        "progressbar": "it shows, and changes nothing",
        "regularization_alpha": "the basis of one layer alone is the same whatever it is",
    },
    "AdaptionPromptConfig": {"adapter_layers": "one layer: test_blocks"},
    "LilyConfig": {"stride_A": "one layer has no neighbours: test_methods_lily"},
    "ShadowConfig": {
        "shadow_model": "the name of a model to load: test_blocks",
        "share_embeddings": "no table in the model: test_blocks",
        "auxiliary_loss_weight": "no labels: test_blocks",
        "shadow_num_attention_heads": "the blocks have no attention: test_blocks",
        "shadow_intermediate_size": "the blocks have no layer between: test_blocks",
    },
    "XLoraConfig": {"hidden_size": "filled from the model: test_methods_xlora", "layerwise_scalings": "one layer: test_methods_xlora"},
    "TinyLoraConfig": {"weight_tying": "one layer has no neighbours"},
    "LoraConfig": dict.fromkeys((
        "trainable_token_indices", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config",
        "layer_replication", "runtime_config", "target_parameters", "use_bdlora", "kasa_config", "ensure_weight_tying", "megatron_core",
        "qalora_group_size",
    ), "test_inits, test_methods_variants, test_model_api, test_select"),
}  # fmt: skip


def _other(default: Any, name: str) -> Any:
    """Another value for a field, by its present one."""
    if name.endswith("pattern"):
        return {"site": 2}
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default + 0.5
    return "something else" if default is None or isinstance(default, str) else None


def _cases() -> list[Any]:
    skip = {m: COMMON | set(ELSEWHERE.get(m.__name__, {})) for m in METHODS}
    names = {m: [n for n in m(**m.examples[0]).to_dict() if n not in skip[m]] for m in METHODS}
    return [pytest.param(m, n, id=f"{m.__name__}-{n}") for m in METHODS for n in names[m]]


@pytest.mark.parametrize(("method", "name"), _cases())
def test_field_acts(method: Any, name: str) -> None:
    beside, *values = VALUES.get((method.__name__, name), ({},))
    beside = dict(beside)
    site = beside.pop("site", "linear" if "linear" in method.kinds else sites_of(examples(method)[0])[0])
    first = {**method.examples[0], **beside}
    if len(values) == 2:
        first[name] = values[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        one = method(**first)
        before = _seen(one, site)
        try:
            after = _seen(method(**{**first, name: values[0] if values else _other(getattr(one, name), name)}), site)
        except (ConfigError, PeftWarning) as e:
            assert name in str(e)  # refused, or said to have no effect, by its name
            return
    assert set(before) != set(after) or any(not torch.equal(before[k], after[k]) for k in before), f"`{name}` is ignored"


def _seen(config: Method, site: str) -> dict[str, torch.Tensor]:
    """All that a user sees of an adapter: its tensors, its outputs in both modes, its file, and what training makes of it."""
    case = Case(config, site)
    model = case.fresh()
    out = {f"start {k}": v.clone() for k, v in model.state_dict().items()}
    move(model)
    x = case.inputs()
    out["output"] = case.run(model.eval(), x).detach()
    model.train()
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for i in range(6):
        y = case.run(model, x)
        out[f"output {i}"] = y.detach()
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
    out |= {f"end {k}": v for k, v in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return out | {f"file {k}": v for k, v in load_file(Path(folder) / "adapter_model.safetensors").items()}


def test_all_methods_have_examples() -> None:
    assert all(examples(m) for m in METHODS)
