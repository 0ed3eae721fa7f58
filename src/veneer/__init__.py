"""veneer: parameter-efficient fine-tuning of PyTorch models.

Every public name is loaded when it is first asked for: `import veneer` costs what importing torch costs. Those of methods are in their files.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ._version import __version__ as __version__

_HOME: dict[str, str] = {
    name: module
    for module, names in {
        "auto": "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
        "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification",
        "change": "Change",
        "checkpoint": "get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict set_peft_model_state_dict",
        "config": "PeftConfig PeftConfigMixin PromptLearningConfig",
        "engine.loss": "MergeReport",
        "filemerge": "merge_files",
        "arrow": "create_arrow_model",
        "convert": "convert_to_lora save_as_lora",
        "engine.combine": "CombineReport",
        "errors": "ConfigError ConversionError LoadError MergeError NoMatchingPeftModuleError PeftError PeftWarning RouteError SaveError SwapError",
        "functional": "shift_tokens_right",
        "helpers": "cast_mixed_precision_params prepare_model_for_kbit_training",
        "kappa": "find_kappa_target_modules",
        "inits": "CordaConfig EvaConfig LoftQConfig LoraGAConfig get_eva_state_dict initialize_lora_eva_weights preprocess_corda preprocess_loraga "
        "replace_lora_weights_loftq",
        "mapping": "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING get_peft_config get_peft_model "
        "inject_adapter_in_model",
        "method": "Leaf Method",
        "mixed": "PeftMixedModel",
        "model": "PeftModel",
        "planning.inspection": "inspect_adapter",
        "planning.plan": "plan",
        "prompts.postprocess": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value",
        "planning.suggest": "suggest",
        "status": "get_layer_status get_model_status",
        "tasks": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
        "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification",
        "types": "PeftType TaskType",
        "variants": "ArrowConfig BdLoraConfig KasaConfig MontecloraConfig VeloraConfig",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return ["__version__", *sorted({*_HOME, *_methods().public_names()})]
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    elif not name[:1].isalpha():
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    elif importlib.util.find_spec(f"{__name__}.{name}") is not None:
        value = importlib.import_module(f"{__name__}.{name}")
    elif (value := _methods().public_name(name)) is None:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    globals()[name] = value
    return value


def _methods() -> Any:
    return importlib.import_module(f"{__name__}.method")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
