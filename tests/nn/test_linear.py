"""The dense layer where torch multiplies 16-bit types slowly, which any processor can be told that it does."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moduleformer_ext.nn import Linear
from moduleformer_ext.nn import linear as module
from moduleformer_ext.ops.linear_decode import SERVES_CPU

pytestmark = pytest.mark.skipif(not SERVES_CPU, reason="the emulated device serves CPU tensors")
TYPES = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def slow_in_torch(monkeypatch):
    monkeypatch.setattr(module, "SLOW_IN_TORCH", frozenset(TYPES))


class Calls(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def trained(forward, *leaves, cotangent):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = forward(*leaves)
    return y, *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))


def make(*leading, bias=True, dtype=torch.float32, sizes=(70, 37), seed=0):
    torch.manual_seed(seed)
    layer = Linear(*sizes, bias=bias).to(dtype)
    x, cotangent = torch.randn(*leading, sizes[0]).to(dtype), torch.randn(*leading, sizes[1]).to(dtype)
    return layer, x, cotangent


def call(layer):
    names = [name for name, _ in layer.named_parameters()]
    return lambda x, *weights: torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (40,), (2, 0, 3)])
def test_against_the_oracle(leading, bias, dtype):
    layer, x, cotangent = make(*leading, bias=bias, dtype=dtype)
    leaves = x, *layer.parameters()
    with Calls() as calls:
        ours = trained(call(layer), *leaves, cotangent=cotangent)
    assert not {"aten::mm", "aten::addmm", "aten::mkldnn_linear", "aten::bmm"} & set(calls.names)
    oracle = trained(F.linear, *(leaf.double() for leaf in leaves), cotangent=cotangent)
    for result, expected in zip(ours, oracle, strict=True):
        assert (result.dtype, result.shape) == (dtype, expected.shape)
        assert (result.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", TYPES)
def test_autocast(dtype):
    layer, x, cotangent = make(40)
    leaves = x, *layer.parameters()
    with torch.autocast("cpu", dtype):
        ours = trained(call(layer), *leaves, cotangent=cotangent)
    narrow = trained(call(layer.to(dtype)), *(leaf.to(dtype) for leaf in leaves), cotangent=cotangent)
    assert ours[0].dtype == dtype and torch.equal(ours[0], narrow[0])
    for wide, short in zip(ours[1:], narrow[1:], strict=True):
        assert wide.dtype == torch.float32 and torch.equal(wide, short.float())


def test_the_gradient_lies_as_the_weight_does():
    layer, x, cotangent = make(40, dtype=torch.bfloat16)
    layer(x).backward(cotangent)
    assert layer.weight.grad.is_contiguous()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer, x, cotangent = make(40, dtype=torch.bfloat16)
    eager = trained(layer, x, cotangent=cotangent)
    compiled = trained(torch.compile(layer, fullgraph=True, backend=backend), x, cotangent=cotangent)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_what_torch_multiplies_fast_or_refuses_is_left_to_it():
    layer, x, _ = make(40)
    with Calls() as calls:
        layer(x)
    assert "moduleformer_ext::grouped_gemm_forward" not in calls.names
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer.bfloat16()(torch.ones(35, 2, dtype=torch.bfloat16))
