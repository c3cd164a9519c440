"""What derivatives the ops have, and that they say so where they have none: a first one in reverse mode."""

import pytest
import torch
from torch.autograd import forward_ad

from moduleformer_ext import reference
from moduleformer_ext.ops import (
    attention_layer_decode,
    blocks_decode,
    expert_ffn,
    ffn_layer_decode,
    grouped_gemm,
    linear_cross_entropy,
    linear_decode,
    quantised_gemm,
    route_topk,
    route_topk_gmm,
    route_topk_linear,
    route_topk_mlp,
    stick_attention,
    stick_attention_decode,
)
from moduleformer_ext.quantised import quantise
from moduleformer_ext.types import BlockWeights, NormedRouter

RAW = torch.ops.moduleformer_ext
LAYOUT = reference.expert_layout(torch.tensor([[0, 1], [2, 1], [0, 2], [1, 0]], dtype=torch.int32), 3)
QUANTISED = quantise(torch.ones(3, 8, 5), 8)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)
CLASSES = torch.tensor([0, 4, -100, 2])
X, UP, DOWN, GATES, QKV = (4, 8), (3, 8, 8), (3, 8, 8), (4, 2), (1, 5, 2, 8)

# Op -> a function of differentiable inputs, and their shapes.
CASES = {
    "route_topk": (lambda logits: route_topk(logits, 2).gates, [X]),
    "route_topk_linear": (lambda x, w: route_topk_linear(x, w, 2, order="topk_softmax").prob_sum, [X, (3, 8)]),
    "route_topk_mlp": (lambda x, v, b, w: route_topk_mlp(x, v, b, [w], 1).logits, [X, (6, 8), (6,), (3, 6)]),
    "route_topk_gmm": (lambda x, v, c, t: route_topk_gmm(x, v, c, t, 1).plogp_sum, [X, (6, 8), (3, 6), (1,)]),
    "grouped_gemm": (lambda x, w: grouped_gemm(x, w, LAYOUT, activation="gelu"), [X, UP]),
    "grouped_gemm with gates": (
        lambda x, w, g: grouped_gemm(x, [w[:1], w[1:]], LAYOUT, out_order="token", gates=g),
        [X, UP, GATES],
    ),
    "expert_ffn": (lambda x, u, d, g: expert_ffn(x, u, d, LAYOUT, g), [X, UP, DOWN, GATES]),
    "linear_cross_entropy": (lambda x, w: linear_cross_entropy(x, w, CLASSES), [X, (5, 8)]),
    "linear_cross_entropy of rows": (
        lambda x, w: linear_cross_entropy(x, w, CLASSES, reduction="none"),
        [X, (5, 8)],
    ),
    "stick_attention": (stick_attention, [QKV, QKV, QKV]),
    "stick_attention with K = V": (stick_attention, [QKV, QKV]),
    "stick_attention remainder": (lambda q, k: stick_attention(q, k, return_remainder=True)[1], [QKV, QKV]),
    "stick_attention packed": (
        lambda q, k, v: stick_attention(q[0], k[0], v[0], cu_seqlens_q=CU),
        [QKV, QKV, QKV],
    ),
}
LAYER = [(1, 1, 8), (3, 8), (8,), (8,)]  # x, the rows of the experts, and the norm's two


def _linear_router(rows, scale, shift):
    return NormedRouter("linear", None, None, rows, 2, "softmax_topk", scale, shift, 1e-5)


def _block(router, query_weight, output_weight, up, down):
    return BlockWeights(router, query_weight, output_weight, *[None] * 4, router, up, down)


