"""PeftModel, its task classes, AutoPeftModel, status and helpers: what a user sees of a model with adapters."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import veneer as V
from veneer.errors import ConfigError
from veneer.functional import delete_adapter
from veneer.helpers import (
    cast_mixed_precision_params,
    check_if_peft_model,
    disable_input_dtype_casting,
    rescale_adapter_scale,
    update_forward_signature,
    update_signature,
)
from veneer.testing.laws import move
from veneer.tuner import Tuner, tuner_class

transformers = pytest.importorskip("transformers")

KEYS = {
    f"base_model.model.{p}.{s}"
    for p in ("up", "down")
    for s in ("base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight")
}


class MLP(nn.Module):
    """A model without config, task or generate."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.act(self.up(x)))
        return out


def mlp(width: int = 12) -> MLP:
    torch.manual_seed(0)
    return MLP(width)


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def bert(kind: str = "BertForSequenceClassification") -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )
    return getattr(transformers, kind)(config).eval()


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def small(**fields: Any) -> Any:
    return V.LoraConfig(**{"r": 2, "target_modules": ["up", "down"], **fields})


def attention(**fields: Any) -> Any:
    return V.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **fields})


def fill(model: nn.Module, name: str = "default") -> None:
    """Give an adapter values that change the output, the same ones for the same name."""
    torch.manual_seed(sum(map(ord, name)))
    for n, p in model.named_parameters():
        if "lora_" in n and f".{name}" in n:
            p.data.normal_(std=0.3)


