"""PeftConfig: what is checked, and adapter_config.json both ways."""

from __future__ import annotations

import json
import sys
import types
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer.method
from veneer.config import PEFT_FORMAT_VERSION, PeftConfig, PeftConfigMixin, PromptLearningConfig
from veneer.errors import ConfigError, PeftError, PeftWarning, hint, nearest
from veneer.types import PeftType, TaskType


@dataclass
class Nested:
    rho: float = 2.0


@dataclass
class ToyConfig(PeftConfig):
    r: int = 8
    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: Any = None
    target_parameters: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    rank_pattern: Any = field(default_factory=dict)
    alpha_pattern: Any = field(default_factory=dict)
    trainable_token_indices: Any = None
    nested_config: Any = None
    extra: Any = None
    runtime_config: Any = field(default_factory=Nested)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.nested_config, dict):
            self.nested_config = Nested(**self.nested_config)


@dataclass
class OtherConfig(PeftConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IA3


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"LORA": ToyConfig, "IA3": OtherConfig}
    monkeypatch.setattr(veneer.method, "config_class", lambda name: known[str(getattr(name, "value", name))])


def read(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return loaded


def rewrite(folder: Path, drop: str = "", **values: Any) -> None:
    kept = {k: v for k, v in (read(folder) | values).items() if k != drop}
    (folder / "adapter_config.json").write_text(json.dumps(kept))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ToyConfig(target_modules=["v", "q"], task_type="CAUSAL_LM", inference_mode=True).save_pretrained(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- fields


def test_format_version_is_filled_and_a_given_one_kept() -> None:
    assert PeftConfig().peft_version == PEFT_FORMAT_VERSION == PeftConfig._get_peft_version() == "0.21.2"
    assert PeftConfig(peft_version="0.5.0").peft_version == "0.5.0"


def test_task_types() -> None:
    assert PeftConfig(task_type="SEQ_CLS").task_type == TaskType.SEQ_CLS == PeftConfig(task_type=TaskType.SEQ_CLS).task_type
    with pytest.raises(ConfigError, match=r"Invalid task type: 'CAUSAL_LN'.*Did you mean 'CAUSAL_LM'"):
        PeftConfig(task_type="CAUSAL_LN")


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": 3},
        {"target_modules": ["q", 3]},
        {"target_modules": [""]},
        {"target_modules": "("},
        {"target_modules": {"q": 1}},
        {"exclude_modules": 1.5},
        {"modules_to_save": [None]},
        {"target_parameters": {"w": 1}},
        {"target_modules": ["q"], "layers_to_transform": "1"},
        {"target_modules": ["q"], "layers_to_transform": [True]},
        {"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": 1},
        {"rank_pattern": ["q"]},
        {"alpha_pattern": {"(": 2}},
        {"trainable_token_indices": {"emb": 3}},
        {"trainable_token_indices": "12"},
        {"inference_mode": "yes"},
        {"revision": 3},
        {"auto_mapping": "x"},
    ],
    ids=str,
)
def test_wrong_types_are_named(given: dict[str, Any]) -> None:
    name = list(given)[-1]
    with pytest.raises(ConfigError, match=rf"ToyConfig\.{name} must be"):
        ToyConfig(**given)


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_names_come_in_any_collection(kind: Any) -> None:
    assert set(ToyConfig(target_modules=kind(["q", "v"])).target_modules) == {"q", "v"}


def test_one_name_is_a_list_of_one() -> None:
    config = ToyConfig(modules_to_save="classifier", target_parameters="w")
    assert (config.modules_to_save, config.target_parameters) == (["classifier"], ["w"])


def test_layers_need_a_list_of_targets() -> None:
    with pytest.raises(ConfigError, match="`layers_to_transform` cannot be used when `target_modules` is a str"):
        ToyConfig(target_modules="q", layers_to_transform=0)
    with pytest.raises(ConfigError, match="`layers_to_transform` must also be specified"):
        ToyConfig(target_modules=["q"], layers_pattern="layers")
    assert ToyConfig(target_modules=["q"], layers_to_transform=0, layers_pattern="layers").layers_to_transform == 0


def test_kinds_of_config() -> None:
    assert not PeftConfig().is_prompt_learning
    assert PromptLearningConfig().is_prompt_learning
    assert not PromptLearningConfig().is_adaption_prompt
    assert PromptLearningConfig(num_virtual_tokens=3, modules_to_save="head").modules_to_save == ["head"]
    assert issubclass(PromptLearningConfig, PeftConfig) and issubclass(PeftConfig, PeftConfigMixin)


# ---------------------------------------------------------------- writing


