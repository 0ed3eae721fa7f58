"""Which name of veneer's stands under which module and name of PEFT's."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

_CONSTANTS = (
    "ALLOWED_COMPUTE_DTYPES CONFIG_NAME DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND "
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION SAFETENSORS_WEIGHTS_NAME SEQ_CLS_HEAD_NAMES TOKENIZER_CONFIG_NAME UPCAST_DTYPES WEIGHTS_NAME"
)

# PEFT's module -> the room of veneer that has the names -> the names, `theirs=ours` where they differ
_MODULES: dict[str, dict[str, str]] = {
    "auto": {"": "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
             "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification"},
    "config": {"config": "PeftConfig PeftConfigMixin PromptLearningConfig"},
    "functional": {
        "functional": "cast_adapter_dtype delete_adapter set_adapter set_requires_grad",
        "checkpoint": "get_peft_model_state_dict set_peft_model_state_dict",
        "mapping": "inject_adapter_in_model",
    },
    "helpers": {
        "helpers": "DoraCaching KappaTuneSelector MontecloraTrainerMixin check_if_peft_model disable_input_dtype_casting find_kappa_target_modules "
        "rescale_adapter_scale update_forward_signature update_generate_signature update_signature",
    },
    "mapping": {
        "mapping": "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING get_peft_config inject_adapter_in_model",
        "compat.layers": "PEFT_TYPE_TO_PREFIX_MAPPING",
    },
    "mapping_func": {"mapping": "get_peft_model", "tasks": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING"},
    "mixed_model": {"mixed": "PeftMixedModel"},
    "optimizers": {"optimizers": "create_loraplus_optimizer create_lorafa_optimizer create_riemannian_optimizer"},
    "optimizers.loraplus": {"optimizers": "create_loraplus_optimizer"},
    "optimizers.lorafa": {"optimizers": "create_lorafa_optimizer"},
    "optimizers.riemannian": {"optimizers": "create_riemannian_optimizer"},
    "peft_model": {
        "model": "PeftModel",
        "tasks": "PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM "
        "PeftModelForSequenceClassification PeftModelForTokenClassification",
        "status": "TunerLayerStatus TunerModelStatus get_layer_status get_model_status",
    },
    "tuners.adamss.asa_callback": {"methods.adamss": "AdamssAsaCallback"},
    "tuners.cartridge.utils": {
        "prompts.cartridge": "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
        "prompt_embeddings_from_past_key_values",
    },
    "tuners.lora": {
        "": "ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig LoraRuntimeConfig MontecloraConfig VeloraConfig CordaConfig "
        "convert_to_lora save_as_lora create_arrow_model get_eva_state_dict initialize_lora_eva_weights preprocess_corda preprocess_loraga",
        "compat.layers": "Linear Embedding Conv1d Conv2d Conv3d MultiheadAttention ParamWrapper",
    },
    "tuners.lora.arrow": {"arrow": "create_arrow_model"},
    "tuners.lora.config": {
        "": "ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig LoraRuntimeConfig MontecloraConfig VeloraConfig",
    },
    "tuners.lora.conversion": {"convert": "convert_to_lora save_as_lora"},
    "tuners.lora.corda": {"inits.corda": "CordaEigens preprocess_corda"},
    "tuners.lora.eva": {"inits": "get_eva_state_dict initialize_lora_eva_weights"},
    "tuners.lora.intruders": {"intruders": "reduce_intruder_dimension"},
    "tuners.lora.layer": {"compat.layers": "Linear Embedding Conv1d Conv2d Conv3d MultiheadAttention ParamWrapper"},
    "tuners.lora.loraga": {"inits": "preprocess_loraga"},
    "tuners.lokr.layer": {"methods.lokr": "factorization"},
    "tuners.tuners_utils": {
        "compat.layers": "BaseTunerLayer",
        "tuner": "BaseTuner=Tuner",
        "functional": "cast_adapter_dtype delete_adapter set_adapter set_requires_grad",
    },
    "tuners.prompt_tuning": {"": "PromptEmbedding PromptTuningConfig PromptTuningInit"},
    "tuners.multitask_prompt_tuning": {"": "MultitaskPromptTuningConfig MultitaskPromptTuningInit",
                                       "prompts.multitask": "MultitaskPromptEmbedding"},
    "tuners.p_tuning": {"": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType"},
    "tuners.prefix_tuning": {"": "PrefixEncoder PrefixTuningConfig"},
    "tuners.cpt": {"": "CPTConfig CPTEmbedding"},
    "tuners.cartridge": {"": "CartridgeConfig CartridgeEncoder"},
    "utils": {
        "": "PeftType TaskType PeftError PeftWarning NoMatchingPeftModuleError cast_mixed_precision_params get_base_model_state_dict "
        "get_peft_model_state_dict load_peft_weights prepare_model_for_kbit_training replace_lora_weights_loftq set_base_model_state_dict "
        "set_peft_model_state_dict shift_tokens_right bloom_model_postprocess_past_key_value",
        "blocks.saved": "ModulesToSaveWrapper",
        "blocks.tokens": "TrainableTokensWrapper",
        "compat.layers": "AuxiliaryTrainingWrapper",
        "functional": "_get_submodules=submodules _set_adapter=set_adapter infer_device",
        "engine.defaults": _CONSTANTS,
    },
    "utils.constants": {"engine.defaults": _CONSTANTS},
    "utils.hotswap": {
        "hotswap": "check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap",
    },
    "utils.error": {"errors": "NoMatchingPeftModuleError PeftError PeftWarning"},
    "utils.loftq_utils": {"inits": "replace_lora_weights_loftq"},
    "utils.merge_utils": {
        "deltas.votes": "calculate_majority_sign_mask dare_linear dare_ties disjoint_merge magnitude_based_pruning magnitude_prune prune "
        "random_pruning reshape_weight_task_tensors task_arithmetic ties",
    },
    "utils.other": {
        "": "cast_mixed_precision_params prepare_model_for_kbit_training shift_tokens_right",
        "blocks.saved": "ModulesToSaveWrapper",
        "blocks.tokens": "TrainableTokensWrapper",
        "compat.layers": "AuxiliaryTrainingWrapper",
        "functional": "_get_submodules=submodules _set_adapter=set_adapter infer_device",
        "distributed": "fsdp_auto_wrap_policy",
    },
    "utils.peft_types": {"": "PeftType TaskType"},
    "utils.save_and_load": {
        "checkpoint": "get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict set_peft_model_state_dict",
    },
    "utils.transformers_weight_conversion": {
        "checkpoint.from_transformers": "build_peft_weight_mapping",
        "checkpoint.fused": "convert_peft_adapter_state_dict_for_transformers=fuse_tensors",
    },
}  # fmt: skip

# PEFT's folder of a weight method -> its config, then the attributes of its layers that hold tensors
METHODS: dict[str, str] = {
    "adalora": "AdaLoraConfig lora_A lora_B lora_E lora_embedding_A lora_embedding_B",
    "adamss": "AdamssConfig adamss_A adamss_B",
    "adaption_prompt": "AdaptionPromptConfig adaption_prompt adaption_gate",
    "beft": "BeftConfig beft_bias",
    "boft": "BOFTConfig boft_R boft_s",
    "c3a": "C3AConfig c3a_kernel",
    "deft": "DeftConfig deft_P deft_R",
    "delora": "DeloraConfig delora_A delora_B delora_lambda",
    "fourierft": "FourierFTConfig fourierft_spectrum",
    "frod": "FrodConfig frod_lambda_l frod_lambda_s_values",
    "glora": "GloraConfig glora_A glora_B glora_C glora_D glora_E",
    "gralora": "GraloraConfig gralora_A gralora_B gralora_A_general gralora_B_general",
    "hira": "HiraConfig hira_A hira_B hira_embedding_A hira_embedding_B",
    "hra": "HRAConfig hra_u",
    "ia3": "IA3Config ia3_l",
    "lily": "LilyConfig lily_A lily_B lily_router",
    "ln_tuning": "LNTuningConfig ln_tuning_layers",
    "loha": "LoHaConfig hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2",
    "lokr": "LoKrConfig lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2",
    "lora": "LoraConfig lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector",
    "miss": "MissConfig miss_block",
    "oft": "OFTConfig oft_R oft_embedding_R",
    "osf": "OSFConfig osf_svd_params",
    "peanut": "PeanutConfig peanut_A peanut_B peanut_encoders peanut_decoders",
    "poly": "PolyConfig poly_lora_A poly_lora_B poly_router",
    "psoft": "PsoftConfig psoft_R",
    "pvera": "PveraConfig pvera_lambda_b pvera_lambda_d",
    "randlora": "RandLoraConfig randlora_lambda randlora_gamma",
    "road": "RoadConfig road_theta road_alpha",
    "shadow": "ShadowConfig shadow_down shadow_up shadow_update_transform shadow_update_gate shadow_dropout",
    "shira": "ShiraConfig shira_weight",
    "supertuning": "SupertuningConfig supertuning_values supertuning_lora_A supertuning_lora_B",
    "tinylora": "TinyLoraConfig tinylora_v",
    "trainable_tokens": "TrainableTokensConfig trainable_tokens_delta",
    "unilora": "UniLoraConfig unilora_theta_d",
    "vblora": "VBLoRAConfig vblora_logits_A vblora_logits_B vblora_vector_bank",
    "vera": "VeraConfig vera_lambda_b vera_lambda_d",
    "waveft": "WaveFTConfig waveft_spectrum",
    "xlora": "XLoraConfig",
}


def layer_name(config: str) -> str:
    """What PEFT calls the layers of a method, from the name of its config."""
    return config.removesuffix("Config") + "Layer"


def resolve(home: str) -> Any:
    """The object at `room:name`."""
    room, _, name = home.partition(":")
    return getattr(importlib.import_module(f"veneer.{room}" if room else "veneer"), name)


def _pairs(names: str, room: str) -> Iterator[tuple[str, str]]:
    for name in names.split():
        theirs, _, ours = name.partition("=")
        yield theirs, f"{room}:{ours or theirs}"


def _table() -> dict[str, dict[str, str]]:
    import veneer

    from ..engine.defaults import constant_names

    table: dict[str, dict[str, str]] = {"peft": {n: f":{n}" for n in veneer.__all__ if n != "__version__"}, "peft.tuners": {}}
    for module, rooms in _MODULES.items():
        own = table.setdefault(f"peft.{module}", {})
        for room, names in rooms.items():
            own.update(_pairs(names, room))
    for folder, row in METHODS.items():
        config = row.split()[0]
        layer, model = layer_name(config), config.removesuffix("Config") + "Model"
        classes = {config: f":{config}", model: f":{model}", layer: f"compat.layers:{layer}"}
        for end, some in {"": (config, model, layer), ".config": (config,), ".model": (model,), ".layer": (layer,)}.items():
            table.setdefault(f"peft.tuners.{folder}{end}", {}).update({n: classes[n] for n in some})
        table["peft.tuners"].update({n: classes[n] for n in (config, model)})
    for module in [m for m in table if m.startswith("peft.tuners.") and m.count(".") == 2]:
        for name, at in table[module].items():  # of the prompts, and what LoRA has beside its config
            if name in table["peft"]:
                table["peft.tuners"].setdefault(name, at)
    for prompt, kind in (("prompt_tuning", "PromptTuning"), ("prefix_tuning", "PrefixTuning"), ("p_tuning", "PromptEncoder"), ("cpt", "CPT"),
                         ("multitask_prompt_tuning", "MultitaskPromptTuning"), ("cartridge", "Cartridge")):  # fmt: skip
        both = table[f"peft.tuners.{prompt}"]
        table[f"peft.tuners.{prompt}.config"] = {n: at for n, at in both.items() if n.startswith(kind) and n != kind}
        table[f"peft.tuners.{prompt}.model"] = {n: at for n, at in both.items() if n not in table[f"peft.tuners.{prompt}.config"]}
    for module in ("peft.utils", "peft.utils.constants"):
        table.setdefault(module, {}).update({n: f"engine.defaults:{n}" for n in constant_names()})
    return table


TABLE = _table()