def trains(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def two(build: Any = mlp, config: Any = small, second: str = "b") -> Any:
    """A model with two adapters that both do something; `default` acts."""
    model = V.get_peft_model(build(), config())
    model.add_adapter(second, config())
    fill(model)
    fill(model, second)
    return model


X = torch.linspace(-1, 1, 24).view(3, 8)
IDS = torch.arange(1, 9).view(2, 4)


# ---------------------------------------------------------------- the tree


def test_names_are_those_of_the_checkpoint_format() -> None:
    model = V.get_peft_model(mlp(), small())
    assert set(model.state_dict()) == KEYS
    assert type(model) is V.PeftModel and type(model.base_model).__name__ == "LoraModel" and isinstance(model.base_model, Tuner)
    assert model.base_model.prefix == "lora_" and type(model.base_model.model) is MLP and model.get_base_model() is model.base_model.model
    assert trains(model) == {k for k in KEYS if "lora" in k}
    assert (model.active_adapter, model.active_adapters, model.modules_to_save) == ("default", ["default"], None)


def test_attributes_fall_through_to_the_users_model() -> None:
    base = mlp()
    base.note = "here"
    model = V.get_peft_model(base, small())
    assert model.note == "here" and model.base_model.note == "here" and model.act is base.act
    with pytest.raises(AttributeError, match="'MLP' object has no attribute 'nothing'"):
        _ = model.nothing
    assert not hasattr(model, "config")


def test_the_config_given_is_the_one_kept() -> None:
    config = small()
    model = V.get_peft_model(mlp(), config)
    assert model.peft_config["default"] is config and model.active_peft_config is config
    model.peft_config = {"default": config, "other": config}
    assert model.base_model.peft_config["other"] is config


@pytest.mark.parametrize("seal", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_a_model_of_its_own(seal: Any) -> None:
    model = two()
    other = seal(model)
    assert type(other.base_model) is type(model.base_model) is tuner_class("LORA")
    assert torch.equal(other(X), model(X))
    other.set_adapter("b")
    other.delete_adapter("default")
    assert model.active_adapter == "default" and set(model.peft_config) == {"default", "b"}
    assert not torch.equal(other(X), model(X))


def test_the_printed_line_counts_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = V.get_peft_model(mlp(), small())
    model.print_trainable_parameters()
    lora = 2 * (8 + 12) + 2 * (12 + 4)
    total = lora + 8 * 12 + 12 + 12 * 4 + 4
    assert capsys.readouterr().out == f"trainable params: {lora:,} || all params: {total:,} || trainable%: {100 * lora / total:.4f}\n"
    assert model.get_nb_trainable_parameters() == (lora, total)


def test_the_base_models_name_comes_from_the_model_or_its_config() -> None:
    base = mlp()
    base.config = {"model_type": "mine", "_name_or_path": "some/name"}
    config = small()
    V.get_peft_model(base, config)
    assert config.base_model_name_or_path == "some/name"
    named = llama()
    named.name_or_path = "other/name"
    with pytest.warns(V.PeftWarning, match=r"base_model_name_or_path.*'some/name'.*'other/name'"):
        V.get_peft_model(named, config := attention(base_model_name_or_path="some/name"))
    assert config.base_model_name_or_path == "other/name"
    V.get_peft_model(llama(), config := attention(), revision="abc")
    assert (config.base_model_name_or_path, config.revision) == (None, "abc")


# ---------------------------------------------------------------- what is refused


def test_a_failed_wrap_leaves_the_model_as_it_was() -> None:
    base = mlp()
    before = list(base.state_dict())
    with pytest.raises(V.NoMatchingPeftModuleError):
        V.get_peft_model(base, small(target_modules=["up", "dawn"]))
    assert list(base.state_dict()) == before and all(p.requires_grad for p in base.parameters())
    model = V.get_peft_model(base, small())
    with pytest.raises(V.NoMatchingPeftModuleError):
        model.add_adapter("b", small(target_modules=["up", "dawn"]))
    assert set(model.peft_config) == {"default"} and set(model.state_dict()) == KEYS


def test_wrapping_twice_names_the_right_call() -> None:
    base = mlp()
    model = V.get_peft_model(base, small())
    for again in (model, base, model.base_model):
        with pytest.raises(V.PeftError, match="add_adapter"):
            V.get_peft_model(again, small())
    with pytest.raises(V.PeftError, match="add_adapter"):
        V.inject_adapter_in_model(small(), model)
    assert set(model.state_dict()) == KEYS
    again = V.get_peft_model(model.unload(), small())
    assert set(again.state_dict()) == KEYS


def test_not_a_config_and_unknown_methods() -> None:
    for wrong in ({"peft_type": "LORA"}, None):
        with pytest.raises(V.ConfigError, match="LoraConfig"):
            V.get_peft_model(mlp(), wrong)
    with pytest.raises(V.ConfigError, match="SOFTER_PROMPTS"):
        V.get_peft_model(mlp(), V.PromptLearningConfig(peft_type="SOFTER_PROMPTS", num_virtual_tokens=3))
    with pytest.raises(V.ConfigError, match="peft_type"):
        V.get_peft_config({"r": 3})
    with pytest.raises(V.ConfigError, match="'LORA'"):
        V.get_peft_config({"peft_type": "LORAX"})
    assert V.get_peft_config({"peft_type": "LORA", "r": 3}) == V.LoraConfig(r=3)


def test_adapter_names_are_checked() -> None:
    model = two()
    for call in (
        model.set_adapter,
        model.delete_adapter,
        model.set_requires_grad,
        model.base_model.set_adapter,
        model.base_model.delete_adapter,
    ):
        with pytest.raises(ValueError, match=r"'default'.*Did you mean 'default'"):
            call("defualt")
    with pytest.raises(ValueError, match="Adapter with name 'b' already exists"):
        model.add_adapter("b", small())
    from veneer.methods.ia3 import IA3Config

    with pytest.raises(ValueError, match=r"Cannot combine adapters with different peft types. Found LORA and IA3"):
        model.add_adapter("c", IA3Config(target_modules=["up"], feedforward_modules=[]))
    assert set(model.peft_config) == {"default", "b"} and model.active_adapters == ["default"]


# ---------------------------------------------------------------- several adapters


def test_only_the_chosen_adapters_act_and_train() -> None:
    model = two()
    named = lambda *names: {n for n in model.state_dict() if any(f".{a}.weight" in n for a in names)}
    assert trains(model) == named("default")
    a = model(X)
    model.set_adapter("b")
    b = model(X)
    assert trains(model) == named("b") and not torch.allclose(a, b)
    model.set_adapter(["default", "b"])
    assert trains(model) == named("default", "b") and model.active_adapter == ["default", "b"]
    with model.disable_adapter():
        base = model.up(X)
    with model.using("b"):
        only_b = model.up(X)
    with model.using("default"):
        only_a = model.up(X)
    torch.testing.assert_close(model.up(X), only_a + only_b - base)
    model.set_adapter("b", inference_mode=True)
    assert trains(model) == set() and torch.equal(model(X), b)
    model.set_requires_grad(["b", "default"])
    assert trains(model) == named("default", "b")


def test_deleting_the_active_adapter_hands_over_with_a_warning() -> None:
    model = two()
    model.add_adapter("c", small())
    fill(model, "c")
    model.set_adapter(["b", "c"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.delete_adapter("b")  # c acts on
    assert model.active_adapters == ["c"] and set(model.peft_config) == {"default", "c"}
    with model.using("default"):
        expected = model(X)
    with pytest.warns(V.PeftWarning, match="Setting active adapter to default"):
        model.delete_adapter("c")
    assert model.active_adapter == "default" and torch.equal(model(X), expected)
    assert trains(model) == {k for k in KEYS if "lora" in k}  # no trace of the others
    model.delete_adapter("default")
    assert model.peft_config == {} and model.active_adapters == [] and not model.has_active_enabled_adapter
    torch.testing.assert_close(model(X), mlp()(X), rtol=0, atol=0)


def test_an_inference_adapter_that_takes_over_stays_frozen() -> None:
    model = V.get_peft_model(mlp(), small(inference_mode=True))
    assert trains(model) == set()
    model.add_adapter("b", small())
    model.set_adapter("b")
    with pytest.warns(V.PeftWarning):
        model.delete_adapter("b")
    assert model.active_adapter == "default" and trains(model) == set()


def test_biases_train_with_their_adapter_only(tmp_path: Path) -> None:
    model = V.get_peft_model(mlp(), small(bias="all"))
    biases = {"base_model.model.up.base_layer.bias", "base_model.model.down.base_layer.bias"}
    assert biases < trains(model)
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("b", small(bias="lora_only"))
    model.add_adapter("b", small())
    model.set_adapter("b")
    assert not biases & trains(model)
    model.set_adapter("default")
    assert biases < trains(model)
    model.set_requires_grad("default", False)
    assert trains(model) == set()
    model.up.base_layer.bias.data.add_(1)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = V.PeftModel.from_pretrained(mlp(), tmp_path)
    assert trains(again) == set() and torch.equal(again.up.base_layer.bias, model.up.base_layer.bias)
    late = V.get_peft_model(mlp(), small())
    late.add_adapter("b", small(bias="all"))
    assert not biases & trains(late)
    late.set_adapter("b")
    assert biases < trains(late)
    with pytest.warns(V.PeftWarning):
        late.delete_adapter("b")
    assert trains(late) == {k for k in KEYS if "lora" in k}


# ---------------------------------------------------------------- honest state


def test_disabling_changes_nothing_but_the_output() -> None:
    model = two()
    base = mlp()(X)
    model.set_requires_grad("default", False)
    model.merge_adapter()
    merged = model.up.base_layer.weight.clone()
    with pytest.raises(KeyError), model.disable_adapter():
        torch.testing.assert_close(model(X), base, rtol=0, atol=0)
        assert not model.has_active_enabled_adapter and model.active_adapters == ["default"]
        assert torch.equal(model.up.base_layer.weight, merged)
        raise KeyError
    assert model.has_active_enabled_adapter and trains(model) == set()
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    assert torch.equal(model(X), base) and model.get_model_status().enabled is False and not model.has_active_enabled_adapter
    model.base_model.enable_adapter_layers()
    assert not torch.allclose(model(X), base)


def test_switching_a_merged_model_restores_the_weights_bit_for_bit() -> None:
    model = two()
    frozen = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.set_adapter("b")
    expected = model(X)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot delete adapter"):
        model.delete_adapter("default")
    with pytest.warns(V.PeftWarning, match="Unmerging the model first"):
        model.set_adapter("b")
    assert torch.equal(model(X), expected)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_merging_one_of_two_active_adapters_keeps_the_other() -> None:
    model = two()
    model.set_adapter(["default", "b"])
    both = model(X)
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(X), both)
    assert model.get_model_status().merged_adapters == ["default"]
    merged = model.merge_and_unload()
    assert type(merged.up) is nn.Linear
    torch.testing.assert_close(merged(X), both)


def test_threads_never_see_each_others_adapter() -> None:
    model = two()
    expected = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        expected[name] = model(X).detach()
    wrong: list[str] = []

    def run(name: str) -> None:
        for _ in range(100):
            model.set_adapter(name)
            if not torch.equal(model(X), expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=run, args=(n,)) for n in expected]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


# ---------------------------------------------------------------- one adapter per row


def test_rows_of_a_batch_take_their_own_adapters_and_train_only_those() -> None:
    model = two()
    rows = {}
    for name in ("default", "b"):
        with model.using(name):
            rows[name] = model(X)
    model.train()
    out = model(X, adapter_names=["b", "__base__", "default"])
    torch.testing.assert_close(out, torch.stack([rows["b"][0], mlp()(X)[1], rows["default"][2]]))
    model.set_adapter(["default", "b"])
    model(X, adapter_names=["b", "__base__", "b"]).sum().backward()
    assert model.up.lora_B["b"].weight.grad.abs().sum() > 0 and model.up.lora_B["default"].weight.grad is None


def test_wrong_rows_are_an_error_before_anything_runs() -> None:
    model = two()
    ran: list[int] = []
    model.up.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(V.RouteError, match="'default'"):
        model(X, adapter_names=["b", "b", "defualt"])
    with pytest.raises(V.RouteError, match="got 2 and 3"):
        model(X, adapter_names=["b", "b"])
    with pytest.raises(V.RouteError, match="using"):
        model(X, adapter_names="b")
    assert not ran
    model(X)
    assert ran  # nothing stayed behind


@pytest.fixture(scope="module")
def talkers() -> dict[str, Any]:
    return {
        "llama": two(llama, lambda: attention(task_type="CAUSAL_LM")).eval(),
        "t5": two(t5, lambda: V.LoraConfig(r=4, target_modules=["q", "k", "v", "o"], task_type="SEQ_2_SEQ_LM")).eval(),
    }


@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=["greedy", "beams", "several"])
@pytest.mark.parametrize("which", ["llama", "t5"])
def test_generate_takes_one_name_per_prompt(talkers: dict[str, Any], which: str, beams: dict[str, int]) -> None:
    model = talkers[which]
    options = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False, **beams}
    n = beams.get("num_return_sequences", 1)
    mixed = model.generate(**options, adapter_names=["b", "__base__"])
    with model.using("b"):
        first = model.generate(**options)[:n]
    with model.disable_adapter():
        second = model.generate(**options)[n:]
    assert torch.equal(mixed, torch.cat([first, second])) and not torch.equal(first, second)
    assert torch.equal(model.generate(**options), model.generate(**options))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(V.RouteError):
        model.generate(**options, adapter_names=["b"])


