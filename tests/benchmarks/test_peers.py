"""A benchmark against a wrong peer is worth nothing: they compute what moduleformer_ext.reference does."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from benchmarks.inputs import (
    TINY,
    attention_inputs,
    expert_weights,
    live_keys,
    live_tile_fraction,
    normal,
    random_gates,
    randomize,
)
from benchmarks.peers import apart, jetmoe
from benchmarks.peers.apart import Apart
from benchmarks.peers.attention import (
    DenseStickAttention,
    attention_peers,
    cumsum_stick_attention,
    softmax_attention,
    softmax_inputs,
)
from benchmarks.peers.block import ReferenceBlock, ReferenceModel
from benchmarks.peers.experts import (
    ffn,
    ffn_peers,
    grouped_mm_product,
    loop_product,
    mlp_logits,
    moa_map,
    moa_reduce,
    mutual_information_loss,
    padded_bmm_product,
    route,
    sorted_layout,
)
from benchmarks.race import REFERENCE
from moduleformer_ext import ops
from moduleformer_ext import reference as ref

DTYPE = torch.float64
PRODUCTS = [loop_product, grouped_mm_product, padded_bmm_product]
needs_transformers = pytest.mark.skipif(not jetmoe.AVAILABLE, reason="transformers is not installed")


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-10 if actual.dtype == DTYPE else 1e-5
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("new", [12, 5, 1])
@pytest.mark.parametrize("formulation", ["dense", "cumsum"])
def test_stick_attention(formulation: str, new: int) -> None:
    q, k, v = attention_inputs(12, 2, 3, 8, DTYPE, mean_logit=-1.0)
    q = q[:, -new:].requires_grad_()
    peer = DenseStickAttention(16, DTYPE) if formulation == "dense" else cumsum_stick_attention
    out = peer(q, k, v)
    expected = ref.stick_attention(q.transpose(2, 3), k, v).transpose(2, 3)
    assert_close(out, expected)
    cotangent = torch.randn_like(out)
    assert_close(*(torch.autograd.grad(y, q, cotangent)[0] for y in (out, expected)))


def test_softmax_attention_has_the_same_heads() -> None:
    q, k, v = attention_inputs(6, 2, 3, 8, DTYPE)
    out = softmax_attention(*softmax_inputs(q, k, v)).unflatten(1, (3, 2)).permute(0, 3, 2, 1, 4)
    weights = (torch.einsum("btnhd,bshd->bnhts", q, k) / 8**0.5).masked_fill(
        torch.ones(6, 6).triu(1).bool(), -torch.inf
    )
    assert_close(out, torch.einsum("bnhts,bshd->btnhd", weights.softmax(-1), v))


@pytest.mark.parametrize("product", PRODUCTS + ([jetmoe.expert_product] if jetmoe.AVAILABLE else []))
def test_experts(product) -> None:
    tokens, d, hidden, experts, k = 7, 8, 12, 5, 2
    dtype = torch.float32 if product is grouped_mm_product else DTYPE  # it has no float64
    x = normal(tokens, d, dtype=dtype).requires_grad_()
    up, down = (expert_weights(experts, *size, dtype, seed=0).requires_grad_() for size in ((d, hidden), (hidden, d)))
    gates, ids = random_gates(tokens, experts, k)
    ids[ids == 3] = 0  # an empty expert
    layout = ref.expert_layout(ids, experts)
    gates = gates.to(dtype)
    y = ffn(product, x, up, down, layout, gates)
    expected = ref.expert_ffn(x, up, down, layout, gates)
    assert_close(y, expected)
    cotangent = torch.randn_like(y)
    for actual, wanted in zip(
        *(torch.autograd.grad(out, (x, up, down), cotangent) for out in (y, expected)), strict=True
    ):
        assert_close(actual, wanted)
    heads = moa_map(product, x, up, layout)
    assert_close(heads, ref.grouped_gemm(x, up, layout, x_order="token", out_order="slot"))
    reduced = ref.grouped_gemm(heads, down, layout, x_order="slot", out_order="token", gates=gates)
    assert_close(moa_reduce(product, heads, down, layout, gates), reduced)


def test_router() -> None:
    x, hidden, bias, weight = (normal(*size, dtype=DTYPE) for size in ((9, 6), (8, 6), (8,), (5, 8)))
    routing = route(mlp_logits(x, hidden, bias, weight), 2)
    expected = ref.route_topk_mlp(x, hidden, bias, weight, 2)
    for name in routing._fields:
        assert_close(getattr(routing, name), getattr(expected, name))
    assert_close(mutual_information_loss(routing, 9), ref.losses.mutual_information_loss(expected))
    layout, wanted = sorted_layout(routing.expert_ids, 5), ref.expert_layout(expected.expert_ids, 5)
    assert all(torch.equal(a, b) for a, b in zip(layout[:4], wanted[:4], strict=True))


@pytest.mark.parametrize("heads", [2, 1])
def test_block_and_model(heads: int) -> None:
    shape = replace(TINY, heads=heads)
    dense = DenseStickAttention(16, DTYPE)
    block = ReferenceBlock(shape, dense).to(DTYPE)
    randomize(block)
    x = normal(2, 9, shape.d, dtype=DTYPE)
    y, loss, (keys, values) = block(x)
    layer_norm = torch.nn.functional.layer_norm

    def router(gate, tokens):
        hidden, last = gate.w_gate[0], gate.w_gate[3]
        return ref.route_topk_mlp(tokens, hidden.weight, hidden.bias, last.weight, shape.k)

    projection, ffn_part = block.attn.q_proj, block.mlpf
    normed = layer_norm(x, (shape.d,))
    routes = [router(projection.gate, normed.flatten(0, 1))]
    layout = ref.expert_layout(routes[0].expert_ids, shape.att_experts)
    q = ref.grouped_gemm(normed.flatten(0, 1), projection.experts.weight, layout, out_order="slot")
    q = q.view(2, 9, shape.k, heads, -1).transpose(2, 3)
    out = ref.stick_attention(q, keys, values).transpose(2, 3).reshape(18, shape.k, -1)
    reduced = ref.grouped_gemm(
        out, projection.output_experts.weight, layout, x_order="slot", out_order="token", gates=routes[0].gates
    )
    expected = x + reduced.view_as(x)
    normed = layer_norm(expected, (shape.d,)).flatten(0, 1)
    routes.append(router(ffn_part.gate, normed))
    layout = ref.expert_layout(routes[1].expert_ids, shape.ffn_experts)
    up, down = ffn_part.experts.weight, ffn_part.output_experts.weight
    expected = expected + ref.expert_ffn(normed, up, down, layout, routes[1].gates).view_as(x)
    assert_close(y, expected)
    assert_close(loss, sum(ref.losses.mutual_information_loss(r) for r in routes))
    first, _, past = block(x[:, :5])
    second, _, _ = block(x[:, 5:], past)
    assert_close(torch.cat([first, second], 1), y)

    model = ReferenceModel(shape, 2, 11, dense).to(DTYPE)
    randomize(model)
    ids = torch.arange(8)[None]
    logits, _ = model(ids)
    _, past = model(ids[:, :7])
    torch.testing.assert_close(model(ids[:, 7:], past)[0], logits[:, 7:], rtol=1e-5, atol=1e-5)


@needs_transformers
def test_jetmoe_runs_and_its_cache_grows() -> None:
    block = jetmoe.JetMoeBlock(TINY, torch.float32)
    x = normal(1, 6, TINY.d)
    with torch.no_grad():
        whole = block(x)
        cache = block.new_cache()
        parts = torch.cat([block(x[:, :5], cache), block(x[:, 5:], cache)], 1)
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
        model = jetmoe.model(TINY, 3, 16, torch.float32, distinct_layers=2)
        ids = torch.arange(6)[None]
        output = model(ids[:, :5], use_cache=True)
        step = model(ids[:, 5:], past_key_values=output.past_key_values, use_cache=True)
        torch.testing.assert_close(step.logits, model(ids).logits[:, 5:], rtol=1e-4, atol=1e-4)


def test_live_tiles() -> None:
    q, k, _ = attention_inputs(256, 1, 1, 16, torch.float32)
    assert live_tile_fraction(q, k, 0.0) == 1
    assert live_tile_fraction(q, k, 2.0**-24, tile=32) < 0.7
    q, k, _ = attention_inputs(256, 1, 1, 16, torch.float32, mean_logit=-12.0)
    assert live_tile_fraction(q, k, 2.0**-24, tile=32) == 1
    assert live_keys(q[0, -1], k[0], 2.0**-24) == 256
    # every key takes half of what is left: 2**-n after n keys
    zero = torch.zeros(40, 1, 8)
    assert live_keys(zero[:1], zero, 2.0**-10) == 10


def install(monkeypatch, name: str, **functions: object) -> None:
    """A package that has these functions."""
    for parent in [name.rsplit(".", depth)[0] for depth in range(name.count("."), 0, -1)]:
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def test_attention_peers_get_their_layouts(monkeypatch) -> None:
    def sb_attn(q, k, v, *, attend_current):  # [B, H, T, D]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        output, remainder = ops.stick_attention(q, k, v, attend_current=attend_current, return_remainder=True)
        return output.transpose(1, 2), remainder.transpose(1, 2)

    def flash_attn_func(q, k, v, *, causal):  # [B, T, H, D]
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)

    install(monkeypatch, "stickbreaking_attention.sb_attn", sb_attn=sb_attn)
    install(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    found = attention_peers(1)
    q, k, v = attention_inputs(20, 1, 3, 8, torch.float32)
    expected = ops.stick_attention(q.transpose(2, 3), k, v).transpose(2, 3)
    torch.testing.assert_close(found["stickbreaking-attention (Triton)"].bind(q, k, v)(), expected)
    softmax = found["flash-attn (softmax)"]
    assert softmax.bind(q, k, v)().shape == q.shape and not softmax.comparable


def test_scattermoe_gets_its_routing(monkeypatch) -> None:
    def parallel_linear(x, weight, k, experts, slots, ends, *, gates=None, grouped_in=False, grouped_out=False):
        assert torch.equal(ends, experts.bincount(minlength=len(weight)).cumsum(0))
        rows = x if grouped_in else x[slots // k]
        y = torch.stack([row @ weight[expert] for row, expert in zip(rows, experts, strict=True)])
        if grouped_out:
            return y
        by_slot = torch.empty_like(y)
        by_slot[slots] = y
        return (gates[..., None] * by_slot.unflatten(0, gates.shape)).sum(1)

    install(monkeypatch, "scattermoe.parallel_experts", parallel_linear=parallel_linear)
    peer = ffn_peers()["scattermoe (Triton)"]
    x, up, down = normal(9, 8), expert_weights(4, 8, 6, torch.float32, 1), expert_weights(4, 6, 8, torch.float32, 2)
    gates, expert_ids = random_gates(9, 4, 2)
    layout = ops.expert_layout(expert_ids, 4)
    torch.testing.assert_close(peer.bind(x, up, down, layout, gates)(), ops.expert_ffn(x, up, down, layout, gates))


def test_absent_packages_are_no_peers(monkeypatch) -> None:
    for name in ("stickbreaking_attention", "flash_attn", "scattermoe"):
        monkeypatch.setitem(sys.modules, name, None)
    assert attention_peers(1) == {}
    assert set(ffn_peers(jetmoe_experts=False)) == {REFERENCE, "grouped_mm", "padded bmm"}


SERVED = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np
import served

def loop(arrays, precision, threads):
    assert (precision, threads) == ("fp32", 1)
    y = np.empty_like(arrays["x"])

    def run():
        print("a word of a package")
        for t, x in enumerate(arrays["x"]):
            y[t] = 0
            for e, weight in zip(arrays["ids"][t], arrays["weights"][t]):
                gate, up = arrays["gate"][e] @ x, arrays["up"][e] @ x
                y[t] += weight * (arrays["down"][e] @ (gate / (1 + np.exp(-gate)) * up))

    return run, lambda: y

served._KINDS["ggml"] = loop
served.serve(*sys.argv[1:])
"""


