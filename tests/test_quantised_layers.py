"""Layers of libraries whose weights are packed with calibration data: GPTQ, AWQ, AQLM, EETQ.

GPTQModel runs here but cannot be installed beside our release of torch by its own metadata, so it is tested where it is there (`make test-slow`
installs it), and everywhere by stand-ins that have its layers' public interface and packing. EETQ's layer is transformers' own, its kernel, which
exists for accelerators alone, a stand-in. AQLM's layer is its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.bases import codec_for
from veneer.errors import MergeError
from veneer.testing.laws import move

N_IN, N_OUT, GROUP = 64, 32, 32


def _groups(w: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points (n_out, n_in / group) of 4-bit groups along the input."""
    parts = w.view(w.shape[0], -1, GROUP)
    low, high = parts.amin(-1), parts.amax(-1)
    scale = ((high - low) / 15).half().float()
    return scale, (-low / scale).round().clamp(0, 15)


class _GroupedLinear(nn.Module):
    """What layers of GPTQ and AWQ have in common: buffers, no `weight`, half precision, a bias that may be None."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        w = linear.weight.detach().float()
        scale, zero = _groups(w)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        each, at = scale.repeat_interleave(GROUP, 1), zero.repeat_interleave(GROUP, 1)
        self.register_buffer("qweight", (w / each + at).round().clamp(0, 15).to(torch.int32).T.contiguous())
        self.register_buffer("qzeros", zero.to(torch.int32).T.contiguous())
        self.register_buffer("scales", scale.half().T.contiguous())
        self.register_buffer("bias", linear.bias.detach().half())

    def forward(self, x: Tensor) -> Tensor:
        zeros, scales = self.qzeros.repeat_interleave(GROUP, 0), self.scales.repeat_interleave(GROUP, 0)
        y = x.half() @ ((self.qweight - zeros) * scales)
        return y if self.bias is None else y + self.bias


GptqStandIn = type("TorchLinear", (_GroupedLinear,), {"__module__": "gptqmodel.nn_modules.qlinear.torch"})
AwqStandIn = type("WQLinear_GEMM", (_GroupedLinear,), {"__module__": "awq.modules.linear.gemm"})


def _aqlm(linear: nn.Linear) -> nn.Module:
    from aqlm import QuantizedLinear

    torch.manual_seed(0)
    new = QuantizedLinear(N_IN, N_OUT, 8, 1, 2, 4, dtype=torch.float32)  # codebooks of 256 entries need numba
    with torch.no_grad():
        new.codebooks.normal_(std=0.1)
        new.codes.copy_(torch.randint(-8, 8, new.codes.shape))
        new.scales.fill_(1.0)
        new.bias.copy_(linear.bias)
    out: nn.Module = new
    return out


def _eetq(linear: nn.Linear) -> nn.Module:
    from transformers.integrations import eetq

    class StandInKernel:
        """Multiplies by int8 weights (n_in, n_out) as EETQ's kernel does, without its order of the numbers."""

        @staticmethod
        def w8_a16_gemm(x: Tensor, w: Tensor, scales: Tensor) -> Tensor:
            return x @ (w.to(x.dtype) * scales)

    eetq.eetq_kernels_hub = StandInKernel
    new = eetq.EetqLinear(N_IN, N_OUT, bias=True)
    scale = (linear.weight.detach().abs().amax(1) / 127).half()
    new.weight_scales.data, new.bias.data = scale, linear.bias.detach().half()
    new.weight.data = (linear.weight.detach() / scale.float().unsqueeze(1)).round().to(torch.int8).T.contiguous()
    out: nn.Module = new
    return out


def _gptqmodel(linear: nn.Linear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    scale, zero = _groups(linear.weight.detach())
    size = {"in_features": N_IN, "out_features": N_OUT, "bias": True}
    new = TorchLinear(bits=4, group_size=GROUP, sym=False, desc_act=False, **size)
    new.pack_original(linear, scale, zero, torch.arange(N_IN) // GROUP)
    new.post_init()
    return new.eval()


def _gptqmodel_awq(linear: nn.Linear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    scale, zero = _groups(linear.weight.detach())
    size = {"in_features": N_IN, "out_features": N_OUT, "bias": True}
    new = AwqTorchLinear(bits=4, group_size=GROUP, sym=False, desc_act=False, **size)
    new.pack(linear, scale.half(), zero.half())
    new.post_init()
    return new.eval()


def _param(name: str, make: Callable[[nn.Linear], nn.Module], slow: bool = False) -> Any:
    return pytest.param(name, make, id=make.__name__.strip("_"), marks=[pytest.mark.slow] if slow else [])


LAYERS = [_param("gptq", GptqStandIn), _param("awq", AwqStandIn)]
if importlib.util.find_spec("aqlm"):
    LAYERS.append(_param("aqlm", _aqlm))
if importlib.util.find_spec("transformers"):
    LAYERS.append(_param("eetq", _eetq))
if importlib.util.find_spec("gptqmodel"):
    LAYERS += [_param("gptq", _gptqmodel, slow=True), _param("awq", _gptqmodel_awq, slow=True)]


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(N_IN, N_OUT)


@pytest.mark.parametrize(("name", "make"), LAYERS)
def test_a_layer_known_by_its_public_interface(name: str, make: Callable[[nn.Linear], nn.Module], linear: nn.Linear) -> None:
    x = torch.randn(3, N_IN)
    layer = make(linear)
    codec = codec_for(layer)
    assert codec.name == name and codec.shape(layer) == (N_OUT, N_IN)
    codec.settle(layer)
    before = {n: t.clone() for n, t in codec.packed(layer).items()}
    w = codec.weight(layer, dtype=torch.float32)
    if name != "aqlm":  # its codes are random here
        assert (w - linear.weight).norm() < 0.1 * linear.weight.norm()
    base = layer(x.to(codec.dtype(layer))).float()
    for config in (veneer.LoraConfig(r=4, target_modules="all-linear"), veneer.HiraConfig(r=4, target_modules=["0"])):
        model = veneer.get_peft_model(nn.Sequential(layer), config)
        assert model.get_layer_status()[0].quantization_backend == name
        torch.testing.assert_close(model(x), base, atol=2e-3, rtol=1e-3)
        move(model)
        z = x.clone().requires_grad_()
        y = model(z)
        y.square().sum().backward()
        delta = model.get_base_model()[0].get_delta_weight("default").detach()
        expected = nn.functional.linear(x, w + delta, layer.bias.float())  # type: ignore[operator, union-attr]
        torch.testing.assert_close(y, expected, atol=5e-3, rtol=1e-3)
        torch.testing.assert_close(z.grad, 2 * y.detach() @ (w + delta), atol=1e-2 * float(z.grad.abs().max()), rtol=0)  # type: ignore[union-attr]
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        with pytest.raises(MergeError, match=rf"'{name}' again.*store='dense'"):
            model.merge_adapter(store="quantised")
        model.merge_adapter()
        torch.testing.assert_close(model(x), y, atol=5e-3, rtol=1e-3)
        assert type(model.unload()[0]) is type(layer)
    assert all(torch.equal(t, before[n]) for n, t in codec.packed(layer).items())