def test_beams_of_an_encoder_do_not_disturb_other_threads(talkers: dict[str, Any]) -> None:
    model = talkers["t5"]
    options = {"input_ids": IDS, "max_new_tokens": 3, "do_sample": False, "num_beams": 3}
    names = {"one": ["b", "__base__"], "other": ["default", "b"], "plain": None}
    expected = {k: model.generate(**options, adapter_names=v) for k, v in names.items()}
    wrong: list[str] = []

    def run(key: str) -> None:
        for _ in range(5):
            if not torch.equal(model.generate(**options, adapter_names=names[key]), expected[key]):
                wrong.append(key)

    threads = [threading.Thread(target=run, args=(k,)) for k in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


# ---------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("task", "kind", "heads"),
    [
        ("SEQ_CLS", "BertForSequenceClassification", ["classifier", "score"]),
        ("TOKEN_CLS", "BertForTokenClassification", ["classifier", "score"]),
        ("QUESTION_ANS", "BertForQuestionAnswering", ["qa_outputs"]),
        ("FEATURE_EXTRACTION", "BertModel", None),
    ],
)
def test_the_task_gives_class_and_trained_head(task: str, kind: str, heads: list[str] | None, tmp_path: Path) -> None:
    config = V.LoraConfig(r=2, target_modules=["query"], task_type=task)
    model = V.get_peft_model(bert(kind), config)
    cls = V.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
    assert type(model) is cls and cls.__name__ == f"PeftModelFor{kind.removeprefix('BertFor').replace('BertModel', 'FeatureExtraction')}"
    assert config.modules_to_save == heads and model.modules_to_save == (set(heads) if heads else None)
    head = {n for n in trains(model) if "lora" not in n}
    assert {n.split(".")[2] for n in head} == (set() if heads is None else {heads[0]})
    assert all(".modules_to_save.default." in n for n in head)
    ids = torch.ones(2, 4, dtype=torch.long)
    model.eval()
    a, b = model(ids, ids)[0], model.get_base_model()(input_ids=ids, attention_mask=ids)[0]  # by position: this class's own order
    assert torch.equal(a, b)
    model.save_pretrained(tmp_path)
    again = V.PeftModel.from_pretrained(bert(kind), tmp_path)
    assert type(again) is cls and torch.equal(again(ids, ids)[0], a)


def test_each_adapter_has_its_own_head() -> None:
    config = lambda: V.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = V.get_peft_model(bert(), config())
    model.add_adapter("b", config())
    assert model.peft_config["b"].modules_to_save == ["classifier", "score"]
    model.eval()
    original = model(IDS).logits
    model.classifier.modules_to_save["b"].weight.data.add_(torch.randn(2, 16))
    assert torch.equal(model(IDS).logits, original)
    model.set_adapter("b")
    other = model(IDS).logits
    assert not torch.allclose(other, original) and {n for n in trains(model) if "classifier" in n} == {
        f"base_model.model.classifier.modules_to_save.b.{n}" for n in ("weight", "bias")
    }
    rows = model(IDS, adapter_names=["default", "b"]).logits
    torch.testing.assert_close(rows, torch.stack([original[0], other[1]]))
    base = model.unload()
    assert type(base.classifier) is nn.Linear and torch.equal(base(IDS).logits, original)


def test_task_classes_stand_side_by_side() -> None:
    assert not issubclass(V.PeftModelForTokenClassification, V.PeftModelForSequenceClassification)
    shared = ["self", "input_ids", "attention_mask", "inputs_embeds", "labels", "output_attentions", "output_hidden_states", "return_dict"]
    for cls in (V.PeftModelForCausalLM, V.PeftModelForSequenceClassification, V.PeftModelForTokenClassification):
        assert list(inspect.signature(cls.forward).parameters) == [*shared, "task_ids", "kwargs"]
    assert list(inspect.signature(V.PeftModelForQuestionAnswering.forward).parameters)[5:8] == [
        "inputs_embeds", "start_positions", "end_positions",
    ]  # fmt: skip
    model = V.get_peft_model(mlp(), small(task_type="CAUSAL_LM"))  # a model that is none of transformers'
    assert type(model) is V.PeftModelForCausalLM


# ---------------------------------------------------------------- files