def gated_experts(width: int = 32, hidden: int = 64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of a peer apart, and y in float64."""
    x, (weights, ids) = normal(5, width), random_gates(5, 4, 2)
    gate, up = (expert_weights(4, width, hidden, torch.float32, seed).transpose(1, 2) for seed in (1, 2))
    down = expert_weights(4, hidden, width, torch.float32, 3).transpose(1, 2)
    rows = x.double()[:, None, :, None]
    of_slot = [matrices.double()[ids.long()] for matrices in (gate, up, down)]
    inner = F.silu(of_slot[0] @ rows) * (of_slot[1] @ rows)
    y = (weights.double()[..., None] * (of_slot[2] @ inner)[..., 0]).sum(1)
    return {"gate": gate, "up": up, "down": down, "x": x, "ids": ids, "weights": weights}, y


def test_a_peer_in_a_process_of_its_own(monkeypatch, tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text(SERVED.format(folder=str(Path(apart.__file__).parent)))
    monkeypatch.setattr(apart, "_PROGRAM", program)
    inputs, expected = gated_experts()
    peer = Apart(sys.executable, "ggml", "fp32", 1, inputs)
    for _ in range(2):
        torch.testing.assert_close(peer.run()["y"].double(), expected, rtol=1e-4, atol=1e-5)
        assert set(peer.clocks()) == {"cpu", "wall"} and peer.clocks()["wall"] > 0
    process = peer._process
    peer.close()
    assert process is not None and process.returncode == 0


def test_a_peer_apart_that_is_not_there_says_why(monkeypatch, tmp_path) -> None:
    (tmp_path / "kt_kernel.py").write_text("raise ImportError('no kt_kernel for this processor')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    inputs, _ = gated_experts()
    peer = Apart(sys.executable, "kt-kernel", "bf16", 1, inputs)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="its process ended with status 1 and said: ImportError: no kt_kernel"):
            peer.run()
    peer.close()


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("int8", 0.05)])
def test_kt_kernel_computes_gated_experts(precision: str, tolerance: float) -> None:
    pytest.importorskip("kt_kernel")
    inputs, expected = gated_experts(width=128, hidden=256)
    peer = Apart(sys.executable, "kt-kernel", precision, 1, inputs)
    error = (peer.run()["y"] - expected).norm() / expected.norm()
    peer.close()
    assert error < tolerance


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.02), ("q8_0", 0.05), ("q4_0", 0.3)])
def test_ggml_computes_gated_experts(precision: str, tolerance: float) -> None:
    pytest.importorskip("llama_cpp")
    inputs, expected = gated_experts()
    peer = Apart(sys.executable, "ggml", precision, 1, inputs)
    error = (peer.run()["y"] - expected).norm() / expected.norm()
    peer.close()
    assert error < tolerance
