"""accelerate: prepare, save_state and load_state, device maps with offload to the CPU and to disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from accelerate.utils import is_peft_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import veneer
from veneer.distributed import save_merged

from .small import ids, llama, stir


def _model() -> Any:
    torch.manual_seed(0)
    return get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], lora_dropout=0.2))


def _steps(accelerator: accelerate.Accelerator, model: Any, optimizer: Any, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = model(input_ids=ids(), labels=ids()).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_a_saved_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = _model()
    assert is_peft_model(model)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    model.train()
    _steps(accelerator, model, optimizer, 2)
    accelerator.save_state(str(tmp_path))
    want = _steps(accelerator, model, optimizer, 3)
    _steps(accelerator, model, optimizer, 2)
    accelerator.load_state(str(tmp_path))
    assert _steps(accelerator, model, optimizer, 3) == want
    assert isinstance(accelerator.unwrap_model(model), PeftModel)


PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.filterwarnings("ignore:.*offload.*")
def test_an_offloaded_base_does_what_the_whole_one_does(where: str, tmp_path: Path) -> None:
    """Layers kept in another place are brought in for their call; adapters on them act, train and save as ever."""
    llama().save_pretrained(tmp_path / "base")
    whole = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    stir(whole)
    whole.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = whole(ids()).logits
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if where == "cpu":  # with no accelerator, the CPU stands for one, and weights come from a copy on the CPU
        accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(base, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in base.parameters())
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(model(ids()).logits, want, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path / "again")(ids()).logits, want)
    with pytest.raises(veneer.MergeError, match="merge_and_unload"):  # there is no room for both weights where they are kept
        model.merge_adapter()
    with torch.no_grad():
        assert torch.allclose(model(ids()).logits, want, atol=1e-6)
    merged = model.merge_and_unload()
    assert any(p.is_meta for p in merged.parameters()) and not any("lora" in n for n in merged.state_dict())
    with torch.no_grad():
        assert torch.allclose(merged(ids()).logits, want, atol=1e-5)


def test_a_device_map_with_parts_on_disk(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    whole = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    stir(whole)
    whole.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = whole(ids()).logits
    places: dict[str, Any] = {name: "disk" if name == "model.layers.1" else "cpu" for name in PARTS}
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "offload"))
    assert any(p.is_meta for p in base.parameters())
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(model(ids()).logits, want, atol=1e-6)
        assert torch.allclose(model.merge_and_unload()(ids()).logits, want, atol=1e-5)


def _offloaded(base: Any, where: str, tmp_path: Path) -> Any:
    if where == "cpu":
        accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
        return base
    if where == "disk":
        accelerate.disk_offload(base, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
        return base
    places: dict[str, Any] = {name: "disk" if name in ("model.layers.1", "model.embed_tokens") else "cpu" for name in PARTS}
    return accelerate.dispatch_model(base, places, offload_dir=str(tmp_path / "offload"), force_hooks=True)


@pytest.mark.parametrize("where", ["cpu", "disk", "map"])
@pytest.mark.filterwarnings("ignore:.*offload.*")
def test_weights_of_an_offloaded_base_go_with_the_adapter_both_ways(where: str, tmp_path: Path) -> None:
    """Targeted embeddings and trained biases are in the file. Those that are loaded act, where accelerate would bring the old ones in over them."""
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], bias="lora_only")
    whole = get_peft_model(llama(attention_bias=True), config)
    stir(whole)
    with torch.no_grad():  # other embeddings than the base's
        whole.base_model.model.model.embed_tokens.base_layer.weight.mul_(1.5)
        want = whole(ids()).logits
    whole.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(_offloaded(llama(attention_bias=True), where, tmp_path), tmp_path / "adapter")
    for _ in range(2):
        with torch.no_grad():
            assert torch.allclose(model(ids()).logits, want, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(llama(attention_bias=True), tmp_path / "again")(ids()).logits, want)


@pytest.mark.filterwarnings("ignore:.*offload.*")
def test_a_bias_that_would_not_train_there_is_refused(tmp_path: Path) -> None:
    base = _offloaded(llama(attention_bias=True), "cpu", tmp_path)
    with pytest.raises(veneer.ConfigError, match=r"keeps the weights of 'model.layers.0.self_attn.q_proj' elsewhere.*bias='none'"):
        get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only"))
    assert not any("lora" in n for n, _ in base.named_parameters())


@pytest.mark.parametrize("where", ["cpu", "disk", "map"])
@pytest.mark.filterwarnings("ignore:.*offload.*")
def test_a_merged_model_is_written_from_an_offloaded_base(where: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "merged")  # the one file there, which transformers reads first, has to go
    whole = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]))
    stir(whole)
    whole.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(_offloaded(llama(), where, tmp_path), tmp_path / "adapter")
    save_merged(model, tmp_path / "merged")
    with torch.no_grad():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(merged(ids()).logits, whole(ids()).logits, atol=1e-5)


OWN: dict[str, Any] = {
    "modules_to_save": lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "mlp"]),
    "norms": lambda: veneer.LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("where", ["cpu", "layers", "map"])
@pytest.mark.parametrize("kind", OWN)
@pytest.mark.filterwarnings("ignore:.*offload.*")
def test_whole_modules_of_an_adapter_act_where_the_base_is_offloaded(kind: str, where: str, tmp_path: Path) -> None:
    """accelerate's forward runs the very module it was put into, and brings the base's weights in over what is there."""
    whole = get_peft_model(llama(), OWN[kind]())
    stir(whole)
    whole.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = whole(ids()).logits
    base = llama()
    if where == "cpu":
        accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    else:  # "layers": hooks that bring nothing in, as a map over several devices has
        places: dict[str, Any] = {name: "disk" if (name, where) == ("model.layers.1", "map") else "cpu" for name in PARTS}
        base = accelerate.dispatch_model(base, places, offload_dir=str(tmp_path / "offload"), force_hooks=True)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    loss = model(ids()).logits.square().sum()
    with torch.no_grad():
        assert torch.allclose(model(ids()).logits, want, atol=1e-6)
        with model.disable_adapter():
            assert torch.allclose(model(ids()).logits, llama()(ids()).logits, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path / "again")(ids()).logits, want)
        assert torch.allclose(model.merge_and_unload()(ids()).logits, want, atol=1e-5)


TARGETS = ["q_proj", "down_proj"]
OFFLOADED: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=4, target_modules=TARGETS),
    "pissa": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
    "dora": lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "hira": lambda: veneer.HiraConfig(r=4, target_modules=TARGETS),
    "oft": lambda: veneer.OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "ia3": lambda: veneer.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("kind", OFFLOADED)
def test_training_with_an_offloaded_base(kind: str) -> None:
    """Adapters are made where the layer runs, not where its weights wait; a start or a change that needs the weights sees them."""

    def grads(offload: bool) -> dict[str, torch.Tensor]:
        base = llama()
        if offload:
            accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
        model = get_peft_model(base, OFFLOADED[kind]())
        assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
        if kind != "pissa":
            stir(model)
        model.train()(input_ids=ids(), labels=ids()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, again = grads(False), grads(True)
    assert plain and all(torch.allclose(g, again[n], atol=1e-6) for n, g in plain.items())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(3, 4, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((x @ self.up[e] @ self.down[e] for e in range(3)), self.bias)


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


WHOLE: dict[str, Any] = {
    "experts": (Experts, LoraConfig(target_modules=[], target_parameters=["0.up", "0.down"], init_lora_weights=False)),
    "one of the experts' parameters": (Experts, LoraConfig(target_modules=[], target_parameters=["0.up"], init_lora_weights=False)),
    "conv, rotated": (lambda: nn.Conv1d(4, 4, 2), veneer.OFTConfig(oft_block_size=2, target_modules=["0"], init_weights=False)),
    "conv, dora": (lambda: nn.Conv1d(4, 4, 2), LoraConfig(use_dora=True, target_modules=["0"], init_lora_weights=False)),
    "own forward": (lambda: Scaled(4, 4), LoraConfig(target_modules=["0"], init_lora_weights=False)),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_weights_are_changed_where_the_base_is_offloaded(kind: str) -> None:
    """What a layer cannot take apart runs with W' formed whole, and W has to be brought in for that."""
    make, config = WHOLE[kind]
    x = torch.randn(3, 4, 4)

    def run(offload: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        base = nn.Sequential(make())
        if offload:
            accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
        torch.manual_seed(5)
        model = get_peft_model(base, copy.deepcopy(config))
        y = model(x)
        y.square().sum().backward()
        return [y, *(p.grad for p in model.parameters() if p.requires_grad)]

    for want, got in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["lora", "dora", "oft", "ia3"])
def test_a_model_that_is_offloaded_with_its_adapters(kind: str, tmp_path: Path) -> None:
    """Then the adapters wait elsewhere too, and are brought in for each call."""
    model = get_peft_model(llama(), OFFLOADED[kind]()).eval()
    stir(model)
    with torch.no_grad():
        want = model(ids()).logits
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(p.is_meta for p in model.parameters())
        for _ in range(2):
            assert torch.allclose(model(ids()).logits, want, atol=1e-6)
    with pytest.raises(veneer.SaveError, match="meta"):
        model.save_pretrained(tmp_path)
