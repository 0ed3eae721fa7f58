"""One process of several: trains methods under one layout, compares with a single process, saves. Started by torchrun from test_distributed.py."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import veneer
from veneer.distributed import fsdp_auto_wrap_policy, gathered, load_state, save_merged, save_state, shard

QV = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "lora": lambda: veneer.LoraConfig(r=4, target_modules=QV),
    "dropped": lambda: veneer.LoraConfig(r=4, target_modules=QV, lora_dropout=0.3),
    "dora": lambda: veneer.LoraConfig(r=4, target_modules=QV, use_dora=True),
    "adalora": lambda: veneer.AdaLoraConfig(init_r=6, target_r=3, target_modules=QV, total_step=20, tinit=2, tfinal=6, deltaT=2),
    "ia3": lambda: veneer.IA3Config(target_modules=[*QV, "k_proj"], feedforward_modules=["down_proj"]),
    "oft": lambda: veneer.OFTConfig(oft_block_size=8, target_modules=QV),
    "vera": lambda: veneer.VeraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    "prompt": lambda: veneer.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "saved": lambda: veneer.LoraConfig(r=4, target_modules=QV, modules_to_save=["lm_head"]),
    "tied": lambda: veneer.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "pissa": lambda: veneer.LoraConfig(r=4, target_modules=QV, init_lora_weights="pissa"),
}
SITES: dict[str, Any] = {  # on the parts of `Mixed`, as "method@part"
    "lora": lambda **at: veneer.LoraConfig(r=4, **at),
    "dora": lambda **at: veneer.LoraConfig(r=4, use_dora=True, **at),
    "biased": lambda **at: veneer.LoraConfig(r=4, use_dora=True, bias="lora_only", **at),
    "ia3": lambda **at: veneer.IA3Config(feedforward_modules=[], **at),
    "ia3in": lambda target_modules: veneer.IA3Config(target_modules=target_modules, feedforward_modules=target_modules),
    "oft": lambda **at: veneer.OFTConfig(oft_block_size=8, **at),
}
KINDS: dict[str, Any] = {  # other models than Llama, as "method/kind", with what their configs need beside the sizes
    "qwen2": {}, "qwen3": {"head_dim": 8}, "gemma3_text": {"head_dim": 8}, "phi3": {}, "gpt_neox": {}, "glm": {"head_dim": 8},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "layer_types": ["full_attention"] * 2},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 8, "qk_nope_head_dim": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    },
}  # fmt: skip
VOCAB, LENGTH, STEPS, LINEAR = 64, 12, 20, nn.functional.linear


class Mixed(nn.Module):
    """A table, a convolution over the positions, attention, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(VOCAB, 32), nn.Conv2d(32, 32, (1, 3), padding=(0, 1))
        self.attention, self.head = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, VOCAB)

    def forward(self, input_ids: Tensor) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        x = self.embedding(input_ids)
        x = x + torch.tanh(self.conv(x.mT[:, :, None])[:, :, 0].mT)
        return CausalLMOutput(logits=self.head(x + self.attention(x, x, x)[0]))


def config_of(method: str) -> Any:
    if "/" in method:
        return veneer.LoraConfig(r=4, target_modules="all-linear", use_dora=method.startswith("dora"), task_type="CAUSAL_LM")
    if "@" not in method:
        return CONFIGS[method]()
    name, _, part = method.partition("@")
    return SITES[name](**({"target_parameters": [part]} if "." in part else {"target_modules": [part]}))


