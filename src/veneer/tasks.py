"""PeftModel per task: the forward's arguments by name, so that trainers and pipelines see what the model takes."""

from __future__ import annotations

from typing import Any

from .model import PeftModel


def _given(**arguments: Any) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if v is not None}


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier with adapters; its head (`classifier` or `score`) is trained whole."""

    def __init__(self, model: Any, peft_config: Any, adapter_name: str = "default", **kwargs: Any) -> None:
        _train_heads(peft_config, ["classifier", "score"])
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        empty: bool = False,
    ) -> None:
        """Attach one more adapter, with a head of its own."""
        _train_heads(peft_config, ["classifier", "score"])
        super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype, empty=empty)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = _given(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict, task_ids=task_ids,
        )  # fmt: skip
        return super().forward(**given, **kwargs)


class PeftModelForTokenClassification(PeftModelForSequenceClassification):
    """A token classifier with adapters; its head is trained whole."""


class PeftModelForCausalLM(PeftModel):
    """A language model with adapters."""

    def __init__(self, model: Any, peft_config: Any, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.base_model_prepare_inputs_for_generation = getattr(model, "prepare_inputs_for_generation", None)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = _given(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict, task_ids=task_ids,
        )  # fmt: skip
        return super().forward(**given, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        """The user's model's own preparation of the next step's inputs."""
        model: Any = self.get_base_model()
        return model.prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder with adapters."""

    def __init__(self, model: Any, peft_config: Any, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.base_model_prepare_inputs_for_generation = getattr(model, "prepare_inputs_for_generation", None)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        decoder_inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = _given(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask, decoder_inputs_embeds=decoder_inputs_embeds, labels=labels,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict, task_ids=task_ids,
        )  # fmt: skip
        return super().forward(**given, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        """The user's model's own preparation of the next step's inputs."""
        model: Any = self.get_base_model()
        return model.prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question answerer with adapters; its head (`qa_outputs`) is trained whole."""

    def __init__(self, model: Any, peft_config: Any, adapter_name: str = "default", **kwargs: Any) -> None:
        _train_heads(peft_config, ["qa_outputs"])
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        empty: bool = False,
    ) -> None:
        """Attach one more adapter, with a head of its own."""
        _train_heads(peft_config, ["qa_outputs"])
        super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype, empty=empty)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = _given(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids,
            inputs_embeds=inputs_embeds, start_positions=start_positions, end_positions=end_positions,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict, task_ids=task_ids,
        )  # fmt: skip
        return super().forward(**given, **kwargs)


class PeftModelForFeatureExtraction(PeftModel):
    """An encoder with adapters."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = _given(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict, task_ids=task_ids,
        )  # fmt: skip
        return super().forward(**given, **kwargs)


def _train_heads(config: Any, names: list[str]) -> None:
    """Have the task's head trained and saved, as PEFT does, on the config object itself."""
    if hasattr(config, "modules_to_save"):
        mine = list(config.modules_to_save or ())
        config.modules_to_save = mine + [n for n in names if n not in mine]


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}
