"""veneer: parameter-efficient fine-tuning of PyTorch models.

Every public name is loaded when it is first asked for: `import veneer` costs what importing torch costs.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._version import __version__

_HOME: dict[str, str] = {
    name: module
    for module, names in {
        "auto": "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
        "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification",
        "change": "Change",
        "checkpoint": "get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict set_peft_model_state_dict",
        "config": "PeftConfig PeftConfigMixin PromptLearningConfig",
        "engine.merge": "MergeReport",
        "errors": "ConfigError LoadError MergeError NoMatchingPeftModuleError PeftError PeftWarning RouteError SaveError",
        "helpers": "cast_mixed_precision_params",
        "inits": "CordaConfig EvaConfig LoftQConfig LoraGAConfig get_eva_state_dict initialize_lora_eva_weights preprocess_corda preprocess_loraga "
        "replace_lora_weights_loftq",
        "mapping": "get_peft_config get_peft_model inject_adapter_in_model",
        "method": "Leaf Method",
        "methods.adalora": "AdaLoraConfig",
        "methods.beft": "BeftConfig",
        "methods.c3a": "C3AConfig",
        "methods.delora": "DeloraConfig",
        "methods.fourierft": "FourierFTConfig",
        "methods.glora": "GloraConfig",
        "methods.hira": "HiraConfig",
        "methods.hra": "HRAConfig",
        "methods.ia3": "IA3Config",
        "methods.loha": "LoHaConfig",
        "methods.lora": "LoraConfig LoraRuntimeConfig",
        "methods.oft": "OFTConfig",
        "methods.osf": "OSFConfig",
        "methods.peanut": "PeanutConfig",
        "methods.psoft": "PsoftConfig",
        "methods.road": "RoadConfig",
        "methods.shira": "ShiraConfig",
        "methods.trainable_tokens": "TrainableTokensConfig",
        "methods.vera": "VeraConfig",
        "model": "PeftModel",
        "prompts.cartridge": "CartridgeConfig CartridgeEncoder compose_cartridge_adapters initialize_kv_prefix_from_past_key_values "
        "initialize_kv_prefix_from_text",
        "prompts.cpt": "CPTConfig CPTEmbedding",
        "prompts.multitask": "MultitaskPromptTuningConfig MultitaskPromptTuningInit",
        "prompts.p_tuning": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
        "prompts.prefix": "PrefixEncoder PrefixTuningConfig",
        "prompts.prompt_tuning": "PromptEmbedding PromptTuningConfig PromptTuningInit",
        "status": "get_layer_status get_model_status",
        "tasks": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
        "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification",
        "types": "PeftType TaskType",
        "variants": "BdLoraConfig KasaConfig MontecloraConfig VeloraConfig",
    }.items()
    for name in names.split()
}
# a method's tuner class: LoraModel of LoraConfig
_HOME |= {
    name[:-6] + "Model": "tuner"
    for name, home in _HOME.items()
    if home.startswith("methods.") and name.endswith("Config") and "Runtime" not in name
}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604  names, all strings


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