def test_save_and_load(tmp_path: Path) -> None:
    model = two()
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors", "b"}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["auto_mapping"] == {"base_model_class": "MLP", "parent_library": __name__} and written["inference_mode"] is True
    assert model.peft_config["default"].auto_mapping is None and model.peft_config["default"].inference_mode is False
    again = V.PeftModel.from_pretrained(mlp(), tmp_path)
    assert torch.equal(again(X), model(X))
    assert not again.training and trains(again) == set() and again.peft_config["default"].inference_mode is True
    report = again.load_adapter(tmp_path / "b", "b")
    assert (report.missing_keys, report.unexpected_keys) == ([], []) and again.active_adapters == ["default"] and trains(again) == set()
    again.set_adapter("b")
    model.set_adapter("b")
    assert torch.equal(again(X), model(X))
    named = V.PeftModel.from_pretrained(mlp(), tmp_path, adapter_name="mine")
    assert named.active_adapter == "mine" and "base_model.model.up.lora_A.mine.weight" in named.state_dict()


def test_what_is_adapted_is_told() -> None:
    model = V.get_peft_model(mlp(), small(target_modules=["up"], modules_to_save=["down"]))
    assert (model.targeted_module_names, model.targeted_parameter_names) == (["up"], [])
    model = V.get_peft_model(mlp(), V.LoraConfig(target_modules=["up"], target_parameters=["down.weight"]))
    assert (model.targeted_module_names, model.targeted_parameter_names) == (["up"], ["down.weight"])


def test_a_module_of_an_unknown_class_is_reached_by_its_parameters() -> None:
    with pytest.raises(V.ConfigError, match=r"'lstm' .*is not supported") as told:
        V.get_peft_model(torch.nn.ModuleDict({"lstm": torch.nn.LSTM(3, 4)}), V.LoraConfig(target_modules=["lstm"]))
    wanted = ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert f"target_parameters={wanted}" in str(told.value)
    model = V.inject_adapter_in_model(
        V.LoraConfig(target_modules=[], target_parameters=wanted, init_lora_weights=False),
        torch.nn.ModuleDict({"lstm": torch.nn.LSTM(3, 4)}),
    )
    model["lstm"](torch.ones(2, 3))[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_are_trained_in_the_input_embeddings_if_nothing_else_is_said(tied: bool) -> None:
    torch.manual_seed(0)
    sizes: dict[str, int] = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=tied))
    model = V.get_peft_model(base, V.TrainableTokensConfig(token_indices=[1, 2]))
    assert model.targeted_module_names[0] == "model.embed_tokens" and model.get_nb_trainable_parameters()[0] == 16
    embed_tokens = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(4, 3)})
    assert V.inject_adapter_in_model(V.TrainableTokensConfig(token_indices=[1]), embed_tokens).peft_config
    with pytest.raises(V.ConfigError, match="Please specify `target_modules`"):
        V.get_peft_model(mlp(), V.TrainableTokensConfig(token_indices=[1]))


def test_loading_to_train_on(tmp_path: Path) -> None:
    two().save_pretrained(tmp_path)
    model = V.PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
    assert model.training and trains(model) == {k for k in KEYS if "lora" in k}
    model.load_adapter(tmp_path / "b", "b", is_trainable=True)
    assert model.training and len(trains(model)) == 8  # an optimizer made now has both
    model.up.lora_B["default"].weight.data.zero_()
    model.load_adapter(tmp_path, "default")  # as a trainer does at its end
    assert len(trains(model)) == 8 and not model.training and model.up.lora_B["default"].weight.abs().sum() > 0


@pytest.mark.parametrize("is_trainable", [False, True])
def test_entries_of_a_files_config_that_match_nothing_are_no_error(is_trainable: bool, tmp_path: Path) -> None:
    """PEFT took them when the adapter was trained. What was trained is in the file, and its keys are checked."""
    two().save_pretrained(tmp_path)
    save_file(V.load_peft_weights(tmp_path), tmp_path / "adapter_model.safetensors", {"format": "pt"})  # as PEFT writes it
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    stray = {"target_modules": [*config["target_modules"], "gone"], "modules_to_save": [*(config["modules_to_save"] or []), "gone"]}
    file.write_text(json.dumps(config | stray | {"rank_pattern": {"gone": 3}}))
    model = V.PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=is_trainable)
    model.load_adapter(tmp_path, "again", is_trainable=is_trainable)
    model.save_pretrained(tmp_path / "out")
    for folder in (tmp_path / "out", tmp_path / "out" / "again"):
        assert all(torch.equal(v, V.load_peft_weights(tmp_path)[k]) for k, v in V.load_peft_weights(folder).items())


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    two().save_pretrained(tmp_path)
    base = mlp(13)
    before = {n: p.clone() for n, p in base.state_dict().items()}
    with pytest.raises(V.LoadError, match="13"):
        V.PeftModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == list(before) and all(torch.equal(p, before[n]) for n, p in base.state_dict().items())
    assert all(p.requires_grad for p in base.parameters()) and base.training
    model = V.get_peft_model(base, small())
    with pytest.raises(V.LoadError, match="13"):
        model.load_adapter(tmp_path, "b")
    assert set(model.peft_config) == {"default"} and set(model.state_dict()) == KEYS and trains(model) == {k for k in KEYS if "lora" in k}
    with pytest.raises(V.PeftError, match="load_adapter"):
        V.PeftModel.from_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="must be a PeftConfig"):
        V.PeftModel.from_pretrained(mlp(), tmp_path, config={"r": 2})


def test_saving_some_or_on_other_processes(tmp_path: Path) -> None:
    model = two()
    model.save_pretrained(tmp_path / "some", selected_adapters=["b"])
    assert {p.name for p in (tmp_path / "some").iterdir()} == {"README.md", "b"}
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match=r"\['default', 'b'\] - got \['c'\]"):
        model.save_pretrained(tmp_path, selected_adapters=["c"])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="should be a directory"):
        model.save_pretrained(tmp_path / "file")
    with pytest.warns(V.PeftWarning, match="push_to_hub"):
        model.save_pretrained(tmp_path / "all", push_to_hub=True, save_function=torch.save)
    with pytest.warns(V.PeftWarning, match="torch_dtype"):
        V.PeftModel.from_pretrained(mlp(), tmp_path / "all", torch_dtype=torch.float16)