def bare_model(method: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if "@" in method:
        return Mixed()
    kind = method.partition("/")[2] or "llama"
    config = AutoConfig.for_model(
        kind, vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        tie_word_embeddings=method == "tied", pad_token_id=0, **KINDS.get(kind, {"attention_bias": True}),
    )  # fmt: skip
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():  # biases that are not zero
        p.data += 0.02 * torch.randn_like(p)
    return model


def adapted(method: str, base: nn.Module | None = None) -> Any:
    base = bare_model(method) if base is None else base
    torch.manual_seed(1)
    return veneer.get_peft_model(base, config_of(method))


def batches(steps: int = STEPS) -> list[Tensor]:
    """The rows of each step, four passes over one set; the last batch of each pass is uneven, 3 rows."""
    g = torch.Generator().manual_seed(7)
    once = [torch.randint(0, VOCAB, (3 if i == 4 else 4, LENGTH), generator=g) for i in range(5)]
    return [once[i % 5] for i in range(steps)]


def total_loss(model: Any, rows: Tensor) -> Tensor:
    """Sum over the rows; a process without rows takes a row that does not count."""
    empty = not len(rows)
    ids = torch.zeros(1, LENGTH, dtype=torch.long) if empty else rows
    logits = model(input_ids=ids).logits[:, -LENGTH:-1]
    loss = nn.functional.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1), reduction="sum")
    return loss * 0 if empty else loss


def mine(rows: Tensor, rank: int, world: int) -> Tensor:
    size = -(-4 // world)
    return rows[rank * size : (rank + 1) * size]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=False)


def single(method: str, steps: int = STEPS) -> tuple[Any, list[float]]:
    model = adapted(method)
    opt, losses = optimizer_of(model), []
    for step, rows in enumerate(batches(steps)):
        # with dropout each row draws by itself, as four processes do; `zero.Init` leaves a linear of its own in torch's place
        with patch.object(nn.functional, "linear", LINEAR):
            loss = torch.zeros(())
            for i, part in enumerate(rows.split(1 if method == "dropped" else len(rows))):
                torch.manual_seed(10 * step + i)
                loss = loss + total_loss(model, part) / (len(rows) * (LENGTH - 1))
            loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    return model, losses


class Bytes(TorchDispatchMode):
    """Bytes of each collective's whole message, by operation: the tensor reduced, the tensor gathered, the tensor that is scattered.

    On the CPU the backward pass runs in the calling thread, so DDP's reducer passes here as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [sum(t.nbytes for t in tree_leaves(a) if isinstance(t, Tensor)) for a in args]
            name = func._schema.name.removeprefix("c10d::")
            self.by[name] = self.by.get(name, 0) + max(sizes)
        return func(*args, **(kwargs or {}))


def deepspeed_engine(model: nn.Module, stage: int, **config: Any) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer_of(model),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,  # DeepSpeed clips at 1 unless told otherwise
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **config,
        },
    )
    return engine


def cut(base: nn.Module) -> nn.Module:
    """Each tensor in pieces, as ZeRO-3 makes a model."""
    import deepspeed

    deepspeed.zero.Init(module=base, config_dict_or_path={"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    return base


def parallel(base: nn.Module) -> nn.Module:
    """Cut by a plan: attention by heads, the feed-forward by its width."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in base.model.layers:  # type: ignore[union-attr]
        columns = {
            n: ColwiseParallel() for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        }
        rows = {n: RowwiseParallel() for n in ("self_attn.o_proj", "mlp.down_proj")}
        parallelize_module(layer, mesh, {**columns, **rows})
    return base


def planned(base: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """Cut by transformers as it loads the model from a folder, by the model's own plan. `options`: for loading."""
    from transformers import AutoModelForCausalLM

    if dist.get_rank() == 0:
        base.save_pretrained(folder)  # type: ignore[operator]
    dist.barrier()
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", **options)
    assert options or any(hasattr(p, "full_tensor") for p in loaded.parameters()), "the plan has cut nothing"
    return loaded


PLANS = ("tp", "tp_plan")
KEPT: list[Any] = []  # models that outlive their task


def wrapped(model: Any, layout: str) -> Any:
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if layout in PLANS:
        return model
    if layout == "fsdp2":
        return shard(model)
    if layout == "hsdp":
        from torch.distributed.device_mesh import init_device_mesh

        return shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    if layout == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(
            model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=True, device_id=torch.device("cpu")
        )
    return deepspeed_engine(model, int(layout[-1]))


def train(model: Any, layout: str, todo: list[Tensor], opt: Any = None) -> list[float]:
    rank, world = (0, 1) if layout in PLANS else (dist.get_rank(), dist.get_world_size())
    opt, losses = opt or (None if layout.startswith("zero") else optimizer_of(model)), []
    for step, rows in enumerate(todo):
        torch.manual_seed(10 * step + rank)
        part = mine(rows, rank, world)
        loss = total_loss(model, part) * world / (len(rows) * (LENGTH - 1))
        if opt is None:
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            opt.step()
            opt.zero_grad()
        mean = loss.detach().clone() / world
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean))
    return losses


