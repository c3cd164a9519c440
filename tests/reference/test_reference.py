"""The twins against their definitions, written out as plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from moduleformer_ext import reference as ref


def sticks_by_hand(scores: list[float]) -> tuple[list[float], float]:
    """Weights of one query over its visible keys (oldest first), breaking the stick from the newest on."""
    left, weights = 1.0, []
    for s in reversed(scores):
        beta = 1 / (1 + math.exp(-s))
        weights.append(left * beta)
        left *= 1 / (1 + math.exp(s))
    return weights[::-1], left


@pytest.mark.parametrize("attend_current", [True, False])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
def test_stick_attention_matches_loops(attend_current: bool, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    (h_q, h_kv), t_q, t_k, d = heads, 3, 5, 4
    q = torch.randn(2, t_q, h_q, d, dtype=torch.float64)
    k, v = torch.randn(2, 2, t_k, h_kv, d, dtype=torch.float64)
    keep = torch.tensor([[True] * t_k, [False, True, True, False, True]])
    out, remainder = ref.stick_attention(
        q, k, v, attend_current=attend_current, key_padding_mask=keep, return_remainder=True
    )
    for b in range(2):
        for i in range(t_q):
            for h in range(h_q):
                g = h // (h_q // h_kv)
                end = t_k - t_q + i + attend_current
                seen = [j for j in range(end) if keep[b, j]]
                weights, left = sticks_by_hand([float(q[b, i, h] @ k[b, j, g]) / math.sqrt(d) for j in seen])
                expected = sum((w * v[b, j, g] for w, j in zip(weights, seen, strict=True)), torch.zeros(d))
                torch.testing.assert_close(out[b, i, h], expected.double(), atol=1e-12, rtol=1e-12)
                assert remainder[b, i, h].item() == pytest.approx(left, rel=1e-12)


def test_stick_attention_is_exact_in_saturation() -> None:
    k = torch.eye(4, dtype=torch.float64)[None, :, None]
    q = torch.tensor([[0.0, 0.0, 1000.0, -1000.0]], dtype=torch.float64)[None, :, None].requires_grad_()
    out, remainder = ref.stick_attention(q, k, scale=1.0, return_remainder=True)
    torch.testing.assert_close(out[0, 0, 0], torch.tensor([0, 0, 1, 0], dtype=torch.float64))
    assert remainder.item() == 0
    out.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_masked_row_gives_nothing_and_leaves_the_stick() -> None:
    q = torch.randn(1, 3, 2, 4, requires_grad=True)
    out, remainder = ref.stick_attention(
        q, q.detach(), key_padding_mask=torch.zeros(1, 3, dtype=torch.bool), return_remainder=True
    )
    assert (out == 0).all() and (remainder == 1).all()
    out.sum().backward()
    assert q.grad is not None and (q.grad == 0).all()


def test_packed_sequences_equal_separate_ones() -> None:
    lengths = [3, 0, 4]
    q = torch.randn(7, 2, 4, dtype=torch.float64)
    bounds = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    out, remainder = ref.stick_attention(q, q, q, cu_seqlens_q=bounds, return_remainder=True)
    start = 0
    for n in lengths:
        part = q[None, start : start + n]
        o, r = ref.stick_attention(part, part, part, return_remainder=True)
        assert torch.equal(out[start : start + n], o[0]) and torch.equal(remainder[start : start + n], r[0])
        start += n


def test_decode_reads_only_what_was_written() -> None:
    q = torch.randn(2, 2, 1, 2, 4, dtype=torch.float64)
    keys = torch.randn(2, 5, 1, 4, dtype=torch.float64)
    cache = torch.full((2, 9, 1, 4), torch.nan, dtype=torch.float64)
    cache[0, :5], cache[1, :3] = keys[0], keys[1, :3]
    out = ref.stick_attention_decode(q, cache, None, torch.tensor([5, 3], dtype=torch.int32))
    torch.testing.assert_close(out[:1], ref.stick_attention(q[:1], keys[:1]))
    torch.testing.assert_close(out[1:], ref.stick_attention(q[1:], keys[1:, :3]))


def test_stick_attention_gradcheck() -> None:
    q = torch.randn(1, 3, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 4, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: ref.stick_attention(q, k, return_remainder=True), (q, k))


def test_experts_match_loops() -> None:
    torch.manual_seed(0)
    t, e, k, d, f = 6, 4, 2, 3, 5
    x = torch.randn(t, d, dtype=torch.float64)
    up, down = torch.randn(e, d, 2 * f, dtype=torch.float64), torch.randn(e, f, d, dtype=torch.float64)
    route = ref.route_topk(torch.randn(t, e, dtype=torch.float64), k)
    layout = ref.expert_layout(route.expert_ids, e)
    y = ref.expert_ffn(x, (up[:1], up[1:]), down, layout, route.gates, activation="swiglu")
    mapped = ref.grouped_gemm(x, up, layout, out_order="slot")
    for i in range(t):
        expected = torch.zeros(d, dtype=torch.float64)
        for j in range(k):
            expert = int(route.expert_ids[i, j])
            h = x[i] @ up[expert]
            torch.testing.assert_close(mapped[i, j], h)
            expected += route.gates[i, j] * (torch.nn.functional.silu(h[:f]) * h[f:]) @ down[expert]
        torch.testing.assert_close(y[i], expected)


def test_layout_sorts_stably() -> None:
    ids = torch.tensor([[2, 0], [0, 2], [3, 0]], dtype=torch.int32)
    layout = ref.expert_layout(ids, 5)
    assert layout.counts.tolist() == [3, 0, 2, 1, 0]
    assert layout.offsets.tolist() == [0, 3, 3, 5, 6, 6]
    assert layout.slot_order.tolist() == [1, 2, 5, 0, 3, 4]
    assert layout.position[layout.slot_order.long()].tolist() == list(range(6))


@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax"])
def test_routing_breaks_ties_towards_the_lower_index(order: str) -> None:
    route = ref.route_topk(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), 3, order=order)
    assert route.expert_ids.tolist() == [[1, 2, 0]]
    gates = torch.tensor([[0.0, 1.0, 1.0, 0.0]] if order == "softmax_topk" else [[1.0, 1.0, 0.0]]).softmax(-1)
    torch.testing.assert_close(route.gates, gates[:, [1, 2, 0]] if order == "softmax_topk" else gates)


def test_sampled_experts_follow_the_best_ones() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).expand(20_000, 4)
    noise = torch.empty(20_000, 4).exponential_(generator=torch.Generator().manual_seed(0))
    route = ref.route_topk(probs.log(), 2, noise=noise, num_sampled=1)
    assert (route.expert_ids[:, 0] == 0).all() and (route.expert_ids[:, 1] != 0).all()
    frequency = torch.bincount(route.expert_ids[:, 1], minlength=4)[1:] / 20_000
    torch.testing.assert_close(frequency, torch.tensor([0.5, 0.3, 0.2]), atol=0.02, rtol=0)
    torch.testing.assert_close(route.gates, probs.gather(1, route.expert_ids.long()))


def test_losses_follow_from_the_sums() -> None:
    route = ref.route_topk(torch.randn(50, 6, dtype=torch.float64), 2)
    mean = route.prob_sum / 50
    entropy = -(mean * (mean + 1e-8).log()).sum()
    mutual = -(route.plogp_sum / 50 + entropy)
    torch.testing.assert_close(ref.losses.mutual_information_loss(route), mutual)
    torch.testing.assert_close(ref.losses.concentration_loss(route), entropy)
    switch = 6 * (mean * route.counts / 100).sum() + 0.1 * route.logsumexp_sq_sum / 50
    torch.testing.assert_close(ref.losses.switch_loss(route), switch)