def test_the_model_card_names_method_library_and_task(tmp_path: Path) -> None:
    base = llama()
    base.name_or_path = "some/base"
    V.get_peft_model(base, attention(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    head = (tmp_path / "README.md").read_text().split("---")[1].splitlines()
    assert {"base_model: some/base", "library_name: peft", "pipeline_tag: text-generation", "- lora", "- transformers"} <= set(head)


def test_low_cpu_mem_usage_leaves_room_for_the_file(tmp_path: Path) -> None:
    model = V.get_peft_model(mlp(), small(), low_cpu_mem_usage=True)
    assert all(p.is_meta == ("lora" in n) for n, p in model.named_parameters())
    two().save_pretrained(tmp_path)
    again = V.PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=True)
    again.load_adapter(tmp_path / "b", "b", low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in again.parameters()) and torch.equal(again(X), two()(X))


@pytest.mark.parametrize(("rslora", "alpha"), [(False, 8), (True, 4 * 2**0.5)])
def test_an_adapter_counted_from_its_start_becomes_a_plain_lora(rslora: bool, alpha: float, tmp_path: Path) -> None:
    model = V.get_peft_model(mlp(), small(init_lora_weights="pissa", lora_alpha=4, use_rslora=rslora))
    torch.testing.assert_close(model(X), mlp()(X))
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="start")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (4, True) and config["lora_alpha"] == pytest.approx(alpha)
    plain = V.PeftModel.from_pretrained(mlp(), tmp_path)
    torch.testing.assert_close(plain(X), model(X))
    assert model.peft_config["default"].r == 2


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"embed_tokens": 3}}])
def test_embeddings_beside_a_start_that_is_counted_keep_their_rank(fields: dict[str, Any], tmp_path: Path) -> None:
    ids = torch.arange(12).view(2, 6)
    config = V.LoraConfig(r=2, lora_alpha=4, init_lora_weights="pissa", target_modules=["embed_tokens", "q_proj"], **fields)
    model = V.get_peft_model(llama(), config).eval()
    fill(model)
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="start")
    plain = V.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    assert plain.get_base_model().model.embed_tokens.r["default"] == 2


def test_what_cannot_become_a_plain_lora_says_so(tmp_path: Path) -> None:
    from veneer.methods.ia3 import IA3Config

    with pytest.raises(V.ConfigError, match="nothing to convert"):
        two().save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion="start")
    other = V.get_peft_model(mlp(), IA3Config(target_modules=["up"], feedforward_modules=[]))
    with pytest.raises(V.ConfigError, match="LoRA adapters only; 'default' is a IA3"):
        other.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion="start")
    assert not (tmp_path / "a").exists()


def test_push_to_hub_saves_before_it_makes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    calls: list[tuple[str, Any]] = []

    class Api:
        def __init__(self, token: Any = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            calls.append(("create", kwargs["private"]))
            return type("Url", (), {"repo_id": f"me/{repo_id}"})()

        def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs: Any) -> str:
            calls.append(("upload", (repo_id, sorted(p.name for p in Path(folder_path).iterdir()), kwargs["commit_message"])))
            return "address"

    monkeypatch.setattr(hub, "HfApi", Api)
    model = two()
    assert model.push_to_hub("name", token="t", private=True, selected_adapters=["b"], commit_message="hello") == "address"
    assert calls == [("token", "t"), ("create", True), ("upload", ("me/name", ["README.md", "b"], "hello"))]
    calls.clear()
    assert model.peft_config["b"].push_to_hub("name", private=False) == "address"
    assert calls == [("token", None), ("create", False), ("upload", ("me/name", ["adapter_config.json"], "Upload config"))]
    calls.clear()
    model.up.lora_A["b"].weight.data.fill_(float("nan"))
    with pytest.raises(V.SaveError):
        model.push_to_hub("name")
    assert [c[0] for c in calls] == ["token"]


# ---------------------------------------------------------------- AutoPeftModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: a language model; task, plain: adapters of it with and without a task type."""
    root = tmp_path_factory.mktemp("auto")
    llama().save_pretrained(root / "base")
    for name, task in (("task", "CAUSAL_LM"), ("plain", None)):
        base = transformers.LlamaForCausalLM.from_pretrained(root / "base")
        model = V.get_peft_model(base, attention(task_type=task))
        fill(model)
        model.save_pretrained(root / name)
    return root


def _edited(source: Path, target: Path, **fields: Any) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return target


def test_auto_model_builds_base_and_adapter(folders: Path) -> None:
    expected = two(llama, attention).eval()(IDS).logits
    for cls, folder, kind in (
        (V.AutoPeftModelForCausalLM, "task", V.PeftModelForCausalLM),
        (V.AutoPeftModelForCausalLM, "plain", V.PeftModelForCausalLM),
        (V.AutoPeftModel, "task", V.PeftModelForCausalLM),
        (V.AutoPeftModel, "plain", V.PeftModel),
    ):
        model = cls.from_pretrained(folders / folder)
        assert type(model) is kind and type(model.get_base_model()).__name__ == "LlamaForCausalLM"
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    model = V.AutoPeftModelForCausalLM.from_pretrained(folders / "task", "mine", is_trainable=True, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and all(".mine." in n for n in trains(model)) and trains(model)


def test_auto_model_refuses_what_it_cannot_know(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="from_pretrained"):
        V.AutoPeftModel()
    with pytest.raises(ValueError, match="AutoPeftModelForCausalLM"):
        V.AutoPeftModelForSequenceClassification.from_pretrained(folders / "task")
    odd = {"base_model_class": "Path", "parent_library": "pathlib"}
    foreign = _edited(folders / "plain", tmp_path / "foreign", auto_mapping=odd)
    with pytest.raises(V.ConfigError, match=r"import_allowlist=\['pathlib'\]"):
        V.AutoPeftModel.from_pretrained(foreign)
    with pytest.raises(AttributeError, match="from_pretrained"):  # allowed, and then it is no model
        V.AutoPeftModel.from_pretrained(foreign, import_allowlist=["pathlib"])
    with pytest.raises(V.ConfigError, match="neither a task_type nor an auto_mapping"):
        V.AutoPeftModel.from_pretrained(_edited(folders / "plain", tmp_path / "bare", auto_mapping=None))
    with pytest.raises(V.ConfigError, match="which base model"):
        V.AutoPeftModel.from_pretrained(_edited(folders / "plain", tmp_path / "lost", base_model_name_or_path=None))


def test_auto_model_resizes_to_the_folders_tokenizer(folders: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(43)}, unk_token="w0")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words)).save_pretrained(tmp_path)
    base = transformers.LlamaForCausalLM.from_pretrained(folders / "base")
    base.resize_token_embeddings(43)
    model = V.get_peft_model(base, attention(task_type="CAUSAL_LM"))
    fill(model)
    model.save_pretrained(tmp_path)
    again = V.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 42, 41]])
    assert again.get_input_embeddings().weight.shape == (43, 16)
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


# ---------------------------------------------------------------- status


