"""The routers inside torch: dispatcher, compilation, export, autocast, error messages, other instruction sets."""

from __future__ import annotations

import math

import pytest
import torch
from instruction_sets import run_with
from router_cases import GATES, Router, random_cotangents, weighted_sum

from moduleformer_ext import ops, reference

OP = torch.ops.moduleformer_ext.route_topk.default


def op_arguments(
    router: Router,
    k: int,
    order: str = "softmax_topk",
    noise=None,
    num_sampled: int = 0,
    selection_bias=None,
    groups: tuple[int, int, int] = (1, 1, 2),
) -> tuple:
    """What the Python function passes to the op."""
    parameters = router.parameters
    weight = []
    if router.gate != "logits":
        weight = list(parameters["centroids" if router.gate == "gmm" else "weight"].split([2, 3]))
    return (
        router.x,
        router.gate,
        parameters.get("hidden_weight"),
        parameters.get("hidden_bias"),
        [segment.detach().clone().requires_grad_(router.x.requires_grad) for segment in weight],
        k,
        order,
        1.5,
        noise,
        num_sampled,
        selection_bias,
        *groups,
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(gate, dtype, grad):
    for order, num_sampled in (("softmax_topk", 0), ("topk_softmax", 1)):
        router = Router.random(gate, 7, 5, dtype=dtype)
        if grad:
            router.require_grad()
        noise = torch.empty(7, 5).exponential_() if num_sampled else None
        torch.library.opcheck(OP, op_arguments(router, 2, order, noise, num_sampled))
    router = Router.random(gate, 7, 5, dtype=dtype)
    if grad:
        router.require_grad()
    for order in ("sigmoid_topk", "sigmoid_topk_renormalised"):
        torch.library.opcheck(OP, op_arguments(router, 2, order, selection_bias=torch.randn(5)))
        torch.library.opcheck(OP, op_arguments(router, 2, order, groups=(5, 3, 1)))


def test_opcheck_of_the_halves():
    router = Router.random("mlp", 7, 5, dtype=torch.float32)
    arguments = op_arguments(router, 2)
    torch.library.opcheck(torch.ops.moduleformer_ext.route_topk_forward.default, (*arguments, True))
    route = torch.ops.moduleformer_ext.route_topk_forward(*arguments, True)
    ids, logits, hidden = route[1], route[6], route[7]
    gradients = (torch.randn(7, 2), torch.randn(5), torch.randn(()), None, torch.randn(7, 5))
    x, gate, hidden_weight, hidden_bias, weight, _, order, scale, *_ = arguments
    torch.library.opcheck(
        torch.ops.moduleformer_ext.route_topk_backward.default,
        (
            *gradients,
            x,
            gate,
            hidden_weight,
            hidden_bias,
            weight,
            order,
            scale,
            ids,
            logits,
            hidden,
            [True, False, True, False, True],
        ),
    )


def loss_of(router: Router, leaves, **options) -> torch.Tensor:
    call = Router(router.gate, leaves[0], dict(zip(router.parameters, leaves[1:], strict=True)))
    route = call(ops, 2, **options)
    return (
        (route.gates * torch.arange(1, 3)).sum() + ops.losses.mutual_information_loss(route) + route.logits[:, 1].sum()
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(gate, dynamic):
    torch.compiler.reset()

    def run(*leaves):
        return loss_of(router, leaves)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (9, 20):
        router = Router.random(gate, tokens, 6, dtype=torch.float32)
        twin = Router.random(gate, tokens, 6, dtype=torch.float32).require_grad()
        router.require_grad()
        expected = run(*twin.leaves())
        actual = compiled(*router.leaves())
        torch.testing.assert_close(actual, expected)
        expected.backward()
        actual.backward()
        for one, other in zip(router.leaves(), twin.leaves(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("gate", GATES)
def test_exports(gate):
    router = Router.random(gate, 8, 6, dtype=torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *leaves):
            route = Router(gate, leaves[0], dict(zip(router.parameters, leaves[1:], strict=True)))(ops, 2)
            return route.gates, route.expert_ids

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = ({0: tokens}, *({} for _ in router.parameters))
    program = torch.export.export(Module(), tuple(router.leaves()), dynamic_shapes=(shapes,))
    longer = Router.random(gate, 33, 6, dtype=torch.float32)
    gates, expert_ids = program.module()(*longer.leaves())
    route = longer(ops, 2)
    assert torch.equal(gates, route.gates)
    assert torch.equal(expert_ids, route.expert_ids)


@pytest.mark.parametrize("gate", GATES)
def test_autocast_keeps_the_router_in_float32(gate):
    router = Router.random(gate, 30, 6, dtype=torch.float32).require_grad()
    outside = router(ops, 2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = router(ops, 2)
        assert ops.losses.mutual_information_loss(inside).dtype == torch.float32
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one, other)
    # What autocast hands over is bfloat16, the parameters are not.
    router.x = router.x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        route = router(ops, 2)
    assert route.gates.dtype == torch.float32
    torch.testing.assert_close(route.logits, router.double()(reference, 2).logits.float(), rtol=1e-5, atol=1e-5)
    weighted_sum(route, random_cotangents(route)).backward()
    assert router.x.grad.dtype == torch.bfloat16


def test_fake_and_meta_tensors():
    router = Router.random("mlp", 12, 6, dtype=torch.bfloat16)
    router.x = router.x.to("meta")
    router.parameters = {name: value.to("meta") for name, value in router.parameters.items()}
    route = router(ops, 3)
    assert route.gates.shape == (12, 3)
    assert route.gates.device.type == "meta"
    assert route.gates.dtype == torch.float32


def test_gradients_of_integers_do_not_exist():
    route = Router.random("linear", 5, 4).require_grad()(ops, 2)
    assert not route.expert_ids.requires_grad
    assert not route.counts.requires_grad
    assert route.gates.requires_grad


X, V, B, W = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(6), torch.zeros(5, 6)
L = torch.zeros(4, 5)


def quantized(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.route_topk(L[0], 1), r"route_topk: logits must have 2 dimensions, got shape \[5\]"),
        (
            lambda: ops.route_topk(L.long(), 1),
            "route_topk: logits must be float32, float64, bfloat16 or float16, got Long",
        ),
        (lambda: ops.route_topk(L[:, :0], 1), r"route_topk: logits must have at least one column, got shape \[4, 0\]"),
        (lambda: ops.route_topk(L, 0), r"route_topk: k must be in \[1, 5\] \(the number of experts\), got 0"),
        (lambda: ops.route_topk(L, 6), r"route_topk: k must be in \[1, 5\] \(the number of experts\), got 6"),
        (
            lambda: ops.route_topk(L, 2, order="top"),
            "route_topk: order must be 'softmax_topk', 'topk_softmax', 'sigmoid_topk' or 'sigmoid_topk_renormalised', "
            "got 'top'",
        ),
        (
            lambda: ops.route_topk(L, 2, num_sampled=3, noise=L),
            r"route_topk: num_sampled must be in \[0, 2\] \(k\), got 3",
        ),
        (lambda: ops.route_topk(L, 2, num_sampled=-1), r"route_topk: num_sampled must be in \[0, 2\] \(k\), got -1"),
        (lambda: ops.route_topk(L, 2, num_sampled=1), "route_topk: noise must be given if and only if .* got none"),
        (lambda: ops.route_topk(L, 2, noise=L), "route_topk: noise must be given if and only if .* got one"),
        (
            lambda: ops.route_topk(L, 2, noise=L[1:], num_sampled=1),
            r"noise must have shape \[T, E\] = \[4, 5\], got shape \[3, 5\]",
        ),
        (lambda: ops.route_topk(L, 2, noise=L.int(), num_sampled=1), "noise must be float32, .* got Int"),
        (
            lambda: ops.route_topk(L, 2, order="sigmoid_topk", noise=L, num_sampled=1),
            "route_topk: num_sampled must be 0 with sigmoids, selection_bias or groups left out, got 1",
        ),
        (
            lambda: ops.route_topk(L, 2, selection_bias=L[0], noise=L, num_sampled=2),
            "num_sampled must be 0 with .*, got 2",
        ),
        (
            lambda: ops.route_topk(L, 2, num_groups=5, top_groups=4, noise=L, num_sampled=2),
            "num_sampled must be 0 with .*, got 2",
        ),
        (lambda: ops.route_topk(L, 2, selection_bias=L), r"selection_bias must have 1 dimensions?, got shape \[4, 5\]"),
        (
            lambda: ops.route_topk(L, 2, selection_bias=L[0, 1:]),
            r"selection_bias must have shape \[E\] = \[5\], got .*4",
        ),
        (lambda: ops.route_topk(L, 2, selection_bias=L[0].int()), "selection_bias must be float32, .* got Int"),
        (
            lambda: ops.route_topk(L, 2, selection_bias=L[0].to("meta")),
            r"selection_bias must be on the device of x \(cpu\), got meta",
        ),
        (
            lambda: ops.route_topk(L, 2, selection_bias=L[0].to_sparse()),
            "route_topk: selection_bias must be a dense .*, got layout Sparse",
        ),
        (lambda: ops.route_topk(L, 2, num_groups=2), "route_topk: num_groups must divide the 5 experts, got 2"),
        (lambda: ops.route_topk(L, 2, num_groups=0), "route_topk: num_groups must divide the 5 experts, got 0"),
        (lambda: ops.route_topk(L, 2, num_groups=-5), "route_topk: num_groups must divide the 5 experts, got -5"),
        (
            lambda: ops.route_topk(L, 2, num_groups=5, top_groups=6),
            r"top_groups must be in \[1, 5\] \(num_groups\), got 6",
        ),
        (
            lambda: ops.route_topk(L, 2, num_groups=5, top_groups=0),
            r"top_groups must be in \[1, 5\] \(num_groups\), got 0",
        ),
        (
            lambda: ops.route_topk(L, 2, num_groups=5, top_groups=1),
            "top_groups must leave at least k = 2 experts, of groups of 1, got 1",
        ),
        (
            lambda: ops.route_topk(L, 2, num_groups=5, top_groups=3, scored_per_group=3),
            "scored_per_group must be 1 or 2, got 3",
        ),
        (
            lambda: ops.route_topk_linear(X, W, 1),
            r"route_topk_linear: weight must have D = 8 columns, got shape \[5, 6\]",
        ),
        (lambda: ops.route_topk_linear(X, (), 1), "route_topk_linear: weight must have at least one segment, got none"),
        (
            lambda: ops.route_topk_linear(X, V[:0], 1),
            r"route_topk_linear: weight must have at least one row \(expert\)",
        ),
        (
            lambda: ops.route_topk_linear(X, (V, V.half()), 1),
            "weight must have the dtype of its first segment .*, got Half",
        ),
        (lambda: ops.route_topk_linear(X.double(), V, 1), "weight must be float64 if and only if x is .*, got Float"),
        (lambda: ops.route_topk_linear(X, V.double(), 1), "weight must be float64 if and only if x is .*, got Double"),
        (lambda: ops.route_topk_linear(X, V.to("meta"), 1), r"weight must be on the device of x \(cpu\), got meta"),
        (
            lambda: ops.route_topk_mlp(X, V[:, 1:], B, W, 1),
            r"route_topk_mlp: hidden_weight must have D = 8 columns, got shape \[6, 7\]",
        ),
        (lambda: ops.route_topk_mlp(X, V[0], B, W, 1), r"hidden_weight must have 2 dimensions, got shape \[8\]"),
        (lambda: ops.route_topk_mlp(X, V[:0], B[:0], W[:, :0], 1), "hidden_weight must have at least one row"),
        (
            lambda: ops.route_topk_mlp(X, V, B[1:], W, 1),
            r"hidden_bias must have shape \[G\] with G = 6 .*, got shape \[5\]",
        ),
        (lambda: ops.route_topk_mlp(X, V, B, W[:, 1:], 1), r"weight must have G = 6 columns, got shape \[5, 5\]"),
        (lambda: ops.route_topk_mlp(X, V.int(), B, W, 1), "hidden_weight must be float32, .* got Int"),
        (
            lambda: ops.route_topk_gmm(X, V, W[0], torch.ones(()), 1),
            r"centroids must be floating-point and have 2 .* \(6,\)",
        ),
        (
            lambda: ops.route_topk_gmm(X, V, W.to_sparse(), torch.ones(()), 1),
            "route_topk_gmm: centroids must be a dense tensor with strides, got layout torch.sparse_coo",
        ),
        (
            lambda: ops.route_topk_linear(X, V.to_sparse(), 1),
            "route_topk_linear: weight must be a dense .*, got layout Sparse",
        ),
        (lambda: ops.route_topk(X.to_sparse(), 1), "route_topk: logits must be a dense .*, got layout Sparse"),
        (
            lambda: ops.route_topk_gmm(X, V.to_sparse(), W, torch.ones(()), 1),
            "route_topk_gmm: hidden_weight must be a dense .*, got layout Sparse",
        ),
        (
            lambda: ops.route_topk_gmm(X, V, quantized(W), torch.ones(()), 1),
            r"route_topk_gmm: centroids must be a dense tensor with strides, got a quantized one \(torch.qint8\)",
        ),
        (
            lambda: ops.route_topk_gmm(X, V, W, quantized(torch.ones(())), 1),
            "route_topk_gmm: temperature must be a dense tensor with strides, got a quantized one",
        ),
        (lambda: ops.route_topk_linear(X, 3, 1), "route_topk_linear: weight must be a tensor or a sequence .* got int"),
        (lambda: ops.route_topk_gmm(X, V, W[:, 1:], torch.ones(()), 1), "centroids must have G = 6 columns"),
        (lambda: ops.route_topk_gmm(X, V, W, torch.ones(2), 1), r"temperature must be .* one element, got .* \(2,\)"),
        (
            lambda: ops.route_topk_gmm(X, V, W, torch.ones((), dtype=torch.int), 1),
            "temperature must be a floating-point",
        ),
        (lambda: ops.route_topk(X, 1, scale=math.inf), "route_topk: scale must be finite in float32, got inf"),
        (lambda: ops.route_topk(X, 1, scale=math.nan), "route_topk: scale must be finite in float32, got nan"),
        (lambda: ops.route_topk_linear(X, V, 1, scale=1e300), r"scale must be finite in float32, got 1e\+300"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_parameter_list_is_a_sequence_of_segments():
    parts = torch.nn.ParameterList(W.detach().clone().split([2, 3]))
    for route, expected in (
        (ops.route_topk_mlp(X, V, B, parts, 2), ops.route_topk_mlp(X, V, B, W, 2)),
        (ops.route_topk_gmm(X, V, parts, torch.ones(()), 2), ops.route_topk_gmm(X, V, W, torch.ones(()), 2)),
    ):
        assert torch.equal(route.gates, expected.gates)


SMOKE = """
import torch
from router_cases import GATES, Router, random_cotangents, weighted_sum
from moduleformer_ext import ops, reference
from moduleformer_ext._extension import build_info

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-12}
print(build_info()["cpu_isa"], build_info()["brgemm_f32"])
for gate in GATES:
    for dtype, tolerance in TOLERANCES.items():
        for order, tokens, experts, k, groups in (
            ("softmax_topk", 83, 21, 2, 1),
            ("topk_softmax", 5, 40, 19, 1),
            ("sigmoid_topk_renormalised", 83, 40, 3, 8),
        ):
            router = Router.random(gate, tokens, experts, dim=50, hidden=35, dtype=dtype).require_grad()
            exact = router.double()
            options = {"order": order, "num_groups": groups, "top_groups": (groups + 1) // 2}
            route, expected = router(ops, k, **options), exact(reference, k, **options)
            assert torch.equal(route.expert_ids, expected.expert_ids)
            torch.testing.assert_close(route.gates.double(), expected.gates, rtol=1e-4, atol=1e-6)
            cotangents = random_cotangents(route)
            weighted_sum(route, cotangents).backward()
            weighted_sum(expected, cotangents).backward()
            for tensor, twin in zip(router.leaves(), exact.leaves(), strict=True):
                error = (tensor.grad.double() - twin.grad).abs().max() / twin.grad.abs().max()
                assert error < tolerance, (gate, dtype, error)
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"MFX_CPU_ISA": "baseline", "MFX_BRGEMM": "0"},
        {"MFX_CPU_ISA": "avx2"},
        {"MFX_CPU_ISA": "avx512", "MFX_BRGEMM": "0"},
        {"MFX_BRGEMM": "0"},
    ],
    ids=lambda environment: "-".join(environment.values()),
)
def test_other_instruction_sets(environment):
    output = run_with(environment, SMOKE).split()
    if "MFX_CPU_ISA" in environment:
        assert output[0] == environment["MFX_CPU_ISA"]
    if "MFX_BRGEMM" in environment:
        assert output[1] == "False"
