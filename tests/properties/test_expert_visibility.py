"""A token's results depend on its own row and its own experts alone, and an expert's gradient on its own tokens: what
the other rows and experts hold cannot reach them, not even as NaN or infinity."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from devices import on_cuda
from routed import gate_dtype, randn, random_layout
from router_cases import GATES, Router
from torch import Tensor

from moduleformer_ext import ops
from moduleformer_ext.ops import expert_ffn, grouped_gemm, linear_decode
from moduleformer_ext.types import ExpertLayout

POISONS = [torch.nan, torch.inf]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def assert_same(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def outside(t: Tensor, rows: Tensor, poison: float) -> Tensor:
    """Poison in all rows of the first dimensions but these, given by a bool."""
    return torch.where(rows.reshape(rows.shape + (1,) * (t.dim() - rows.dim())), t, torch.full_like(t, poison))


@dataclass(frozen=True)
class Experts:
    tokens: int
    experts: int
    choices: int
    model: int = 24
    hidden: int = 40
    activation: str = "gelu_tanh"

    def __str__(self) -> str:
        return "-".join(str(value) for value in vars(self).values())


EXPERTS = [
    Experts(70, 4, 2),
    Experts(5, 6, 2, activation="swiglu"),  # few rows: as in decoding
    Experts(150, 3, 1, model=19, hidden=21),
    Experts(33, 5, 3, model=72, hidden=130, activation="geglu"),
]


@pytest.fixture(params=EXPERTS, ids=str)
def experts(request: pytest.FixtureRequest) -> Experts:
    return request.param


def ids_of(layout: ExpertLayout, experts: Experts) -> Tensor:
    expert = torch.repeat_interleave(torch.arange(experts.experts), layout.counts.long())
    return expert[layout.position.long()].reshape(experts.tokens, experts.choices)


def on(layout: ExpertLayout, device: torch.device) -> ExpertLayout:
    return ExpertLayout(*(x.to(device) if isinstance(x, Tensor) else x for x in layout))


def run(function, tensors: list[Tensor], grad: Tensor, device: torch.device) -> list[Tensor]:
    """The output and the gradients of all tensors."""
    leaves = [t.detach().to(device, copy=True).requires_grad_() for t in tensors]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, grad.to(device, out.dtype))
    return [t.detach().cpu() for t in (out, *grads)]


def check_tokens_and_experts(function, tensors, grad, layout, experts, dtype, poison, device):
    """``tensors``: x, matrices [E, ...], gates; results: per token y, dx and dgates, per expert the rest."""
    x, *matrices, gates = tensors
    ids = ids_of(layout, experts)
    clean = run(function, tensors, grad, device)

    for token in (0, experts.tokens // 2, experts.tokens - 1):
        own = torch.arange(experts.tokens) == token
        chosen = torch.isin(torch.arange(experts.experts), ids[token])
        poisoned = [
            outside(x, own, poison),
            *(outside(m, chosen, poison) for m in matrices),
            outside(gates, own, poison),
        ]
        actual = run(function, poisoned, outside(grad, own, poison), device)
        for i in (0, 1, len(actual) - 1):
            assert_same(actual[i][token], clean[i][token], dtype, f"result {i} of token {token}")

    for expert in range(experts.experts):
        own = torch.arange(experts.experts) == expert
        slots = ids == expert
        tokens = slots.any(1)
        poisoned = [
            outside(x, tokens, poison),
            *(outside(m, own, poison) for m in matrices),
            outside(gates, slots, poison),
        ]
        actual = run(function, poisoned, outside(grad, tokens, poison), device)
        for i, _ in enumerate(matrices, 2):
            assert_same(actual[i][expert], clean[i][expert], dtype, f"result {i} of expert {expert}")


@pytest.mark.parametrize("poison", POISONS)
def test_expert_ffn(experts, dtype, poison, device):
    layout = random_layout(experts.tokens, experts.experts, experts.choices)
    wide = 2 if experts.activation in ("swiglu", "geglu") else 1
    tensors = [
        randn(experts.tokens, experts.model, dtype=dtype),
        randn(experts.experts, experts.model, wide * experts.hidden, dtype=dtype, scale=experts.model**-0.5),
        randn(experts.experts, experts.hidden, experts.model, dtype=dtype, scale=experts.hidden**-0.5),
        torch.rand(experts.tokens, experts.choices).to(gate_dtype(dtype)),
    ]
    grad = randn(experts.tokens, experts.model, dtype=dtype)
    placed = on(layout, device)

    def function(x, up, down, gates):
        return expert_ffn(x, up, down, placed, gates, activation=experts.activation)

    check_tokens_and_experts(function, tensors, grad, layout, experts, dtype, poison, device)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(("x_order", "activated"), [("token", False), ("slot", True)])
def test_grouped_gemm(experts, dtype, x_order, activated, poison, device):
    layout = random_layout(experts.tokens, experts.experts, experts.choices)
    rows = (experts.tokens, experts.choices) if x_order == "slot" else (experts.tokens,)
    columns = 2 * experts.hidden if activated else experts.hidden
    tensors = [
        randn(*rows, experts.model, dtype=dtype),
        randn(experts.experts, experts.model, columns, dtype=dtype, scale=experts.model**-0.5),
        torch.rand(experts.tokens, experts.choices).to(gate_dtype(dtype)),
    ]
    grad = randn(experts.tokens, experts.hidden, dtype=dtype)
    placed = on(layout, device)

    def function(x, weight, gates):
        activation = "swiglu" if activated else None
        return grouped_gemm(x, weight, placed, x_order=x_order, out_order="token", gates=gates, activation=activation)

    check_tokens_and_experts(function, tensors, grad, layout, experts, dtype, poison, device)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax"])
@pytest.mark.parametrize("tokens", [5, 70])
def test_a_token_is_routed_by_its_own_row(gate, order, tokens, dtype, poison, device):
    router = Router.random(gate, tokens, 9, dtype=dtype)
    parameters = {name: value.to(device) for name, value in router.parameters.items()}
    generator = torch.Generator().manual_seed(0)
    wide = gate_dtype(dtype)
    grad_gates = torch.randn(tokens, 3, generator=generator, dtype=torch.float64).to(wide)
    grad_logits = torch.randn(tokens, 9, generator=generator, dtype=torch.float64).to(wide)

    def route(x, grad_gates, grad_logits):
        leaf = x.to(device, copy=True).requires_grad_()
        routed = Router(gate, leaf, parameters)(ops, 3, order=order)
        grads = [g.to(device) for g in (grad_gates, grad_logits)]
        (grad,) = torch.autograd.grad([routed.gates, routed.logits], [leaf], grads)
        return [t.detach().cpu() for t in (routed.expert_ids, routed.gates, routed.logits, grad)]

    clean = route(router.x, grad_gates, grad_logits)
    for token in (0, tokens // 2, tokens - 1):
        own = torch.arange(tokens) == token
        actual = route(*(outside(t, own, poison) for t in (router.x, grad_gates, grad_logits)))
        for value, expected in zip(actual, clean, strict=True):
            assert_same(value[token], expected[token], dtype, f"token {token}")


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("size", [(9, 8), (33, 40), (7, 130)])
def test_linear_decode(rows, size, dtype, poison, device):
    if on_cuda(device):
        pytest.skip("linear_decode has CPU kernels alone")
    outputs, features = size
    x, weight, bias = (randn(*shape, dtype=dtype) for shape in ((rows, features), (outputs, features), (outputs,)))
    clean = linear_decode(x, weight, bias)
    for row in range(rows):
        for column in (0, outputs // 2, outputs - 1):
            own, unit = torch.arange(rows) == row, torch.arange(outputs) == column
            actual = linear_decode(outside(x, own, poison), outside(weight, unit, poison), outside(bias, unit, poison))
            assert torch.equal(actual[row, column], clean[row, column])