def test_layer_and_model_status() -> None:
    model = V.get_peft_model(llama(), attention(modules_to_save=["lm_head"], task_type="CAUSAL_LM"))
    model.add_adapter("b", attention(target_modules=["q_proj", "o_proj"]))
    layers = {s.name: s for s in model.get_layer_status()}
    q = layers["model.model.layers.0.self_attn.q_proj"]
    assert (q.module_type, q.enabled, q.active_adapters, q.merged_adapters) == ("lora.Linear", True, ["default"], [])
    assert q.requires_grad == {"default": True, "b": False} and q.available_adapters == ["b", "default"]
    assert q.devices == {"default": ["cpu"], "b": ["cpu"]} and q.quantization_backend is None
    assert layers["model.model.layers.1.self_attn.o_proj"].available_adapters == ["b"]
    assert layers["model.lm_head"].module_type == "ModulesToSaveWrapper"
    status = V.get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "LoraModel")
    assert status.peft_types == {"default": "LORA", "b": "LORA"} and status.num_adapter_layers == len(layers) == 7
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.requires_grad == {"default": True, "b": False} and status.active_adapters == ["default"] and status.merged_adapters == []
    assert [s.name for s in V.get_layer_status(model.base_model)] == list(layers)


def test_what_differs_from_layer_to_layer_is_irregular() -> None:
    model = two()
    model.up.enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    model.up.enable_adapters(True)
    model.up.set_adapter("b")
    status = model.get_model_status()
    assert status.active_adapters == "irregular" and status.requires_grad == {"default": "irregular", "b": "irregular"}
    model.set_adapter("default")
    assert model.get_model_status().active_adapters == ["default"]
    model.up.merge()
    assert model.get_model_status().merged_adapters == "irregular"
    model.unmerge_adapter()
    model.up.lora_A["default"].weight.requires_grad_(False)
    assert model.get_layer_status()[0].requires_grad["default"] == "irregular"


def test_status_without_a_peft_model() -> None:
    with pytest.raises(ValueError, match="No adapter layers found"):
        V.get_layer_status(mlp())
    with pytest.raises(ValueError, match="No adapter layers found"):
        V.get_model_status(V.get_peft_model(mlp(), small()).unload())
    model = V.inject_adapter_in_model(small(), mlp())
    assert [s.name for s in V.get_layer_status(model)] == ["up", "down"]
    status = V.get_model_status(model)
    assert (status.adapter_model_type, status.peft_types) == ("None", {"default": "LORA"})


# ---------------------------------------------------------------- injection


def test_injected_adapters_act_at_once() -> None:
    base = mlp()
    assert V.inject_adapter_in_model(small(), base) is base and "up.lora_A.default.weight" in base.state_dict()
    fill(base)
    a = base(X)
    V.inject_adapter_in_model(small(), base, "b")
    assert set(base.peft_config) == {"default", "b"} and torch.equal(base(X), mlp()(X))  # b acts, and is zero still
    assert all(".b." in n for n in trains(base)) and trains(base)
    base.up.set_adapter("default")
    base.down.set_adapter("default")
    assert torch.equal(base(X), a)
    with pytest.raises(V.ConfigError, match="already an adapter 'b'"):
        V.inject_adapter_in_model(small(), base, "b")
    with pytest.raises(V.ConfigError, match="PromptLearningConfig"):
        V.inject_adapter_in_model(V.PromptLearningConfig(num_virtual_tokens=2), base)
    frozen = V.inject_adapter_in_model(small(inference_mode=True), mlp())
    assert trains(frozen) == set()


