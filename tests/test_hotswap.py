"""One LoRA in the place of another: as loaded afresh, wholly or not at all, and without compiling again."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import veneer
from veneer.engine.layer import adapted_layers
from veneer.errors import ConfigError, LoadError, MergeError, PeftWarning, RouteError, SwapError
from veneer.helpers import rescale_adapter_scale
from veneer.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from veneer.testing import SITES, sites_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.lin0, self.lin1 = nn.Embedding(9, 12), nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(torch.tanh(self.lin0(self.table(x))))


X = torch.arange(9).view(3, 3)
ALL = ["table", "lin0", "lin1"]


def saved(folder: Path, name: str, model: nn.Module | None = None, **options: Any) -> Path:
    """A LoRA on disk, all numbers random."""
    torch.manual_seed(sum(map(ord, name)))
    config = veneer.LoraConfig(**{"r": 4, "target_modules": ALL, "init_lora_weights": False, **options})
    base = Net() if model is None else model
    torch.manual_seed(sum(map(ord, name)))
    veneer.get_peft_model(base, config).save_pretrained(folder / name)
    return folder / name


def fresh(path: Path, base: nn.Module | None = None) -> Any:
    return veneer.PeftModel.from_pretrained(Net() if base is None else base, path).eval()


@torch.no_grad()
def out(model: Any, x: Tensor = X) -> Tensor:
    y: Tensor = model(x)
    return y


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 9},
        {"r": 2},
        {"r": 7, "lora_alpha": 3},
        {"rank_pattern": {"lin1": 6}, "alpha_pattern": {"lin0": 1}},
        {"target_modules": ["lin0"]},
    ],
)
def test_it_is_as_loaded_afresh_and_the_config_follows(options: dict[str, Any], tmp_path: Path) -> None:
    model = fresh(saved(tmp_path, "one", lora_alpha=5))
    two = saved(tmp_path, "two", **options)
    hotswap_adapter(model, two, "default")
    again = fresh(two)
    assert torch.equal(out(model), out(again))
    config = model.peft_config["default"]
    for path, layer in adapted_layers(again.get_base_model()):
        assert config.at(path).r == layer.r["default"] and config.at(path).scale() == layer.scaling["default"]
        assert {p: x.scaling["default"] for p, x in adapted_layers(model.get_base_model())}[path] == layer.scaling["default"]
    model.save_pretrained(tmp_path / "three")
    assert torch.equal(out(fresh(tmp_path / "three")), out(model))
    hotswap_adapter(model, tmp_path / "one", "default")
    assert torch.equal(out(model), out(fresh(tmp_path / "one")))


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True, "target_modules": ["lin0", "lin1"]}]
)
def test_what_stands_beside_the_factors_is_swapped_too(options: dict[str, Any], tmp_path: Path) -> None:
    model = fresh(saved(tmp_path, "one", **options))
    for r in (4, 3):
        two = saved(tmp_path, f"two{r}", **{**options, "r": r, "lora_alpha": 11})
        hotswap_adapter(model, two, "default")
        assert torch.equal(out(model), out(fresh(two)))


def test_copies_of_whole_modules_are_swapped(tmp_path: Path) -> None:
    fields = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
    one, two = saved(tmp_path, "one", **fields), saved(tmp_path, "two", **fields)
    tensors = veneer.load_peft_weights(two, device="cpu")
    tensors["base_model.model.lin1.weight"] = tensors["base_model.model.lin1.weight"] * 2
    model = fresh(one)
    hotswap_adapter_from_state_dict(model, tensors, "default", veneer.PeftConfig.from_pretrained(two))
    assert torch.equal(model.get_base_model().lin1.modules_to_save["default"].weight, tensors["base_model.model.lin1.weight"])


def test_copies_of_whole_modules_keep_their_dtype(tmp_path: Path) -> None:
    """As when they are loaded afresh: the module computes in it."""
    one, two = (saved(tmp_path, n, target_modules=["lin0"], modules_to_save=["lin1"]) for n in ("one", "two"))
    file = two / "adapter_model.safetensors"
    save_file({k: t.bfloat16() for k, t in load_file(file).items()}, file)
    model = fresh(one)
    hotswap_adapter(model, two, "default")
    assert torch.equal(out(model), out(fresh(two)))


def test_a_config_that_does_not_go_with_its_file_is_refused(tmp_path: Path) -> None:
    """As where it is loaded; both take `check_config`."""
    one, two = saved(tmp_path, "one"), saved(tmp_path, "two")
    written = two / "adapter_config.json"
    written.write_text(json.dumps({**json.loads(written.read_text()), "lora_alpha": 77}))
    model = fresh(one)
    before = out(model)
    with pytest.raises(LoadError, match=r"lora_alpha is 77.*check_config=False"):
        hotswap_adapter(model, two, "default")
    assert torch.equal(out(model), before)
    hotswap_adapter(model, two, "default", check_config=False)
    with pytest.raises(LoadError, match=r"lora_alpha is 77.*check_config=False"):
        fresh(two)
    other = fresh(one)
    other.load_adapter(two, "other", check_config=False, check_base="error")
    other.set_adapter("other")
    assert torch.equal(out(model), out(other))
    assert torch.equal(out(model), out(veneer.PeftModel.from_pretrained(other.unload(), two, check_config=False)))


def test_from_names_in_memory_on_a_bare_model(tmp_path: Path) -> None:
    """As diffusers calls it."""
    path = saved(tmp_path, "two", r=4, lora_alpha=9)
    model = Net()
    veneer.inject_adapter_in_model(veneer.LoraConfig(r=4, target_modules=ALL), model, "x")
    tensors = {}
    for key, t in veneer.load_peft_weights(path, device="cpu").items():
        key = key.removeprefix("base_model.model.")
        tensors[key.replace(".weight", ".x.weight") if key.endswith(".weight") else f"{key}.x"] = t
    hotswap_adapter_from_state_dict(model, tensors, "x", veneer.PeftConfig.from_pretrained(path))
    assert torch.equal(out(model.eval()), out(fresh(path)))
    assert model.peft_config["x"].lora_alpha == 9


def test_wholly_or_not_at_all(tmp_path: Path) -> None:
    model = fresh(saved(tmp_path, "one"))
    path = saved(tmp_path, "two", lora_alpha=9)
    before, config = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(model.peft_config["default"])
    good, theirs = veneer.load_peft_weights(path, device="cpu"), veneer.PeftConfig.from_pretrained(path)
    first = next(iter(good))
    broken: list[tuple[str, dict[str, Tensor]]] = [
        (
            "unexpected keys found: base_model.model.lin9.lora_A.weight.*Did you mean",
            {**good, "base_model.model.lin9.lora_A.weight": good[first]},
        ),
        ("1 of the 6 tensors it needs are missing", {k: v for k, v in good.items() if k != first}),
        (
            r"has the shape \(3, 12\), and its config asks for \(4, 12\)",
            {**good, "base_model.model.lin0.lora_A.weight": torch.zeros(3, 12)},
        ),
    ]
    for text, tensors in broken:
        with pytest.raises(SwapError, match=text):
            hotswap_adapter_from_state_dict(model, tensors, "default", theirs)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert model.peft_config["default"] == config
    with pytest.raises(RuntimeError, match="unexpected keys"):  # PEFT's kind of error
        hotswap_adapter_from_state_dict(model, broken[0][1], "default", theirs)


def test_what_cannot_be_swapped(tmp_path: Path) -> None:
    one, two = saved(tmp_path, "one"), saved(tmp_path, "two")
    model = fresh(one)
    with pytest.raises(RouteError, match="no adapter 'other'"):
        hotswap_adapter(model, two, "other")
    with pytest.raises(ConfigError, match="for use_rslora, False != True"):
        hotswap_adapter(model, saved(tmp_path, "three", use_rslora=True), "default")
    model.merge_adapter()
    with pytest.raises(MergeError, match=r"currently merged.*unmerge_adapter"):
        hotswap_adapter(model, two, "default")
    dora = fresh(saved(tmp_path, "dora", use_dora=True))
    with pytest.raises(SwapError, match="does not target 'table', whose DoRA"):
        hotswap_adapter(dora, saved(tmp_path, "less", use_dora=True, target_modules=["lin0", "lin1"]), "default")


def test_configs_that_go_together() -> None:
    lora = veneer.LoraConfig(r=4)
    check_hotswap_configs_compatible(lora, veneer.LoraConfig(r=8, lora_alpha=1, rank_pattern={"a": 2}, alpha_pattern={"a": 3}))
    for other, text in [
        (veneer.IA3Config(), "Incompatible PEFT types found: LORA and IA3"),
        (veneer.LoraConfig(lora_dropout=0.1), "for lora_dropout, 0.0 != 0.1"),
        (veneer.LoraConfig(use_dora=True), "for use_dora, False != True"),
        (veneer.LoraConfig(use_qalora=True), "for use_qalora, False != True"),
    ]:
        with pytest.raises(ConfigError, match=text):
            check_hotswap_configs_compatible(lora, other)
    with pytest.raises(ConfigError, match="only supports LORA but IA3"):
        check_hotswap_configs_compatible(veneer.IA3Config(), veneer.IA3Config())


# -------------------------------------------------------------------- compiled


@pytest.mark.parametrize(
    ("way", "ranks"),
    [
        ("wrapped", [(4, 5), (2, 8), (7, 3), (7, 100)]),
        ("in place", [(7, 5), (7, 8), (3, 8)]),
        ("layer", [(4, 5), (2, 8), (7, 3)]),
    ],
)
def test_a_prepared_model_is_compiled_once(way: str, ranks: list[tuple[int, int]], tmp_path: Path) -> None:
    torch._dynamo.reset()
    paths = [saved(tmp_path, f"r{r}a{alpha}", r=r, lora_alpha=alpha) for r, alpha in ranks]
    model = fresh(paths[0])
    prepare_model_for_compiled_hotswap(model, target_rank=7)
    assert model.peft_config["default"].r == 7
    torch.testing.assert_close(out(model), out(fresh(paths[0])))
    counter = CompileCounter()
    run: Any = model
    if way == "wrapped":
        run = torch.compile(model, backend=counter, fullgraph=True)
    elif way == "in place":
        model.compile(backend=counter, fullgraph=True)
    else:
        model.get_base_model().lin0.compile(backend=counter, fullgraph=True)
    out(run)
    assert counter.frame_count == 1
    for path in paths[1:] + paths[:1]:
        hotswap_adapter(run, path, "default")
        torch.testing.assert_close(out(run), out(fresh(path)), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_equal_ranks_and_alphas_need_no_preparing(tmp_path: Path) -> None:
    torch._dynamo.reset()
    one, two, three = (saved(tmp_path, n, **o) for n, o in (("one", {}), ("two", {}), ("three", {"lora_alpha": 3})))
    model = fresh(one)
    counter = CompileCounter()
    model.compile(backend=counter, fullgraph=True)
    out(model)
    hotswap_adapter(model, two, "default")
    assert torch.equal(out(model), out(fresh(two)))
    assert counter.frame_count == 1
    hotswap_adapter(model, three, "default")  # right all the same
    torch.testing.assert_close(out(model), out(fresh(three)))
    torch._dynamo.reset()


def test_without_a_target_rank_the_scaling_alone_is_prepared(tmp_path: Path) -> None:
    torch._dynamo.reset()
    one, two, more = (saved(tmp_path, n, **o) for n, o in (("one", {}), ("two", {"r": 2, "lora_alpha": 3}), ("more", {"r": 6})))
    model = fresh(one)
    prepare_model_for_compiled_hotswap(model)
    counter = CompileCounter()
    model.compile(backend=counter, fullgraph=True)
    out(model)
    hotswap_adapter(model, two, "default")
    torch.testing.assert_close(out(model), out(fresh(two)), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1 and model.peft_config["default"].r == 4
    with pytest.raises(SwapError, match="room for"):
        hotswap_adapter(model, more, "default")
    torch._dynamo.reset()


def test_a_prepared_adapter_is_an_adapter(tmp_path: Path) -> None:
    """It saves, loads, merges, scales, trains and moves."""
    one, two = (
        saved(tmp_path, "one", lora_alpha=5, rank_pattern={"lin0": 2}),
        saved(tmp_path, "two", r=3, lora_alpha=7, alpha_pattern={"lin1": 2}),
    )
    model = fresh(one)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    hotswap_adapter(model, two, "default")
    y = out(fresh(two))
    torch.testing.assert_close(out(model), y)
    model.save_pretrained(tmp_path / "three")
    config = veneer.PeftConfig.from_pretrained(tmp_path / "three")
    assert config.r == 6 and config.at("lin0").scale() == pytest.approx(7 / 3) and config.at("lin1").scale() == pytest.approx(2 / 3)
    torch.testing.assert_close(out(fresh(tmp_path / "three")), y)
    torch.testing.assert_close(out(copy.deepcopy(model).merge_and_unload()), y)
    layer = model.get_base_model().lin0
    layer.set_scale("default", 2.0)
    assert isinstance(layer.scaling["default"], Tensor) and not torch.equal(out(model), out(fresh(two)))
    layer.unscale_layer()
    torch.testing.assert_close(out(model), y)
    with rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(out(model), out(Net()))
    torch.testing.assert_close(out(model), y)
    torch.testing.assert_close(out(model.to(torch.float64)), y.double(), atol=1e-6, rtol=1e-5)
    model.float().train().set_requires_grad("default")
    model(X).square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    plain = fresh(two).train()
    plain.set_requires_grad("default")
    plain(X).square().sum().backward()
    for n, p in plain.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[n][tuple(slice(0, k) for k in p.shape)], p.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("site", sites_of(veneer.LoraConfig()))
def test_there_is_room_on_every_site(site: str, tmp_path: Path) -> None:
    case = SITES[site]

    def base() -> nn.Module:
        torch.manual_seed(1)
        return case.model()

    options = {"lora_alpha": 3, **case.fields}
    one, two, three = (saved(tmp_path, n, base(), **{**options, "r": r}) for n, r in (("one", 2), ("two", 4), ("three", 6)))
    model, x = fresh(one, base()), case.inputs(3)
    y = out(model, x)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    torch.testing.assert_close(out(model, x), y, atol=1e-5, rtol=1e-5)
    for path in (two, three, one):
        hotswap_adapter(model, path, "default")
        torch.testing.assert_close(out(model, x), out(fresh(path, base()), x), atol=1e-5, rtol=1e-5)


def test_preparing_refuses_before_it_changes_anything(tmp_path: Path) -> None:
    path = saved(tmp_path, "one")
    model = fresh(path)
    before = {k: v.shape for k, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"target rank 2, but the original rank is larger \(4\)"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(ConfigError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(Net())
    with pytest.raises(ConfigError, match="one of 'error', 'warn', or 'ignore', got 'no'"):
        prepare_model_for_compiled_hotswap(model, check_compiled="no")  # type: ignore[arg-type]
    kasa = veneer.get_peft_model(Net(), veneer.LoraConfig(r=2, target_modules=["lin0"], kasa_config=veneer.KasaConfig()))
    with pytest.raises(ConfigError, match="`kasa_config` means another change at another rank"):
        prepare_model_for_compiled_hotswap(kasa, target_rank=4)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ConfigError, match=r"\*before\* compiling"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    assert {k: v.shape for k, v in model.state_dict().items()} == before and not isinstance(
        model.get_base_model().lin0.scaling["default"], Tensor
    )
    with pytest.warns(PeftWarning, match="already compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=5, check_compiled="warn")
    with pytest.raises(SwapError, match=r"has the shape \(6, .*room for \(5, .*target_rank"):
        hotswap_adapter(model, saved(tmp_path, "two", r=6), "default")


def test_further_configs_are_brought_up_to_the_rank() -> None:
    model = veneer.get_peft_model(Net(), veneer.LoraConfig(r=4, target_modules=["lin0", "lin1"]))
    other = veneer.LoraConfig(r=2, lora_alpha=3, rank_pattern={"lin1": 1}, target_modules=["lin0", "lin1"])
    scales = {n: other.at(n).scale() for n in ("lin0", "lin1")}
    prepare_model_for_compiled_hotswap(model, target_rank=8, config={"default": model.peft_config["default"], "other": other})
    assert other.r == 8 and not other.rank_pattern
    assert {n: other.at(n).scale() for n in scales} == scales
    assert (model.peft_config["default"].r, model.peft_config["default"].lora_alpha) == (8, 16)
    assert {f.name for f in dataclasses.fields(other)}  # it stays a config


def test_a_module_that_only_the_new_adapter_trains_whole_is_left_alone(tmp_path: Path) -> None:
    class Told(Net):  # tells its embeddings, so that a file may hold them
        def get_input_embeddings(self) -> nn.Module:
            return self.table

    one = saved(tmp_path, "one", Told(), target_modules=["lin0"])
    two = saved(tmp_path, "two", Told(), target_modules=["lin0"], modules_to_save=["table"])
    model = fresh(one, Told())
    before = out(model)
    with pytest.raises(SwapError, match="trains 'table' whole"):
        hotswap_adapter(model, two, "default")
    assert torch.equal(out(model), before) and torch.equal(model.get_base_model().table.weight, Told().table.weight)


def test_scalings_keep_their_precision_when_the_model_is_cast() -> None:
    model = veneer.get_peft_model(nn.Sequential(nn.Linear(4, 4)), veneer.LoraConfig(r=3, lora_alpha=1, target_modules=["0"]))
    prepare_model_for_compiled_hotswap(model)
    model.to(torch.bfloat16)
    assert float(model.base_model.model[0].scaling["default"]) == pytest.approx(1 / 3, rel=1e-6)
