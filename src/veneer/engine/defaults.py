"""Fixed names and the tables of targets by model type, for configs that name no targets themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
DUMMY_TARGET_MODULES = "dummy-target-modules"  # adapts nothing: for methods that only route other adapters
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20

ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]

# Their fused kernels read the weights of these modules directly, so an adapter on them would not act.
MAMBA_MODEL_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h", "bamba", "granitemoehybrid", "zamba2"})
MAMBA_BARE_MODULES = frozenset({"out_proj", "conv1d"})
MAMBA_BARE_STEPS = frozenset({"falcon_mamba", "jamba"})  # whose dt_proj is called in quantised models alone

# The heads that a task adds to modules_to_save; a model has one of them at most.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

Table = dict[str, list[str] | str]


def _table(rows: Mapping[str, str]) -> Table:
    """Turns rows of targets -> the model types they hold for (both separated by blanks) into model type -> targets."""
    return {model_type: targets.split() for targets, model_types in rows.items() for model_type in model_types.split()}


def _like(base: Table, rows: Mapping[str, str] = MappingProxyType({}), *, without: str = "", only: str = "") -> Table:
    """`base` without some model types (or with only some), and with other targets for those in `rows`."""
    gone, kept = without.split(), only.split() or list(base)
    return {k: v if isinstance(v, str) else list(v) for k, v in base.items() if k in kept and k not in gone} | _table(rows)


_QV, _FUSED = "q_proj v_proj", "query_key_value"
_ALL_PROJ = "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj"
_OPT_ALL = "q_proj k_proj v_proj out_proj fc1 fc2"
_LLAMA_NORMS = "input_layernorm post_attention_layernorm norm"
_GEMMA_NORMS = "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm"
_GPT2_MLP = {"mlp.c_proj": "gpt2 gpt_bigcode"}

_LORA: Table = _table(
    {
        "q v": "t5 mt5",
        _QV: "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
        "q v q_proj v_proj": "blip-2",
        "c_attn": "gpt2 gpt_bigcode",
        _FUSED: "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
        "query value": "bert roberta xlm-roberta electra layoutlm",
        "query_proj value_proj": "deberta-v2",
        "in_proj": "deberta",
        "Wqkv": "mpt",
        "c_proj c_attn": "btlm",
        "qkv_proj": "codegen",
        "q_proj v_proj fc1 fc2": "phi",
        "q_proj k_proj v_proj o_proj": "nemotron_h",
        "key value receptance output": "rwkv",
        "r_proj k_proj v_proj o_proj key value": "rwkv7",
    }
) | {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}

_ADALORA: Table = _like(
    _LORA,
    {
        "q k v o wi wo": "t5",
        "q k v o wi_0 wi_1 wo": "mt5",
        _OPT_ALL: "bart opt",
        "query key value dense": "roberta",
        "query_proj key_proj value_proj dense": "deberta-v2",
    },
    only="gpt2 bloom gptj gpt_neox gpt_neo llama llama4 bert deberta gpt_bigcode gemma gemma2 gemma3_text gemma4 qwen2 qwen3 nemotron_h",
)

_IA3: Table = _table(
    {
        "k v wo": "t5",
        "k v wi_1": "mt5",
        "c_attn mlp.c_proj": "gpt2 gpt_bigcode",
        "query_key_value mlp.dense_4h_to_h": "bloom",
        "key value output.dense": "roberta bert",
        "q_proj k_proj fc2": "opt",
        "q_proj v_proj fc_out": "gptj",
        "query_key_value dense_4h_to_h": "gpt_neox RefinedWebModel RefinedWeb falcon",
        "q_proj v_proj c_proj": "gpt_neo",
        "q_proj v_proj fc2": "bart phi",
        "k_proj v_proj down_proj": "llama mistral",
        "q_proj v_proj down_proj": "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
        "k_proj v_proj w2": "mixtral",
        "key_proj value_proj output.dense": "deberta-v2",
        "in_proj output.dense": "deberta",
    }
)

_ONLY_V: Table = _table(
    {
        "v": "t5 mt5",
        "value": "roberta bert",
        "value_proj": "deberta-v2",
        "v_proj": "opt gptj gpt_neo bart llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 qwen3",
    }
)

_NORMS: Table = _table(
    {
        _LLAMA_NORMS: "llama mistral gemma",
        _GEMMA_NORMS: "gemma2 gemma3_text",
        "input_layernorm post_attention_layernorm ln_f": "bloom falcon",
        f"multi_modal_projector {_LLAMA_NORMS} embed_tokens lm_head": "llava",
        "layer_norm final_layer_norm": "t5 mt5",
        "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
        "ln_1 ln_2 ln_f": "gpt2",
        "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
        "ln_1 ln_f": "gptj",
        "input_layernorm final_layernorm": "phi",
        "post_attention_layernorm": "qwen2 qwen3",
    }
)

_OSF: Table = _table(
    {
        _ALL_PROJ: "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi",
        "c_attn c_proj": "gpt2 gpt_bigcode",
        "query_key_value dense_4h_to_h": "bloom gpt_neox falcon",
        _OPT_ALL: "opt",
        "q_proj k_proj v_proj out_proj fc_in fc_out": "gptj",
    }
)

_AS_LORA = "BOFT DEFT DELORA GLORA GRALORA HIRA HRA LILY LOHA LOKR MISS OFT PEANUT POLY PSOFT RANDLORA ROAD SUPERTUNING TINYLORA UNILORA"

TABLES: dict[str, Table] = {
    "LORA": _LORA,
    **{peft_type: _like(_LORA) for peft_type in _AS_LORA.split()},
    "ADALORA": _ADALORA,
    "ADAMSS": _like(_LORA, {"query value": "vit"}),
    "BEFT": _ONLY_V,
    "C3A": _like(_LORA, _GPT2_MLP),
    "FOURIERFT": _like(_LORA, _GPT2_MLP),
    "FROD": _like(_LORA, {_QV: "phi", "query value": "vit"}),
    "IA3": _IA3,
    "LN_TUNING": _NORMS,
    "OSF": _OSF,
    "PVERA": _like(_LORA, {_QV: "phi", "query value": "dinov2"}),
    "SHIRA": _like(_LORA, {_QV: "phi"}),
    "VBLORA": _like(_ADALORA, {"query value": "roberta"}),
    "VERA": _like(_LORA, {_QV: "phi"}),
    "WAVEFT": _like(_LORA, _GPT2_MLP, without="btlm rwkv rwkv7"),
}
"""Targets by PEFT type and model type: ends of names, or a regular expression for the whole name. May be added to."""

IA3_FEEDFORWARD: Table = _table(
    {
        "wo": "t5",
        "mlp.c_proj": "gpt2 gpt_bigcode",
        "mlp.dense_4h_to_h": "bloom",
        "output.dense": "roberta bert deberta-v2 deberta",
        "fc2": "opt bart phi",
        "fc_out": "gptj",
        "dense_4h_to_h": "gpt_neox RefinedWeb RefinedWebModel falcon",
        "c_proj": "gpt_neo",
        "down_proj": "llama llama4 mistral gemma gemma2 gemma3_text qwen2 qwen3",
        "w2": "mixtral",
    }
) | {"mt5": []}
"""Which of IA3's targets scale their input, by model type."""


def table_targets(peft_type: str, model_type: str) -> list[str] | str | None:
    """The targets of a method for a model type such as `llama`, or None if no table has it.

    Args:
        peft_type: as in adapter_config.json, `"LORA"`; types without a table of their own have none.
        model_type: `model.config.model_type` of a transformers model.
    """
    found = TABLES.get(peft_type, {}).get(model_type)
    return list(found) if isinstance(found, list) else found


def constant_names() -> Iterable[str]:
    """PEFT's names of the tables, all of them attributes of this module."""
    return [*(f"TRANSFORMERS_MODELS_TO_{t.replace('_', '')}_TARGET_MODULES_MAPPING" for t in TABLES), _FEEDFORWARD_NAME]


_FEEDFORWARD_NAME = "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"


def __getattr__(name: str) -> Table:
    """PEFT's names of the tables: the same dictionaries, so what a user adds there counts."""
    if name == _FEEDFORWARD_NAME:
        return IA3_FEEDFORWARD
    for peft_type, table in TABLES.items():
        if name == f"TRANSFORMERS_MODELS_TO_{peft_type.replace('_', '')}_TARGET_MODULES_MAPPING":
            return table
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