def test_the_file_is_in_pefts_format(tmp_path: Path) -> None:
    ToyConfig(
        target_modules={"v", "q"}, task_type=TaskType.SEQ_CLS, nested_config=Nested(3.0), extra=({1, 3, 2}, Path("a"))
    ).save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    text, values = (folder / "adapter_config.json").read_text(), read(folder)
    assert text == json.dumps(values, indent=2, sort_keys=True)
    assert values["target_modules"] == ["q", "v"]
    assert (values["peft_type"], values["task_type"], values["peft_version"]) == ("LORA", "SEQ_CLS", "0.21.2")
    assert values["nested_config"] == {"rho": 3.0}
    assert values["extra"] == [[1, 2, 3], "a"]
    assert values["inference_mode"] is False
    assert set(values) == {f.name for f in fields(ToyConfig)} - {"runtime_config"}
    assert [p.name for p in folder.iterdir()] == ["adapter_config.json"]


def test_auto_mapping_can_be_given_when_saving(tmp_path: Path) -> None:
    config = ToyConfig(auto_mapping={"a": "b"})
    config.save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "M"})
    assert read(tmp_path)["auto_mapping"] == {"base_model_class": "M"}
    assert config.auto_mapping == {"a": "b"}


def test_what_json_cannot_hold_is_named_and_the_old_file_stays(saved: Path) -> None:
    before = read(saved)
    with pytest.raises(ConfigError, match=r"`extra\.x`.*is a Tensor"):
        ToyConfig(extra={"x": torch.zeros(1)}).save_pretrained(saved)
    assert read(saved) == before