def test_injection_by_the_keys_of_a_state_dict() -> None:
    keys = {"up.lora_A.weight": torch.zeros(2, 8), "up.lora_B.weight": torch.zeros(12, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = V.inject_adapter_in_model(small(), mlp(), state_dict=keys)
    assert {n for n in base.state_dict() if "lora" in n} == {"up.lora_A.default.weight", "up.lora_B.default.weight"}


# ---------------------------------------------------------------- training aids


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_reaches_every_adapter(reentrant: bool, when: str) -> None:
    def grads(checkpointed: bool) -> dict[str, torch.Tensor]:
        base = llama()
        options = {"use_reentrant": reentrant}
        enable = "activation_checkpointing_enable" if hasattr(base, "activation_checkpointing_enable") else "gradient_checkpointing_enable"
        name = enable.replace("enable", "kwargs")
        if checkpointed and when == "before":
            getattr(base, enable)(**{name: options})
        model = V.get_peft_model(base, attention(task_type="CAUSAL_LM")).train()
        fill(model)
        if checkpointed and when == "after":
            getattr(model, enable)(**{name: options})
        model(IDS, labels=IDS).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = grads(False), grads(True)
    assert set(plain) == set(checkpointed) and all("lora" in n for n in plain) and len(plain) == 8
    for n, g in plain.items():
        assert g.abs().sum() > 0
        torch.testing.assert_close(checkpointed[n], g)


def test_gradient_checkpointing_of_a_plain_module() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(10, 8), mlp()

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = torch.utils.checkpoint.checkpoint(self.body, self.table(ids), use_reentrant=True)
            return out

    base = Plain()
    model = V.get_peft_model(base, small())
    model.prepare_model_for_gradient_checkpointing(base)
    assert len(base.table._forward_hooks) == 1
    model(IDS).sum().backward()
    assert model.body.up.lora_B["default"].weight.grad.abs().sum() > 0
    with torch.inference_mode():
        assert not base.table(IDS).requires_grad


def test_signatures_can_be_shown() -> None:
    model = V.get_peft_model(llama(), attention())
    wanted = inspect.signature(model.get_base_model().forward)
    update_signature(model)
    assert inspect.signature(model.forward) == wanted and "generation_config" in inspect.signature(model.generate).parameters
    other = copy.deepcopy(model)
    other.get_base_model().lm_head.weight.data.zero_()
    assert other(input_ids=IDS).logits.abs().sum() == 0 and model(input_ids=IDS).logits.abs().sum() > 0
    tasked = V.get_peft_model(llama(), attention(task_type="CAUSAL_LM"))
    before = inspect.signature(tasked.forward)
    update_forward_signature(tasked)  # it tells its arguments already
    assert inspect.signature(tasked.forward) == before
    with pytest.raises(ValueError, match="method backward is not supported"):
        update_signature(model, "backward")


def test_rescaling_ends_with_the_block() -> None:
    model = two()
    a, base = model.up(X), mlp().up(X)
    with pytest.raises(KeyError), rescale_adapter_scale(model, 3):
        torch.testing.assert_close(model.up(X), base + 3 * (a - base))
        raise KeyError
    assert torch.equal(model.up(X), a)
    with pytest.raises(TypeError, match="should be of type float"), rescale_adapter_scale(model, "3"):  # type: ignore[arg-type]
        pass
    from veneer.methods.ia3 import IA3Config

    other = V.get_peft_model(mlp(), IA3Config(target_modules=["up"], feedforward_modules=[]))
    for none in (mlp(), other):
        with pytest.raises(ValueError, match="scaling is only supported"), rescale_adapter_scale(none, 3):
            pass
    with disable_input_dtype_casting(model):
        assert torch.equal(model.up(X), a)


def test_a_folder_is_an_adapter_or_not(tmp_path: Path) -> None:
    assert not check_if_peft_model(str(tmp_path))
    V.get_peft_model(mlp(), small()).save_pretrained(tmp_path)
    assert check_if_peft_model(str(tmp_path))


def test_adapters_of_a_half_model_are_float32_unless_told_otherwise() -> None:
    model = V.get_peft_model(mlp().to(torch.bfloat16), small())
    assert all(p.dtype == (torch.float32 if "lora" in n else torch.bfloat16) for n, p in model.named_parameters())
    assert model(X.bfloat16()).dtype == torch.bfloat16
    low = V.get_peft_model(mlp().to(torch.bfloat16), small(), autocast_adapter_dtype=False)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    cast_mixed_precision_params(low, torch.float16)
    assert all(p.dtype == (torch.float32 if "lora" in n else torch.float16) for n, p in low.named_parameters())


def test_the_tuner_can_be_made_by_itself() -> None:
    from veneer.tuner import LoraModel  # type: ignore[attr-defined]

    assert LoraModel is tuner_class("LORA") is type(V.get_peft_model(mlp(), small()).base_model)
    tuner = LoraModel(mlp(), {"one": small(), "two": small(r=3)}, "ignored")
    assert set(tuner.peft_config) == {"one", "two"} and tuner.active_adapters == ["one"]
    tuner.set_adapter(["one", "two"])
    assert tuner(X).shape == (3, 4) and tuner.active_adapter == ["one", "two"]
    with pytest.raises(ImportError, match="NoSuchModel"):
        from veneer.tuner import NoSuchModel  # type: ignore[attr-defined]  # noqa: F401


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 3).eval()


@pytest.mark.parametrize("targets", ["linear1", "layers.2.linear2", "self_attn", "norm2"])
@pytest.mark.parametrize("masked", [False, True])
def test_encoders_of_torch_do_not_pass_adapters_by_in_eval_mode(targets: str, masked: bool) -> None:
    x = torch.randn(3, 5, 8)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [2]]) if masked else None
    there = torch.ones(3, 5, dtype=torch.bool) if mask is None else ~mask
    expected = _encoder()(x, src_key_padding_mask=mask)[there]
    config: Any = V.LNTuningConfig(target_modules=[targets]) if targets == "norm2" else V.LoraConfig(target_modules=[targets])
    model = V.get_peft_model(_encoder(), config)
    move(model, size=0.5)
    trains = model.train()(x, src_key_padding_mask=mask)[there]
    model.eval()
    assert not torch.allclose(trains, expected, atol=1e-2)
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            torch.testing.assert_close(model(x, src_key_padding_mask=mask)[there], trains)
    plain = copy.deepcopy(model).unload()
    assert plain.use_nested_tensor
    assert all(layer.activation_relu_or_gelu == 1 for layer in plain.layers)
    torch.testing.assert_close(plain(x, src_key_padding_mask=mask)[there], expected)
    torch.testing.assert_close(model.merge_and_unload()(x, src_key_padding_mask=mask)[there], trains)


def test_encoders_without_adapters_keep_their_short_way() -> None:
    model = V.get_peft_model(_encoder(), V.LoraConfig(target_modules=["layers.1.linear1"]))
    assert [layer.activation_relu_or_gelu for layer in model.get_base_model().layers] == [1, 0, 1]


def test_tensors_of_other_shapes_keep_their_start_values_where_asked(tmp_path: Path) -> None:
    """A layer that is wider than the one an adapter was trained on."""
    fill(model := V.get_peft_model(mlp(), small()))
    model.save_pretrained(tmp_path)
    with pytest.raises(V.LoadError, match=r"up\.lora_B"):
        V.PeftModel.from_pretrained(mlp(16), tmp_path)
    with pytest.warns(V.PeftWarning, match="not the base model"):
        wide = V.PeftModel.from_pretrained(mlp(16), tmp_path, ignore_mismatched_sizes=True)
        report = wide.load_adapter(tmp_path, "again", ignore_mismatched_sizes=True)
    assert {name.removeprefix("base_model.model.") for name, *_ in report.mismatched} == {"up.lora_B.weight", "down.lora_A.weight"}
    for name in ("default", "again"):
        up, down, trained = wide.base_model.model.up, wide.base_model.model.down, model.base_model.model
        assert torch.equal(up.lora_A[name].weight, trained.up.lora_A["default"].weight)
        assert torch.equal(down.lora_B[name].weight, trained.down.lora_B["default"].weight)
        assert not up.lora_B[name].weight.any() and 0 < down.lora_A[name].weight.abs().max() < 1


def test_biases_of_modules_whose_copies_act_do_not_train() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = V.get_peft_model(base, V.LoraConfig(target_modules=["0"], modules_to_save=["2"], bias="all"))
    model(torch.randn(3, 4)).sum().backward()
    trained = {n: p.grad is not None for n, p in model.named_parameters() if p.requires_grad}
    assert all(trained.values()) and sum(n.endswith("bias") for n in trained) == 3, trained


# ---------------------------------------------------------------- a stack of layers rebuilt from ranges


def test_a_rebuilt_stack_merges_into_a_model_that_saves(tmp_path: Path) -> None:
    ids = torch.arange(12).view(2, 6)
    base = llama()
    base.model.layers[1].mlp.up_proj.weight = base.model.layers[1].mlp.gate_proj.weight  # tied inside a layer: stays so
    model = V.get_peft_model(base, attention(layer_replication=[[0, 2], [1, 2]])).eval()
    fill(model)
    y = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    layers = merged.model.layers
    assert len(layers) == merged.config.num_hidden_layers == 3
    torch.testing.assert_close(merged(input_ids=ids).logits, y)
    assert layers[2].mlp.up_proj.weight is layers[2].mlp.gate_proj.weight is not layers[1].mlp.up_proj.weight
    layers[2].mlp.up_proj.weight = nn.Parameter(layers[2].mlp.up_proj.weight.detach().clone())
    layers[1].mlp.up_proj.weight = nn.Parameter(layers[1].mlp.up_proj.weight.detach().clone())
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(input_ids=ids).logits, merged(input_ids=ids).logits)


