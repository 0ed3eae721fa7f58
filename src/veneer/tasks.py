"""PeftModel per task: the forward's arguments by name, so that trainers and pipelines see what the model takes."""

from __future__ import annotations

from typing import Any

from .model import PeftModel


def _given(**arguments: Any) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if v is not None}


def _forward(
    self: PeftModel,
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
    """The user's model's forward; see `PeftModel.forward`."""
    given = _given(
        input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels,
        output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict, task_ids=task_ids,
    )  # fmt: skip
    return PeftModel.forward(self, **given, **kwargs)


class _Generating(PeftModel):
    """Abstract: a model that writes text."""

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        """The user's model's own preparation of the next step's inputs."""
        model: Any = self.get_base_model()
        return model.prepare_inputs_for_generation(*args, **_given(task_ids=task_ids), **kwargs)


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier with adapters; its head (`classifier` or `score`) is trained whole."""

    heads = ("classifier", "score")
    forward = _forward


class PeftModelForTokenClassification(PeftModel):
    """A token classifier with adapters; its head is trained whole."""

    heads = ("classifier", "score")
    forward = _forward


class PeftModelForCausalLM(_Generating):
    """A language model with adapters."""

    forward = _forward


class PeftModelForSeq2SeqLM(_Generating):
    """An encoder-decoder with adapters."""

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
        """The user's model's forward; see `PeftModel.forward`."""
        given = _given(
            decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask, decoder_inputs_embeds=decoder_inputs_embeds
        )
        return _forward(
            self, input_ids, attention_mask, inputs_embeds, labels, output_attentions, output_hidden_states, return_dict, task_ids,
            **given, **kwargs,
        )  # fmt: skip


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question answerer with adapters; its head (`qa_outputs`) is trained whole."""

    heads = ("qa_outputs",)

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
        """The user's model's forward; see `PeftModel.forward`."""
        given = _given(
            token_type_ids=token_type_ids, position_ids=position_ids, start_positions=start_positions, end_positions=end_positions
        )
        return _forward(
            self, input_ids, attention_mask, inputs_embeds, None, output_attentions, output_hidden_states, return_dict, task_ids,
            **given, **kwargs,
        )  # fmt: skip


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
        """The user's model's forward; see `PeftModel.forward`."""
        return _forward(
            self, input_ids, attention_mask, inputs_embeds, None, output_attentions, output_hidden_states, return_dict, task_ids, **kwargs
        )


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}