def run(method: str, layout: str, out: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    reference, expected = single(method)
    world = dist.get_world_size()
    base = cut(bare_model(method)) if layout == "zero3" else None
    if layout == "tp":
        base = parallel(bare_model(method))
    if layout == "tp_plan":
        base = planned(bare_model(method), out / f"base-{method.replace('/', '-')}")
    model = adapted(method, base)
    KEPT.extend([model] if method == "adalora" else [])
    engine = wrapped(model, layout)
    got = train(engine, layout, batches())
    name = method.replace("/", "-")
    folder = out / f"{name}-{layout}-{world}"
    with gathered(engine) if layout == "fsdp1" else nullcontext():
        model.save_pretrained(folder, is_main_process=rank == 0)
        tensors = {k: t.clone() for k, t in veneer.get_peft_model_state_dict(model).items()}
    want = veneer.get_peft_model_state_dict(reference)
    keys = set(tensors) == set(want)
    result = {
        "losses": max(abs(a - b) for a, b in zip(got, expected, strict=True)),
        "learned": expected[0] - expected[-1],
        "keys": keys,
        "adapter": max(float((tensors[k] - want[k]).abs().max()) if tensors[k].shape == want[k].shape else 1e9 for k in want)
        if keys
        else 1e9,
    }
    if method not in ("prompt",):
        merged = out / f"merged-{name}-{layout}-{world}"
        save_merged(engine if layout == "fsdp1" else model, merged)
        dist.barrier()
        if layout != "fsdp1":
            result["merged"] = off_by(merged, reference)
    dist.barrier()
    return result


def merging(method: str, layout: str, out: Path) -> dict[str, Any]:
    """Merged and not, on and off, in mixed batches: how far the logits are from a single process'."""
    ids = batches(1)[0]

    def off(**how: Any) -> float:
        with torch.no_grad():
            return float((spread(input_ids=ids, **how).logits - one(input_ids=ids, **how).logits).abs().max())

    base = planned(bare_model(method), out / "base-merging") if layout == "tp_plan" else bare_model(method)
    one, model = adapted(method), adapted(method, parallel(base) if layout == "tp" else base)
    for m in (one, model):
        torch.manual_seed(2)
        m.add_adapter("other", CONFIGS[method]())
        torch.manual_seed(3)
        for p in (p for p in m.parameters() if p.requires_grad):  # what starts at zero is to act too
            p.data += 0.1 * torch.randn(p.shape)
    spread = wrapped(model, layout)
    inner = spread if layout == "fsdp2" else model
    result = {"trained": off()}
    if layout != "fsdp2":
        result["rows"] = off(adapter_names=["default", "other", "__base__", "default"])
    with torch.no_grad():
        on = one(input_ids=ids).logits
        with one.disable_adapter():
            acts = float((on - one(input_ids=ids).logits).abs().max())
    for m in (inner, one):
        m.merge_adapter()
    result["merged"] = off()
    with inner.disable_adapter(), one.disable_adapter():
        result["off"] = off()
    for m in (inner, one):
        m.unmerge_adapter()
    return {**result, "unmerged": off(), "acts": acts}


def refusals(method: str, layout: str, out: Path) -> dict[str, Any]:
    """What is said of adapters that a plan leaves no place for."""
    refused: dict[str, Any] = {
        "whole": lambda: veneer.LNTuningConfig(target_modules=["o_proj"]),
        "bias": lambda: veneer.LoraConfig(r=4, target_modules=QV, bias="lora_only"),
        "block": lambda: veneer.LoraConfig(r=4, target_modules=QV, modules_to_save=["mlp"]),
        "parameter": lambda: veneer.LoraConfig(r=4, target_modules=[], target_parameters=["self_attn.q_proj.weight"]),
        "cache": lambda: veneer.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "norm": lambda: veneer.LNTuningConfig(target_modules=["q_norm"]),
        "copy": lambda: veneer.LoraConfig(r=4, target_modules=QV, modules_to_save=["k_norm"]),
        "piece": CONFIGS[method],
    }
    said: dict[str, Any] = {}
    for name, config in refused.items():
        base = bare_model("lora/qwen3" if name in ("norm", "copy") else method)
        if name == "piece":
            weight = base.model.layers[0].self_attn.q_proj.weight  # type: ignore[union-attr]
            weight.data = weight.data[:16].clone()
        try:
            train(veneer.get_peft_model(planned(base, out / "base-refused") if name != "piece" else base, config()), layout, batches(1))
            said[name] = "nothing"
        except veneer.ConfigError as e:
            said[name] = str(e)
    return said


def packed(method: str, layout: str, out: Path) -> dict[str, Any]:
    """What is said of adapters on packed weights that a plan has cut, by storage."""
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig

    storages = {
        "nf4": lambda: transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "int8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
        "torchao": lambda: transformers.TorchAoConfig(Int8WeightOnlyConfig()),
        "quanto": lambda: transformers.QuantoConfig(weights="int8"),
    }
    said: dict[str, Any] = {}
    folder = out / f"base-packed-{layout}"
    planned(bare_model(method), folder)
    for name, storage in storages.items():
        if layout == "tp_plan":
            base = planned(bare_model(method), folder, quantization_config=storage())
        elif name != "torchao":  # torch cannot cut it
            base = parallel(transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=storage()))
        else:
            continue
        try:
            adapted(method, base)(input_ids=batches(1)[0])
            said[name] = "nothing"
        except veneer.ConfigError as e:
            said[name] = str(e)
        dist.barrier()  # a process that is gone closes connections that the others still read from
    return said


