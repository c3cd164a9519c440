"""What modules are wrapped in reaches the kernels: hooks, adapters, parametrisations, offloading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor

from moduleformer_ext.nn import Block, MixtureOfAttention, MixtureOfFFN, make_router
from moduleformer_ext.nn.segments import split_parameter

D, E = 16, 4
GATES = ["mlp", "linear", "gmm"]


def build(gate_type: str = "mlp", n_head: int = 2, **options: Any) -> Block:
    torch.manual_seed(0)

    def router() -> nn.Module:
        return make_router(gate_type, D, E, 2, gating_size=8, **options)  # type: ignore[arg-type]

    block = Block(D, MixtureOfAttention(D, D, n_head, router()), MixtureOfFFN(D, 12, router())).double()  # type: ignore[arg-type]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


X = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

CALLED = {
    "mlp": ["w_gate", "w_gate.0", "w_gate.1", "w_gate.2", "w_gate.3"],
    "linear": ["w_gate", "w_gate.0"],
    "gmm": ["w_gate"],
}
"""Modules of each gate network."""


def every_module(gate_type: str) -> list[str]:
    gates = [
        f"{site}.gate{part}" for site in ("attn.q_proj", "mlpf") for part in ("", *(f".{p}" for p in CALLED[gate_type]))
    ]
    experts = [f"{site}.{name}" for site in ("attn.q_proj", "mlpf") for name in ("experts", "output_experts")]
    return [*gates, *experts, "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn", "mlpf", "ln_1", "resid_dropout"]


@pytest.mark.parametrize("n_head", [1, 2], ids=["identity", "linear"])
@pytest.mark.parametrize("gate_type", GATES)
def test_hooks_run_and_change_nothing_by_themselves(gate_type: str, n_head: int) -> None:
    block = build(gate_type, n_head)
    expected = block(X)[0]
    for name in every_module(gate_type):
        seen: list[str] = []
        module = block.get_submodule(name)
        handles = [
            module.register_forward_pre_hook(lambda *_, s=seen: s.append("before")),
            module.register_forward_hook(lambda *_, s=seen: s.append("after")),
        ]
        y = block(X)[0]
        for handle in handles:
            handle.remove()
        assert seen[:2] == ["before", "after"], name
        torch.testing.assert_close(y, expected, msg=name)
    assert torch.equal(block(X)[0], expected)


@pytest.mark.parametrize("gate_type", GATES)
def test_what_a_hook_returns_is_used(gate_type: str) -> None:
    block = build(gate_type)
    gate = block.mlpf.gate
    last = gate.w_gate if gate_type == "gmm" else gate.w_gate[-1]
    route = gate(X[0])
    last.register_forward_hook(lambda _m, _x, y: y.flip(-1))
    if gate_type == "gmm":
        hidden = nn.functional.normalize(last(X[0]), dim=-1)
        rows = nn.functional.normalize(gate.expert_centroids, dim=-1)
        torch.testing.assert_close(gate(X[0]).logits, hidden @ rows.T * gate.temperature.exp())
    else:
        torch.testing.assert_close(gate(X[0]).logits, route.logits.flip(-1))
    assert not torch.allclose(gate(X[0]).logits, route.logits)


@pytest.mark.parametrize(
    "name", ["mlpf.experts", "mlpf.output_experts", "attn.q_proj.experts", "attn.q_proj.output_experts"]
)
def test_what_a_hook_of_experts_returns_is_used(name: str) -> None:
    block = build()
    experts = block.get_submodule(name)
    expected = build()
    with torch.no_grad():  # zero output of an up projection is zero activation too
        expected.get_submodule(name).weight.zero_()
    experts.register_forward_hook(lambda _m, _x, y: torch.zeros_like(y))
    torch.testing.assert_close(block(X)[0], expected(X)[0])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


@pytest.mark.parametrize(
    ("gate_type", "name", "weight"),
    [
        ("mlp", "mlpf.gate.w_gate.0", "weight"),
        ("mlp", "mlpf.gate.w_gate.0", "bias"),
        ("mlp", "mlpf.gate.w_gate.3", "weight"),
        ("linear", "mlpf.gate.w_gate.0", "weight"),
        ("gmm", "mlpf.gate.w_gate", "weight"),
        ("gmm", "mlpf.gate", "expert_centroids"),
        ("gmm", "mlpf.gate", "temperature"),
        ("mlp", "mlpf.experts", "weight"),
        ("mlp", "mlpf.output_experts", "weight"),
        ("mlp", "attn.q_proj.experts", "weight"),
        ("mlp", "attn.q_proj.output_experts", "weight"),
        ("mlp", "attn.k_proj", "weight"),
    ],
)
def test_parametrised_weights_are_computed_and_get_gradients(gate_type: str, name: str, weight: str) -> None:
    block, doubled = build(gate_type), build(gate_type)
    with torch.no_grad():
        getattr(doubled.get_submodule(name), weight).mul_(2)
    scale = Scaled()
    parametrize.register_parametrization(block.get_submodule(name), weight, scale)
    y = block(X)[0]
    torch.testing.assert_close(y, doubled(X)[0])
    y.square().sum().backward()
    # scale invariance of cosines is the one case without a gradient
    assert scale.factor.grad is not None
    invariant = gate_type == "gmm" and weight != "temperature"
    assert (scale.factor.grad.abs() < 1e-9) if invariant else (scale.factor.grad != 0)


@pytest.mark.parametrize(
    ("gate_type", "name"), [("mlp", "w_gate.0"), ("mlp", "w_gate.3"), ("linear", "w_gate.0"), ("gmm", "w_gate")]
)
@pytest.mark.parametrize("pruned_rows", [0, 2])
def test_adapters_on_a_gate_network_act_and_train(gate_type: str, name: str, pruned_rows: int) -> None:
    peft = pytest.importorskip("peft")
    block = build(gate_type, num_normaliser_rows=pruned_rows)
    plain = block(X)[0]
    config = peft.LoraConfig(r=2, target_modules=[f"mlpf.gate.{name}"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, block)
    block.double().eval()
    y = block(X)[0]
    assert not torch.allclose(y, plain)
    y.square().sum().backward()
    layer = block.get_submodule(f"mlpf.gate.{name}")
    assert all((p.grad != 0).any() for n, p in layer.named_parameters() if "lora_" in n)
    layer.merge()
    torch.testing.assert_close(block(X)[0], y)


def test_adapters_on_expert_matrices_act_and_train() -> None:
    peft = pytest.importorskip("peft")
    block = build()
    plain = block(X)[0]
    names = ["mlpf.experts.weight", "mlpf.output_experts.weight", "attn.q_proj.experts.weight"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
    peft.inject_adapter_in_model(config, block)
    block.double().eval()
    y = block(X)[0]
    assert not torch.allclose(y, plain)
    y.square().sum().backward()
    lora = {n: p.grad for n, p in block.named_parameters() if "lora_" in n}
    assert len(lora) == 6 and all(grad is not None and (grad != 0).any() for grad in lora.values())


class Offloaded:
    """A forward on the instance that fetches the weights first and drops them afterwards, as offloading does."""

    def __init__(self, module: nn.Module) -> None:
        self.stored = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
        self.module, self.forward = module, module.forward
        self.drop()
        module.forward = self  # type: ignore[method-assign]

    def drop(self) -> None:
        for name, tensor in self.stored.items():
            setattr(self.module, name, nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        for name, tensor in self.stored.items():
            setattr(self.module, name, nn.Parameter(tensor, requires_grad=False))
        y = self.forward(*arguments, **options)
        self.drop()
        return y


@pytest.mark.parametrize("gate_type", GATES)
def test_offloaded_weights_arrive(gate_type: str) -> None:
    block = build(gate_type)
    with torch.no_grad():
        expected = block(X)[0]
        for module in block.modules():
            if next(module.parameters(recurse=False), None) is not None:
                Offloaded(module)
        assert all(parameter.is_meta for parameter in block.parameters())
        torch.testing.assert_close(block(X)[0], expected)


@pytest.mark.parametrize(
    ("change", "hooked"),
    [
        (lambda gate: split_parameter(gate.w_gate[3], "weight", 2), lambda gate: gate.w_gate[3]),
        (lambda gate: split_parameter(gate.w_gate[3], "weight", 2), lambda gate: gate.w_gate),
        (lambda gate: None, lambda gate: gate.w_gate),
    ],
)
def test_what_cannot_reach_split_or_pruned_rows_is_refused(
    change: Callable[[nn.Module], Any], hooked: Callable[[nn.Module], nn.Module]
) -> None:
    gate = make_router("mlp", D, E, 2, gating_size=8, num_normaliser_rows=1).double()
    change(gate)
    hooked(gate).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="MLPRouter: w_gate must have no hooks or adapters on its rows"):
        gate(X[0])


def test_hooks_before_split_rows_act() -> None:
    gate = make_router("mlp", D, E, 2, gating_size=8).double()
    expected = gate(X[0] * 2)
    split_parameter(gate.w_gate[3], "weight", 2)
    gate.w_gate[0].register_forward_pre_hook(lambda _m, x: (2 * x[0],))
    torch.testing.assert_close(gate(X[0]).logits, expected.logits)


def test_a_hooked_router_of_a_narrow_model_computes_in_its_own_type() -> None:
    gate = make_router("mlp", D, E, 2, gating_size=8).bfloat16()
    x = X[0].bfloat16()
    expected = gate.w_gate(x)
    gate.w_gate[0].register_forward_hook(lambda *_: None)
    logits = gate(x).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected.float(), atol=2e-2, rtol=2e-2)


def test_experts_of_weights_that_kernels_cannot_read_are_refused() -> None:
    block = build()
    weight = block.mlpf.experts.weight.detach()
    block.mlpf.experts.weight = nn.Parameter(TwoTensor(weight, weight))
    with pytest.raises(TypeError, match="ExpertLinear: weight must be a plain tensor, got TwoTensor; quantise or"):
        block(X)