@pytest.mark.parametrize("ranges", [[[0, 2], [1, 2]], [[1, 2]]])
def test_unloading_gives_the_first_stack_back(ranges: Any) -> None:
    ids = torch.arange(12).view(2, 6)
    base = llama().train().requires_grad_(True)
    layers, y = base.model.layers, base.eval()(input_ids=ids).logits
    base.train()
    for _ in range(2):
        model = V.get_peft_model(base, attention(layer_replication=ranges)).eval().double()
        fill(model)
        assert len(base.model.layers) == base.config.num_hidden_layers == sum(b - a for a, b in ranges)
        model.merge_adapter()
        assert model.unload() is base and base.model.layers is layers
        assert len(layers) == base.config.num_hidden_layers == 2
        assert not any(m.training for m in base.modules()) and all(p.requires_grad for p in base.parameters())
    torch.testing.assert_close(base.float()(input_ids=ids).logits, y)
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1]


def test_a_copy_of_a_model_with_a_rebuilt_stack_unloads_by_itself() -> None:
    ids = torch.arange(12).view(2, 6)
    base = llama().eval()
    y = base(input_ids=ids).logits
    model = V.get_peft_model(base, attention(layer_replication=[[0, 2], [1, 2]]))
    fill(model)
    other = copy.deepcopy(model).unload()
    assert torch.equal(other(input_ids=ids).logits, y) and len(other.model.layers) == 2
    assert len(model.get_base_model().model.layers) == 3


def test_a_later_adapter_cannot_ask_for_another_stack() -> None:
    model = V.get_peft_model(llama(), attention(layer_replication=[[0, 2], [1, 2]]))
    model.add_adapter("same", attention(layer_replication=[[0, 2], [1, 2]]))
    model.add_adapter("unsaid", attention())
    assert len(model.get_base_model().model.layers) == 3
    plain = V.get_peft_model(llama(), attention())
    for there, ranges in ((model, [[0, 2]]), (plain, [[0, 2], [1, 2]])):
        with pytest.raises(ConfigError, match="has adapters already"):
            there.add_adapter("other", attention(layer_replication=ranges))
        assert "other" not in there.peft_config


@pytest.mark.parametrize("ranges", [[[0, 1.5]], [[0, 1, 2]], "01", [0, 1], [[0, True]]])
def test_ranges_of_layers_are_pairs_of_integers(ranges: Any) -> None:
    with pytest.raises(ConfigError, match="list of pairs"):
        attention(layer_replication=ranges)


def test_it_takes_arguments_for_the_loss_where_the_base_model_does() -> None:
    """transformers' Trainer asks; the wrapper's own forward takes anything."""

    class Strict(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(x)

    class Open(Strict):
        def forward(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
            return self.lin(x)

    class Said(Open):
        accepts_loss_kwargs = False

    for base, takes in ((Strict, False), (Open, True), (Said, False)):
        for mixed in (False, True):
            model = V.get_peft_model(base(), V.LoraConfig(r=2, target_modules=["lin"]), mixed=mixed)
            assert model.accepts_loss_kwargs is takes


def _three() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for name in "abc":
        V.inject_adapter_in_model(V.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False), net, name)
    return net


def test_deleting_an_adapter_leaves_the_others_choices_alone() -> None:
    """transformers chooses layer by layer (`model.set_adapter`) and deletes for the model."""
    net, x = _three(), torch.randn(2, 4)
    for layer in net:
        layer.set_adapter("a")
    want = net(x)
    assert delete_adapter(net, "b") == ["a"]
    assert torch.equal(net(x), want) and all(layer.active_adapters == ["a"] for layer in net)
    model = V.get_peft_model(nn.Sequential(nn.Linear(4, 4)), V.LoraConfig(r=2, target_modules=["0"]), "a")
    for name in "bc":
        model.add_adapter(name, V.LoraConfig(r=2, target_modules=["0"]))
    with model.using("b"):
        model.delete_adapter("c")
    assert model.active_adapters == ["a"]
    model.base_model.set_adapter([])
    model.delete_adapter("b")
    assert model.active_adapters == []


def test_an_heir_trains_in_a_bare_model_too() -> None:
    net = _three()
    with pytest.warns(V.PeftWarning, match="c was active which is now deleted. Setting active adapter to a"):
        assert delete_adapter(net, "c") == ["a"]
    assert {n.split(".")[2] for n, p in net.named_parameters() if p.requires_grad} == {"a"}


def test_an_unknown_adapters_tensor_is_a_key_error() -> None:
    """As of any ModuleDict; a StopIteration would end loops without a word."""
    layer = V.get_peft_model(nn.Sequential(nn.Linear(4, 4)), V.LoraConfig(r=2, target_modules=["0"])).base_model.model[0]
    with pytest.raises(KeyError, match="nope"):
        layer.lora_A["nope"]


def _replica(model: nn.Module, device: str) -> Any:
    """What nn.DataParallel makes of a model for one of its devices."""
    modules = list(model.modules())
    copies: dict[nn.Module, Any] = {m: m._replicate_for_data_parallel() for m in modules}  # type: ignore[operator]
    for m, new in copies.items():
        for name, child in m._modules.items():
            new._modules[name] = None if child is None else copies[child]
        for name, p in m._parameters.items():
            if p is None:
                new._parameters[name] = None
            else:
                setattr(new, name, p.to(device).view_as(p))
    return copies[model]


def test_data_parallel_copies_have_tensors_of_their_own_device() -> None:
    """Each runs in a thread that has made no choice."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model = V.get_peft_model(net, V.LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["2"]))
    move(model)
    x, got = torch.randn(2, 4), {}

    def run(name: str, replica: Any, x: torch.Tensor) -> None:
        got[name] = replica(x)

    def threaded(name: str, device: str) -> torch.Tensor:
        thread = threading.Thread(target=run, args=(name, _replica(model, device), x.to(device)))
        thread.start()
        thread.join()
        return got[name]

    want = model(x)
    want.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    y = threaded("cpu", "cpu")
    y.square().sum().backward()
    torch.testing.assert_close(y, want)
    for n, p in model.named_parameters():
        if n in grads:
            torch.testing.assert_close(p.grad, grads[n])
    assert threaded("meta", "meta").is_meta  # stands for another device
    assert _replica(model, "meta").base_model.model[0].leaf("default", "lora_A").is_meta
    with model.disable_adapter():
        torch.testing.assert_close(threaded("off", "cpu"), model(x))