def late(method: str, layout: str, out: Path) -> dict[str, Any]:
    """What is said of what comes to a model that FSDP2 has sharded, or that it cannot shard; and a combined adapter, against one process."""
    import transformers

    one, model = adapted(method), shard(adapted(method))
    for m in (one, model):
        torch.manual_seed(2)
        m.add_adapter("other", CONFIGS[method]())
        for _, p in sorted(p for p in m.named_parameters() if "lora_" in p[0] and ".default." in p[0]):
            p.data += 0.1
        m.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="svd")
        m.set_adapter("both", inference_mode=True)
    ids = batches(1)[0]
    with torch.no_grad():
        result: dict[str, Any] = {"combined": float((model(input_ids=ids).logits - one(input_ids=ids).logits).abs().max())}

    def int8() -> None:
        if dist.get_rank() == 0:
            bare_model(method).save_pretrained(out / "base-late")  # type: ignore[operator]
        dist.barrier()
        eight = transformers.BitsAndBytesConfig(load_in_8bit=True)
        base = transformers.AutoModelForCausalLM.from_pretrained(out / "base-late", quantization_config=eight)
        shard(adapted(method, base))(input_ids=ids)

    for name, act in {
        "trained": lambda: model.set_adapter("other"),
        "first": lambda: adapted(method, shard(bare_model(method))),
        "unloaded": lambda: shard(adapted(method)).merge_and_unload(),
        "int8": int8,
    }.items():
        try:
            act()
            result[name] = "nothing"
        except (veneer.ConfigError, veneer.MergeError) as e:
            result[name] = str(e)
    return result