def test_a_save_that_breaks_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Path, target: Path) -> None:
        raise OSError("disk gone")

    before = read(saved)
    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="disk gone"):
        ToyConfig(r=99).save_pretrained(saved)
    assert read(saved) == before
    assert [p.name for p in saved.iterdir()] == ["adapter_config.json"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(NotADirectoryError, match="should be a directory, not a file"):
        ToyConfig().save_pretrained(tmp_path / "f")


# ---------------------------------------------------------------- reading


def test_round_trip(tmp_path: Path) -> None:
    config = ToyConfig(
        r=3,
        target_modules=["q"],
        layers_to_transform=[0, 2],
        rank_pattern={"a.*q": 4},
        trainable_token_indices={"emb": [1, 2]},
        nested_config=Nested(5.0),
        base_model_name_or_path="some/model",
    )
    config.save_pretrained(tmp_path)
    for cls in (ToyConfig, PeftConfig, OtherConfig):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is ToyConfig
        assert asdict(again) == asdict(config)
    assert PeftConfig._get_peft_type(tmp_path) == "LORA"


def test_version_of_the_file_is_kept(saved: Path) -> None:
    rewrite(saved, peft_version="0.10.0")
    assert PeftConfig.from_pretrained(saved).peft_version == "0.10.0"
    rewrite(saved, drop="peft_version")
    assert PeftConfig.from_pretrained(saved).peft_version == PEFT_FORMAT_VERSION


def test_unknown_fields_that_say_nothing_are_dropped_in_silence(saved: Path) -> None:
    rewrite(saved, enable_lora=None, merge_weights=False, future_list=[], future_dict={}, future_name="")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PeftConfig.from_pretrained(saved).target_modules == {"q", "v"}


@pytest.mark.parametrize("value", [True, 0, 0.5, "on", [1], {"a": 1}])
def test_unknown_fields_that_say_something_are_named(saved: Path, value: Any) -> None:
    rewrite(saved, future=value, peft_version="0.99.0")
    with pytest.warns(PeftWarning, match="ToyConfig does not know are ignored.*future=.*differ.*0.99.0") as caught:
        config = PeftConfig.from_pretrained(saved)
    assert repr(value) in str(caught[0].message)
    assert config.r == 8 and config.target_modules == {"q", "v"}


def test_runtime_config_is_not_read(saved: Path) -> None:
    rewrite(saved, runtime_config={"rho": 7.0})
    with pytest.warns(PeftWarning, match="`runtime_config` is ignored"):
        assert PeftConfig.from_pretrained(saved).runtime_config == Nested()


def test_the_file_decides_over_arguments(saved: Path) -> None:
    with pytest.warns(PeftWarning, match=r"r=3 \(file: 8\)"):
        assert PeftConfig.from_pretrained(saved, r=3, torch_device="cpu", token="x").r == 8
    rewrite(saved, drop="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PeftConfig.from_pretrained(saved, r=3, inference_mode=True).r == 3


def test_a_file_without_peft_type(saved: Path) -> None:
    rewrite(saved, drop="peft_type")
    with pytest.raises(ConfigError, match="missing the required key `peft_type`"):
        PeftConfig.from_pretrained(saved)
    with pytest.raises(ConfigError, match="missing the required key `peft_type`"):
        PeftConfig._get_peft_type(saved)
    assert type(ToyConfig.from_pretrained(saved)) is ToyConfig


@pytest.mark.parametrize("text", ["{", "[1]", "\xff\xfe"])
def test_a_broken_file_is_a_config_error(saved: Path, text: str) -> None:
    (saved / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"adapter_config.json"):
        PeftConfig.from_pretrained(saved)


def test_from_peft_type() -> None:
    assert PeftConfig.from_peft_type(peft_type="LORA", r=3) == ToyConfig(r=3)
    assert ToyConfig.from_peft_type(r=3) == ToyConfig(r=3)
    assert type(ToyConfig.from_peft_type(peft_type=PeftType.IA3)) is OtherConfig
    with pytest.raises(ConfigError, match="peft_type"):
        PeftConfig.from_peft_type(r=3)


def test_split_kwargs() -> None:
    hub, own, rest = ToyConfig._split_kwargs({"token": "t", "revision": "main", "r": 2, "device_map": "auto"})
    assert (hub, own, rest) == ({"token": "t", "revision": "main"}, {"r": 2}, {"device_map": "auto"})


def test_check_kwargs_can_translate_old_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ToyConfig,
        "check_kwargs",
        classmethod(lambda cls, **k: {n: v for n, v in k.items() if n != "old_r"} | {"r": k["old_r"]}),
    )
    rewrite(saved, old_r=5)
    assert PeftConfig.from_pretrained(saved).r == 5


# ---------------------------------------------------------------- finding


def test_subfolders(saved: Path) -> None:
    ToyConfig(r=2).save_pretrained(saved / "other")
    assert PeftConfig.from_pretrained(saved, subfolder="other").r == 2
    assert PeftConfig.from_pretrained(str(saved)).r == 8
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at .*subfolder 'none'.*subfolder='other'"):
        PeftConfig.from_pretrained(saved, subfolder="none")


def test_what_is_missing_is_told(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at .*holds no adapter"):
        PeftConfig.from_pretrained(empty)
    (empty / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="whole model"):
        PeftConfig.from_pretrained(empty)
    with pytest.raises(ValueError, match="That is a file: give its folder"):
        PeftConfig.from_pretrained(saved / "adapter_config.json")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, saved: Path) -> list[Any]:
    asked: list[Any] = []

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        asked.append((repo_id, filename, kwargs))
        if repo_id == "me/gone":
            raise RuntimeError("404")
        return str(saved / "adapter_config.json")

    fake = types.ModuleType("huggingface_hub")
    fake.hf_hub_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return asked


def test_the_hub_is_asked_for_names_without_a_folder(hub: list[Any]) -> None:
    config = PeftConfig.from_pretrained("me/adapter", subfolder="s", token="t", revision="v1", device_map="auto")
    assert config.target_modules == {"q", "v"}
    assert hub == [("me/adapter", "adapter_config.json", {"subfolder": "s", "token": "t", "revision": "v1"})]
    assert PeftConfig._get_peft_type("me/adapter", token="t") == "LORA"
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at 'me/gone'.*RuntimeError: 404"):
        PeftConfig.from_pretrained("me/gone")


@pytest.mark.parametrize("name", ["", "./adapter", "/no/such/folder", "a/b/c", "typo", "C:\\adapter"])
def test_no_other_name_goes_to_the_hub(hub: list[Any], name: str) -> None:
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
        PeftConfig.from_pretrained(name)
    assert hub == []


def test_a_local_folder_wins(hub: list[Any], saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    ToyConfig(r=4).save_pretrained("me/adapter")
    assert PeftConfig.from_pretrained("me/adapter").r == 4
    Path("me/empty").mkdir()
    with pytest.raises(ValueError, match="holds no adapter"):
        PeftConfig.from_pretrained("me/empty")
    assert hub == []


def test_without_huggingface_hub_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        PeftConfig.from_pretrained("me/adapter")


# ---------------------------------------------------------------- errors


def test_errors_are_caught_by_their_builtin_kind() -> None:
    assert issubclass(ConfigError, PeftError) and issubclass(ConfigError, ValueError)


def test_nearest() -> None:
    assert nearest("qproj", ["k_proj", "q_proj", "v_proj", "q_proj"])[0] == "q_proj"
    assert nearest("Query", ["query", "value"], n=1) == ["query"]
    assert nearest("xyz", ["q_proj"]) == []
    assert len(nearest("a_proj", ["b_proj", "c_proj", "d_proj", "e_proj"], n=2)) == 2
    assert hint("qproj", ["q_proj"]) == " Did you mean 'q_proj'?"
    assert hint("xyz", ["q_proj"]) == ""


@pytest.mark.parametrize("fields", [{"r": True}, {"rank_pattern": {"q": True}}])
def test_a_rank_is_a_number_and_no_yes(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="positive integer value but the value passed is True"):
        veneer.LoraConfig(**fields)
