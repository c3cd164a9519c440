"""torch's FLOP counter against numbers worked out by hand."""

import pytest
import torch
from layer_cases import EXPERTS, FEATURES, HIDDEN, attention_case, by_halves, copied, ffn_case, quantised, stack_case
from torch.utils.flop_counter import FlopCounterMode

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
from moduleformer_ext.quantised import BITS, quantise

T, D, G, E, K = 4, 8, 6, 3, 2
S = T * K
LAYOUT = reference.expert_layout(torch.tensor([[0, 1], [2, 1], [0, 2], [1, 0]], dtype=torch.int32), E)


def leaf(*shape, grad=True):
    return torch.randn(*shape).requires_grad_(grad)


def count(function, *args, **kwargs):
    """Operations of a forward pass and of the backward pass after it."""
    with FlopCounterMode(display=False) as forward:
        out = function(*args, **kwargs)
    out = out.gates if hasattr(out, "gates") else out[0] if isinstance(out, tuple) else out
    if not out.requires_grad:
        return forward.get_total_flops(), 0
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_routers():
    assert count(route_topk, leaf(T, E), K) == (0, 0)
    product = 2 * T * D * E
    assert count(route_topk_linear, leaf(T, D), leaf(E, D), K) == (product, 2 * product)
    assert count(route_topk_linear, leaf(T, D, grad=False), leaf(E, D), K) == (product, product)
    assert count(route_topk_linear, leaf(T, D, grad=False), leaf(E, D, grad=False), K) == (product, 0)
    segments = [leaf(1, D, grad=False), leaf(2, D)]
    assert count(route_topk_linear, leaf(T, D, grad=False), segments, K) == (product, product * 2 // 3)
    inner, outer = 2 * T * D * G, 2 * T * G * E
    mlp = leaf(T, D), leaf(G, D), leaf(G), leaf(E, G)
    assert count(route_topk_mlp, *mlp, K) == (inner + outer, 2 * (inner + outer))
    bias_alone = leaf(T, D, grad=False), leaf(G, D, grad=False), leaf(G), leaf(E, G, grad=False)
    assert count(route_topk_mlp, *bias_alone, K) == (inner + outer, outer)
    gmm = leaf(T, D), leaf(G, D), leaf(E, G), leaf(1)
    assert count(route_topk_gmm, *gmm, K) == (inner + outer, 2 * (inner + outer))


def test_grouped_gemm():
    product = 2 * S * D * G
    assert count(grouped_gemm, leaf(T, D), leaf(E, D, G), LAYOUT) == (product, 2 * product)
    with torch.no_grad():
        assert count(grouped_gemm, leaf(T, D), leaf(E, D, G), LAYOUT, activation="swiglu") == (product, 0)
    frozen = leaf(T, D, grad=False), leaf(E, D, G, grad=False)
    gated = {"out_order": "token", "gates": leaf(T, K)}
    assert count(grouped_gemm, *frozen, LAYOUT, **gated) == (product, product)
    assert count(grouped_gemm, *frozen, LAYOUT, activation="relu", **gated) == (product, 0)
    segments = [leaf(2, D, G, grad=False), leaf(1, D, G)]
    assert count(grouped_gemm, leaf(T, D, grad=False), segments, LAYOUT) == (product, product // 3)


def test_expert_ffn():
    up, down = 2 * S * D * 2 * G, 2 * S * G * D
    operands = leaf(T, D), leaf(E, D, 2 * G), leaf(E, G, D), LAYOUT, leaf(T, K)
    assert count(expert_ffn, *operands, activation="swiglu") == (up + down, 2 * (up + down))
    frozen = leaf(T, D, grad=False), leaf(E, D, 2 * G, grad=False), leaf(E, G, D, grad=False), LAYOUT
    assert count(expert_ffn, *frozen, leaf(T, K), activation="swiglu") == (up + down, down)


def test_linear_cross_entropy():
    product, target = 2 * T * D * E, torch.zeros(T, dtype=torch.long)
    assert count(linear_cross_entropy, leaf(T, D, grad=False), leaf(E, D, grad=False), target) == (product, 0)
    assert count(linear_cross_entropy, leaf(T, D), leaf(E, D), target) == (3 * product, 0)
    assert count(linear_cross_entropy, leaf(T, D, grad=False), leaf(E, D), target) == (2 * product, 0)
    again = product, 3 * product
    assert count(linear_cross_entropy, leaf(T, D), leaf(E, D), target, reduction="none") == again
    assert count(linear_cross_entropy, *(t.half() for t in (leaf(T, D), leaf(E, D))), target) == again


@pytest.mark.parametrize("shared", [False, True])
def test_stick_attention_counts_the_rectangle(shared):
    batch, queries, keys, heads, dim = 2, 3, 5, 4, 8
    q, k = leaf(batch, queries, heads, dim), leaf(batch, keys, 2, dim)
    values = None if shared else leaf(batch, keys, 2, dim)
    pairs = batch * heads * queries * keys
    assert count(stick_attention, q, k, values) == (2 * 2 * pairs * dim, 2 * 5 * pairs * dim)
    with FlopCounterMode(display=False) as plain:
        reference.stick_attention(q, k, values)
    assert plain.get_total_flops() == 2 * 2 * pairs * dim


def test_packed_stick_attention_counts_each_sequence():
    cu_q, cu_k = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    q, k = leaf(5, 2, 2, 8), leaf(9, 2, 8)
    pairs = 4 * (2 * 4 + 3 * 5)
    options = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    assert count(stick_attention, q, k, **options) == (2 * 2 * pairs * 8, 2 * 5 * pairs * 8)
    same = {"cu_seqlens_q": cu_q}
    assert count(stick_attention, q, k[:5], **same)[0] == 2 * 2 * 4 * (2 * 2 + 3 * 3) * 8
    meta = {name: tensor.to("meta") for name, tensor in options.items()}
    with torch.no_grad():
        at_most = count(stick_attention, q.to("meta"), k.to("meta"), **meta)
    assert at_most == (2 * 2 * 4 * 5 * 9 * 8, 0)


def test_decoding():
    weight = quantise(torch.ones(E, D, 5), 4)
    assert count(quantised_gemm, leaf(T, D, grad=False), weight, LAYOUT) == (2 * T * K * D * 5, 0)
    assert count(linear_decode, leaf(2, 3, D, grad=False), leaf(5, D, grad=False)) == (2 * 6 * D * 5, 0)
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    q, k = leaf(2, 1, 2, 2, 8, grad=False), leaf(2, 10, 2, 8, grad=False)
    assert count(stick_attention_decode, q, k, None, lengths) == (2 * 2 * 4 * (3 + 5) * 8, 0)
    meta = q.to("meta"), k.to("meta"), None, lengths.to("meta")
    assert count(stick_attention_decode, *meta) == (2 * 2 * 4 * 2 * 10 * 8, 0)


@pytest.mark.parametrize("return_route", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_decoding_of_a_layer(shared, return_route):
    """As its ops one by one count."""
    attention = attention_case(new=3, lengths=[2, 8], shared=shared)
    gate = 2 * 6 * (HIDDEN * FEATURES + EXPERTS * HIDDEN)
    projections = 0 if shared else 2 * 2 * 6 * FEATURES * 32
    products = 2 * 2 * 6 * 2 * FEATURES * 32
    attended = 2 * 2 * (5 + 11) * 3 * 2 * 32
    total = gate + projections + products + attended
    assert count(attention_layer_decode, **attention, return_route=return_route) == (total, 0)
    ffn = 2 * 6 * 2 * 2 * FEATURES * 40
    assert count(ffn_layer_decode, **ffn_case(new=3), return_route=return_route) == (gate + ffn, 0)
    for bits in BITS:
        few = quantised(ffn_case(new=3), bits)
        assert count(ffn_layer_decode, **few, return_route=return_route) == (gate + ffn, 0)


@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"shared": True, "heads": 1, "head_dim": 32, "segments": 2}])
def test_a_stack_counts_what_its_halves_do(options):
    case = stack_case(**options)
    assert count(blocks_decode, **copied(case)) == count(by_halves, **copied(case))