def late_ddp(method: str, layout: str, out: Path) -> dict[str, Any]:
    """What is said of adapters that train in a DistributedDataParallel which does not know them, and of calls that are none of its business."""
    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: veneer.LoraConfig(r=2, target_modules=["q_proj"]),
        "saved": lambda: veneer.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "prompt": lambda: veneer.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }
    said: dict[str, Any] = {}
    ids = batches(1)[0]
    for kind, make in configs.items():
        torch.manual_seed(1)
        model = veneer.get_peft_model(bare_model(method), make())
        model.add_adapter("frozen", make())  # it is there when the model is wrapped, and does not train yet
        engine = nn.parallel.DistributedDataParallel(model, find_unused_parameters=kind == "saved", static_graph=kind == "prompt")
        for _ in range(3):  # its buckets are laid out anew meanwhile
            engine(input_ids=ids).logits.sum().backward()
        model.add_adapter("late", make())

        def call(again: nn.Module, backward: bool = False) -> str:
            try:
                out = again(input_ids=ids).logits.sum()
            except veneer.ConfigError as e:
                return str(e)
            if backward:
                out.backward()
            return ""

        for adapter in ("frozen", "late"):
            model.set_adapter(adapter)
            said[f"{kind}, {adapter}"] = call(engine)
        fine = [call(nn.parallel.DistributedDataParallel(model), backward=True)]
        with torch.no_grad():
            fine.append(call(engine))
        with engine.no_sync():
            fine.append(call(engine))
        model.set_adapter("late", inference_mode=True)
        fine.append(call(engine))
        model.set_adapter("default")
        said[f"{kind}, fine"] = "".join([*fine, call(engine)])
    return said


def off_by(merged: Path, reference: Any) -> float:
    """How far the merged file is from a single process' model, merged by itself; infinite where the file lacks a tensor."""
    from safetensors.torch import load_file

    held: dict[str, Tensor] = {}
    for file in merged.glob("*.safetensors"):
        held.update(load_file(file))
    want = reference.merge_and_unload().state_dict()
    tied = {id(t): k for k, t in want.items() if k in held} if set(want) - set(held) else {}
    missing = [
        k for k, t in want.items() if k not in held and not any(torch.equal(t, want[o]) for o in tied.values() if want[o].shape == t.shape)
    ]
    return float("inf") if missing or set(held) - set(want) else max(float((held[k] - want[k]).abs().max()) for k in held)


def count(method: str, layout: str, out: Path) -> dict[str, Any]:
    """Bytes of the collectives of one step, the second: with adapters, and with every weight trained."""
    result: dict[str, Any] = {}
    for kind, model in (("adapter", adapted(method)), ("full", bare_model(method))):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in model.parameters())
        engine = wrapped(model, layout) if kind == "adapter" or layout == "ddp" else shard_all(model)
        opt, rows = optimizer_of(engine), batches(1)[0]
        for step in range(2):
            with Bytes() if step else nullcontext() as counted:
                total_loss(engine, mine(rows, dist.get_rank(), dist.get_world_size())).backward()
                opt.step()
            opt.zero_grad()
        result[kind] = {"trained": trained, "all": everything, "by": counted.by}  # type: ignore[union-attr]
    return result