DECODING = {
    "attention_layer_decode": (
        lambda x, rows, scale, shift, q, o: attention_layer_decode(
            *(x, _linear_router(rows, scale, shift), q, o),
            *(None, None, None, None, torch.zeros(1, 5, 1, 8), None, torch.tensor([2], dtype=torch.int32)),
        ),
        [*LAYER, (3, 8, 8), (3, 8, 8)],
    ),
    "ffn_layer_decode": (
        lambda x, rows, scale, shift, up, down: ffn_layer_decode(x, _linear_router(rows, scale, shift), up, down),
        [*LAYER, (3, 8, 6), (3, 6, 8)],
    ),
    "blocks_decode": (
        lambda x, rows, scale, shift, *matrices: blocks_decode(
            *(x, [_block(_linear_router(rows, scale, shift), *matrices)], [torch.zeros(1, 5, 1, 8)], None),
            [torch.tensor([2], dtype=torch.int32)],
        ),
        [*LAYER, (3, 8, 8), (3, 8, 8), (3, 8, 6), (3, 6, 8)],
    ),
    "linear_decode": (linear_decode, [(2, 8), (5, 8), (5,)]),
    "quantised_gemm": (lambda x: quantised_gemm(x, QUANTISED, LAYOUT), [X]),
    "stick_attention_decode": (
        lambda q, k, v: stick_attention_decode(q, k, v, torch.tensor([5], dtype=torch.int32)),
        [QKV, QKV, QKV],
    ),
}


def leaves(shapes, requires_grad):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).requires_grad_(requires_grad) for shape in shapes]


def op_name(case):
    return case.split()[0]


# Decoding refuses every gradient.
@pytest.mark.parametrize(
    ("case", "requires_grad"), [*((c, False) for c in (*CASES, *DECODING)), *((c, True) for c in CASES)]
)
def test_forward_mode_is_refused(case, requires_grad):
    function, shapes = {**CASES, **DECODING}[case]
    refused = pytest.raises(NotImplementedError, match=f"^{op_name(case)}: forward-mode differentiation .* reverse")
    inputs = leaves(shapes, requires_grad)
    for i, tensor in enumerate(inputs):

        def of_one(t, i=i):
            return function(*inputs[:i], t, *inputs[i + 1 :])

        with refused:
            torch.func.jvp(of_one, (tensor,), (torch.ones_like(tensor),))
        with refused:
            torch.func.jacfwd(of_one)(tensor)
        with refused, forward_ad.dual_level():
            of_one(forward_ad.make_dual(tensor, torch.ones_like(tensor)))
        with refused, forward_ad.dual_level(), torch.no_grad():
            of_one(forward_ad.make_dual(tensor, torch.ones_like(tensor)))


@pytest.mark.parametrize("case", CASES)
def test_double_backward_is_refused_by_every_route(case):
    function, shapes = CASES[case]
    op = "route_topk" if case.startswith("route_topk") else op_name(case)
    refused = pytest.raises(NotImplementedError, match=f"^{op}: double backward is not implemented")
    for i in range(len(shapes)):
        inputs = leaves(shapes, requires_grad=True)
        out = function(*inputs)
        cotangent = torch.randn_like(out).requires_grad_()
        (gradient,) = torch.autograd.grad(out, inputs[i], cotangent, create_graph=True)
        assert gradient.isfinite().all()
        for by in [*inputs, cotangent]:
            with refused:
                torch.autograd.grad(gradient.sum(), by, allow_unused=True, retain_graph=True)
        with refused:
            gradient.sum().backward()


@pytest.mark.parametrize("case", CASES)
def test_only_one_input_requires_grad(case):
    function, shapes = CASES[case]
    for i in range(len(shapes)):
        inputs = leaves(shapes, requires_grad=False)
        inputs[i].requires_grad_()
        out = function(*inputs)
        (gradient,) = torch.autograd.grad(out.square().sum(), inputs[i], create_graph=True)
        with pytest.raises(NotImplementedError, match="double backward is not implemented"):
            gradient.sum().backward()


@pytest.mark.parametrize("case", ["stick_attention", "grouped_gemm", "expert_ffn", "route_topk_linear"])
def test_hessians_are_refused(case):
    function, shapes = CASES[case]
    first, *rest = leaves(shapes, requires_grad=False)
    with pytest.raises(
        (NotImplementedError, RuntimeError), match=r"not implemented|does not support|not supported|functorch"
    ):
        torch.func.hessian(lambda t: function(t, *rest).sum())(first)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        torch.autograd.functional.hessian(lambda t: function(t, *rest).square().sum(), first)