def shard_all(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def started(method: str, layout: str, out: Path) -> tuple[Any, Any, Any]:
    """An adapted model, as it is called, and its optimizer. `hsdp`: sharded in pairs, replicated between them."""
    base = bare_model(method)
    if layout in PLANS:
        base = parallel(base) if layout == "tp" else planned(base, out / f"base-{method}")
    model = adapted(method, base)
    engine = wrapped(model, layout)
    return model, engine, optimizer_of(engine)


def first_half(method: str, layout: str, out: Path) -> dict[str, Any]:
    """Ten steps; then the adapter as every layout saves it, and the pieces of adapter and optimizer."""
    model, engine, opt = started(method, layout, out)
    losses = train(engine, layout, batches()[:10], opt)
    with gathered(engine) if layout == "fsdp1" else nullcontext():
        model.save_pretrained(out / f"{method}-{layout}-half", is_main_process=dist.get_rank() == 0)
    save_state(engine, opt, out / f"{method}-{layout}-state", extra={"step": 10})
    dist.barrier()
    reference, expected = single(method, 10)
    if dist.get_rank() == 0:
        reference.save_pretrained(out / f"{method}-single-half")
    return {"losses": max(abs(a - b) for a, b in zip(losses, expected, strict=True))}


def second_half(method: str, layouts: str, out: Path) -> dict[str, Any]:
    """The other ten, from the state that another layout saved (`saved>now`), on however many processes there are now; a plain model reads what they saved."""
    saved, _, layout = layouts.rpartition(">")
    saved = saved or layout
    if layout == "single":
        return alone(method, saved, out)
    model, engine, opt = started(method, layout, out)
    with torch.no_grad():
        for p in model.parameters():  # everything that trains has to come from the file
            if p.requires_grad:
                p.mul_(0.5)
    done = load_state(engine, opt, out / f"{method}-{saved}-state")["step"]
    losses = train(engine, layout, batches()[done:], opt)
    with gathered(engine) if layout == "fsdp1" else nullcontext():
        model.save_pretrained(out / f"{method}-{layout}-whole", is_main_process=dist.get_rank() == 0)
    dist.barrier()
    reference, expected = single(method)
    result = {"losses": max(abs(a - b) for a, b in zip(losses, expected[10:], strict=True)), "learned": expected[9] - expected[-1]}
    if method == "adalora":
        result["ranks"], result["wanted"] = (m.peft_config["default"].rank_pattern for m in (model, reference))
    if dist.get_rank() == 0:
        reference.save_pretrained(out / f"{method}-single-whole")
        plain = veneer.PeftModel.from_pretrained(bare_model(method), out / f"{method}-{layout}-whole")
        ids = batches(1)[0]
        with torch.no_grad():
            result["logits"] = float((plain(input_ids=ids).logits - reference(input_ids=ids).logits).abs().max())
    return result


def alone(method: str, saved: str, out: Path) -> dict[str, Any]:
    """Rank 0 goes on by itself, in a process without a group."""
    result: dict[str, Any] = {}
    if dist.get_rank() == 0:
        here, state = str(Path(__file__).parent), str(out / f"{method}-{saved}-state")
        code = f"import sys; sys.path.insert(0, {here!r}); import worker; print(worker.goes_on({method!r}, {state!r}))"
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        result["losses"] = float(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else done.stderr[-2000:]
    dist.barrier()
    return result


def goes_on(method: str, state: str) -> float:
    """How far the last ten losses of one process, which reads a state of several, are from those of one that did all twenty."""
    model = adapted(method)
    opt = optimizer_of(model)
    done, losses = load_state(model, opt, state)["step"], []
    for rows in batches()[done:]:
        loss = total_loss(model, rows) / (len(rows) * (LENGTH - 1))
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(loss))
    return max(abs(a - b) for a, b in zip(losses, single(method)[1][done:], strict=True))


def zero_first(method: str, layout: str, out: Path) -> dict[str, Any]:
    """Ten steps under ZeRO; then the adapter as every layout saves it, and DeepSpeed's checkpoint of adapter and optimizer."""
    model = adapted(method, cut(bare_model(method)) if layout == "zero3" else None)
    engine = wrapped(model, layout)
    losses = train(engine, layout, batches()[:10])
    model.save_pretrained(out / f"{method}-{layout}-half", is_main_process=dist.get_rank() == 0)
    try:
        save_state(model, engine.optimizer, out / "no-state")
        raise AssertionError("save_state wrote pieces of ZeRO's")
    except veneer.SaveError as e:
        assert "save_checkpoint" in str(e)
    engine.save_checkpoint(out / f"{method}-{layout}-state", tag="ten", exclude_frozen_parameters=True)
    return {"losses": max(abs(a - b) for a, b in zip(losses, single(method, 10)[1], strict=True))}


def zero_universal(method: str, layout: str, out: Path) -> dict[str, Any]:
    """`zero_second`, on however many processes, from DeepSpeed's universal checkpoint."""
    return zero_second(method, layout, out, tag="universal", checkpoint={"load_universal": True})


def zero_second(method: str, layout: str, out: Path, tag: str = "ten", **config: Any) -> dict[str, Any]:
    """The other ten, of an adapter that was drawn anew, so that everything that trains has to come from the checkpoint; a plain model reads what is saved."""
    base = cut(bare_model(method)) if layout == "zero3" else bare_model(method)
    torch.manual_seed(5)
    model = veneer.get_peft_model(base, config_of(method))
    engine = deepspeed_engine(model, int(layout[-1]), **config)
    read, _ = engine.load_checkpoint(out / f"{method}-{layout}-state", tag=tag, load_module_strict=False)
    assert read is not None
    losses = train(engine, layout, batches()[10:])
    folder = out / f"{method}-{layout}-whole"
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    reference, expected = single(method)
    result = {"losses": max(abs(a - b) for a, b in zip(losses, expected[10:], strict=True))}
    if dist.get_rank() == 0:
        plain = veneer.PeftModel.from_pretrained(bare_model(method), folder)
        ids = batches(1)[0]
        with torch.no_grad(), patch.object(nn.functional, "linear", LINEAR):
            result["logits"] = float((plain(input_ids=ids).logits - reference(input_ids=ids).logits).abs().max())
    return result


def killed(method: str, layout: str, out: Path) -> dict[str, Any]:
    """Saves after each step; the last process kills itself before the fourth, or, under DDP, in the fourth save, when its own pieces are on the disk."""
    from torch.distributed.checkpoint import FileSystemWriter

    _, engine, opt = started(method, layout, out)
    model = engine.module if layout == "ddp" else engine
    last = dist.get_rank() == dist.get_world_size() - 1
    write = FileSystemWriter.write_data

    def dies(*args: Any) -> Any:
        write(*args).wait()
        os.kill(os.getpid(), signal.SIGKILL)

    for step, rows in enumerate(batches()):
        if step == 3 and last and layout != "ddp":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 3 and last:
            FileSystemWriter.write_data = dies  # type: ignore[method-assign]
        train(engine, layout, [rows], opt)
        model.save_pretrained(out / "last", is_main_process=dist.get_rank() == 0)
        save_state(engine, opt, out / "state", extra={"step": step + 1})
    return {}


def both(method: str, layout: str, out: Path) -> dict[str, Any]:
    return {**run(method, layout, out), "bytes": count(method, layout, out)}


def forked(processes: int, out: Path) -> dict[str, Any]:
    """Become so many processes; what each needs to find the others. How each ended is in codes.json."""
    from transformers import LlamaForCausalLM  # noqa: F401  read once for all

    children: list[int] = []
    (out / "meet").unlink(missing_ok=True)
    for rank in range(processes):
        if not (child := os.fork()):
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)})
            return {"init_method": f"file://{out / 'meet'}", "rank": rank, "world_size": processes}
        children.append(child)
    (out / "codes.json").write_text(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
    sys.exit()


TASKS = {
    "compare": run,
    "bytes": count,
    "both": both,
    "first": first_half,
    "second": second_half,
    "merging": merging,
    "refusals": refusals,
    "packed": packed,
    "late": late,
    "late_ddp": late_ddp,
    "zero_first": zero_first,
    "zero_second": zero_second,
    "zero_universal": zero_universal,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", required=True, help="several, with commas, are run one after the other")
    parser.add_argument("--methods", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--task", default="compare", help="one, or one for each layout: killed, " + ", ".join(TASKS))
    parser.add_argument("--fork", type=int, help="start so many processes, without torchrun, which would end all when one is gone")
    args = parser.parse_args()
    out = Path(args.out)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.layout.startswith("zero"):
        import deepspeed

        # a reduction through shared memory that is compiled when it is first used; gloo reduces as well
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    else:
        here = forked(args.fork, out) if args.fork else {}
        dist.init_process_group("gloo", timeout=timedelta(seconds=120), **here)
    layouts, tasks = args.layout.split(","), args.task.split(",")
    for layout, task in zip(layouts, tasks * (len(layouts) // len(tasks)), strict=True):
        results = {}
        if task == "killed":  # its error has to end this process
            killed("lora", layout, out)
        for method in args.methods.split(","):
            try:
                results[method] = TASKS[task](method, layout, out)
            except Exception as e:  # the test asserts on it; a collective that differs between ranks would hang, torchrun ends it
                import traceback

                results[method] = {"error": f"{type(e).__name__}: {e}", "trace": traceback.format_exc()[-3000:]}
                print(f"rank {dist.get_rank()}, {method}: {results[method]['trace']}", file=sys.stderr, flush=True)
        if dist.get_rank() == 0:
            (out / f"{layout}.json").write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