def raw_calls():
    """Raw ops without a derivative: name, a function of floating-point tensors, their shapes."""
    layout = (LAYOUT.offsets, LAYOUT.slot_order, LAYOUT.position, LAYOUT.num_choices)
    ids = torch.tensor([[0], [1], [2], [1]], dtype=torch.int32)
    tiles = torch.zeros(1, 5, 2, dtype=torch.int32)
    return {
        "route_topk_forward": (
            lambda x, w: RAW.route_topk_forward(
                x, "linear", None, None, [w], 1, "softmax_topk", 1.0, None, 0, None, 1, 1, 2, True
            )[0],
            [X, (3, 8)],
        ),
        "grouped_gemm_forward": (
            lambda x, w: RAW.grouped_gemm_forward(x, [w], *layout, "token", "expert", None, None, None, True)[0],
            [X, UP],
        ),
        "expert_ffn_forward": (
            lambda x, u, d, g: RAW.expert_ffn_forward(x, [u], [d], *layout, g, "relu", None, None, True)[0],
            [X, UP, DOWN, GATES],
        ),
        "route_topk_backward": (
            lambda g, x, w, logits: RAW.route_topk_backward(
                g,
                None,
                None,
                None,
                None,
                x,
                "linear",
                None,
                None,
                [w],
                "softmax_topk",
                1.0,
                ids,
                logits,
                torch.empty(0),
                [True, False, False, True],
            )[0],
            [(4, 1), X, (3, 8), (4, 3)],
        ),
        "grouped_gemm_backward": (
            lambda g, x, w: RAW.grouped_gemm_backward(
                g, x, [w], *layout, "token", "expert", None, None, None, torch.empty(0), True, False, False, [True]
            )[0],
            [(8, 8), X, UP],
        ),
        "expert_ffn_backward": (
            lambda g, x, u, d, gates, hidden: RAW.expert_ffn_backward(
                g, x, [u], [d], *layout, gates, "relu", None, None, hidden, True, True, False, False, [True], [True]
            )[0],
            [X, X, UP, DOWN, GATES, (8, 8)],
        ),
        "linear_cross_entropy_forward": (
            lambda x, w: RAW.linear_cross_entropy_forward(x, w, CLASSES, -100, "mean", 0.0, True, True)[0],
            [X, (5, 8)],
        ),
        "linear_cross_entropy_backward": (
            lambda g, x, w: RAW.linear_cross_entropy_backward(
                g.sum(), x, w, CLASSES, -100, "mean", 0.0, torch.ones(X), torch.ones(5, 8), True, True
            )[0],
            [(1,), X, (5, 8)],
        ),
        "stick_attention_backward": (
            lambda g, q, k, v, o, r: RAW.stick_attention_backward(
                g, None, q, k, v, o, r, torch.empty(0), tiles, None, True, None, None, None
            )[0],
            [QKV, QKV, QKV, QKV, QKV, (1, 5, 2)],
        ),
    }


@pytest.mark.parametrize("name", raw_calls())
def test_raw_ops_are_not_differentiable(name):
    function, shapes = raw_calls()[name]
    op, half = name.rsplit("_", 1)
    second = f"^{op}: double backward is not implemented"
    message = second if half == "backward" else f"^{name}: this op has no derivative; {op} has"
    for i in range(len(shapes)):
        inputs = leaves(shapes, requires_grad=False)
        assert not function(*inputs).requires_grad
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            torch.func.jvp(
                lambda t, i=i, rest=inputs: function(*rest[:i], t, *rest[i + 1 :]), (inputs[i],), (inputs[i],)
            )
        inputs[i].requires_grad_()
        with torch.no_grad():
            assert not function(*inputs).requires_grad
        result = function(*inputs)
        with pytest.raises(NotImplementedError, match=message):
            torch.autograd.grad(result.sum(), inputs[i], allow_unused=True)
