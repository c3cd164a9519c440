"""Arguments of raw operators that an honest caller does not come by: an error, or the right values, but no crash."""

import pytest
import torch

from moduleformer_ext import reference
from moduleformer_ext.ops import expert_layout, stick_attention, stick_attention_decode

RAW = torch.ops.moduleformer_ext


def router_backward(**changes):
    x, weight = torch.randn(5, 8), torch.randn(4, 8)
    route = RAW.route_topk_forward(
        x, "linear", None, None, [weight], 2, "softmax_topk", 1.0, None, 0, None, 1, 1, 2, True
    )
    arguments = {
        "grad_gates": torch.randn(5, 2),
        "grad_prob_sum": torch.randn(4),
        "grad_plogp_sum": torch.randn(()),
        "grad_logsumexp_sq_sum": torch.randn(()),
        "grad_logits": torch.randn(5, 4),
        "x": x,
        "gate": "linear",
        "hidden_weight": None,
        "hidden_bias": None,
        "weight": [weight],
        "order": "softmax_topk",
        "scale": 1.0,
        "expert_ids": route[1],
        "logits": route[6],
        "hidden": route[7],
        "wanted": [True, False, False, True],
    }
    return RAW.route_topk_backward(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"expert_ids": torch.full((5, 2), 2**30, dtype=torch.int32)},
            r"expert_ids must lie in \[0, E\), got 1073741824",
        ),
        (
            {"expert_ids": torch.full((5, 2), -1, dtype=torch.int32)},
            r"expert_ids must lie in \[0, E\), got -1 at index 0",
        ),
        ({"expert_ids": torch.zeros(5, 2, dtype=torch.uint8)}, "expert_ids must be Int, got Byte"),
        ({"expert_ids": torch.zeros(4, 2, dtype=torch.int32)}, r"expert_ids must have shape \[T, k\] with T = 5"),
        ({"expert_ids": torch.zeros(5, 5, dtype=torch.int32)}, r"k in \[1, 4\], got shape \[5, 5\]"),
        ({"logits": torch.empty(0)}, r"logits must have shape \[5, 4\], got shape \[0\]"),
        ({"logits": torch.randn(5, 4).double()}, "logits must be Float, got Double"),
        ({"hidden": torch.randn(5, 4)}, r"hidden must have shape \[0\], got shape \[5, 4\]"),
        ({"grad_gates": torch.randn(1)}, r"grad_gates must have shape \[5, 2\], got shape \[1\]"),
        ({"grad_prob_sum": torch.randn(3)}, r"grad_prob_sum must have shape \[4\]"),
        ({"grad_plogp_sum": torch.randn(1)}, r"grad_plogp_sum must have shape \[\]"),
        ({"grad_logsumexp_sq_sum": torch.randn(2)}, r"grad_logsumexp_sq_sum must have shape \[\]"),
        ({"grad_logits": torch.randn(4, 5)}, r"grad_logits must have shape \[5, 4\]"),
        (
            {"order": "first"},
            "order must be 'softmax_topk', 'topk_softmax', 'sigmoid_topk' or 'sigmoid_topk_renormalised', got 'first'",
        ),
        ({"wanted": [True]}, "wanted must have 4 flags, got 1"),
        (
            {"wanted": [True, True, False, True]},
            "wanted must be true for inputs that are there alone, got true for input 1",
        ),
    ],
)
def test_route_topk_backward(changes, message):
    with pytest.raises(ValueError, match=f"^route_topk_linear: .*{message}"):
        router_backward(**changes)


def attention_backward(dtype=torch.bfloat16, tokens=130, **changes):
    q, k, v = (torch.randn(2, tokens, 3, 16).to(dtype) for _ in range(3))
    options = None, True, None, None, None
    o, remainder, residual, first_tiles = RAW.stick_attention_forward(q, k, v, *options, None, True)
    arguments = {"o": o, "remainder": remainder, "residual": residual, "first_tiles": first_tiles}
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    return RAW.stick_attention_backward(o.sin(), None, q, k, v, *arguments.values(), *options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"first_tiles": lambda t: t.fill_(-1)},
            "first_tiles must be what the forward pass returned, got -1 at index 0",
        ),
        (
            {"first_tiles": lambda t: t.fill_(2**30)},
            "first_tiles must be what the forward pass returned, got 1073741824",
        ),
        ({"first_tiles": lambda t: t.long()}, "first_tiles must be Int, got Long"),
        ({"first_tiles": lambda t: t[:1]}, r"first_tiles must have shape \[2, 130, 3\], got shape \[1, 130, 3\]"),
        ({"remainder": lambda t: t.bfloat16()}, "remainder must be Float, got BFloat16"),
        ({"residual": lambda t: t[..., :8]}, r"residual must have shape \[2, 130, 3, 16\]"),
        ({"residual": lambda t: t.new_empty(0)}, r"residual must have shape \[2, 130, 3, 16\]"),
        ({"o": lambda t: t[:, :5]}, r"o must have shape \[2, 130, 3, 16\]"),
    ],
)
def test_stick_attention_backward(changes, message):
    with pytest.raises(ValueError, match=f"^stick_attention: .*{message}"):
        attention_backward(**changes)


@pytest.mark.parametrize("tile", [1, 3, 100])
def test_first_tiles_of_another_pass_do_no_harm(tile):
    for dtype in (torch.float32, torch.bfloat16):
        grads = attention_backward(dtype, first_tiles=lambda t: t.fill_(tile))
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_outputs_in_any_layout(dtype):
    def gapped(t):
        return torch.empty(*t.shape[:-1], 4096, dtype=t.dtype)[..., : t.shape[-1]].copy_(t)

    def turned(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    torch.manual_seed(0)
    plain = attention_backward(dtype, tokens=40)
    for change in (gapped, turned, lambda t: t.mT.contiguous().mT):
        for names in (["o"], ["residual"], ["o", "residual"]):
            if dtype == torch.float32 and "residual" in names:
                continue  # there is none
            torch.manual_seed(0)
            grads = attention_backward(dtype, tokens=40, **dict.fromkeys(names, change))
            assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))


@pytest.mark.parametrize("grouped", [False, True])
def test_queries_whose_dimensions_overlap(grouped):
    """empty_like puts another dimension than the last innermost for these."""
    memory = torch.randn(200)
    q = memory.as_strided((2, 3, 2, 8), (16, 1, 8, 1))
    q = q.unflatten(2, (2, 1)) if grouped else q
    k, v = torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    lengths = torch.tensor([9, 7], dtype=torch.int32)
    decoded = stick_attention_decode(q, k, v, lengths)
    torch.testing.assert_close(decoded, reference.stick_attention_decode(q.contiguous(), k, v, lengths))
    out = stick_attention(q, k, v)
    torch.testing.assert_close(out, reference.stick_attention(q.contiguous(), k, v))
    window = torch.randn(2, 10).unfold(1, 8, 1)[:, :, None]  # [2, 3, 1, 8]
    shared = stick_attention_decode(window, k[:, :, :1], None, lengths)
    torch.testing.assert_close(shared, reference.stick_attention_decode(window.clone(), k[:, :, :1], None, lengths))


@pytest.mark.parametrize("num_experts", [0, -1, 2**24 + 1, 2**31, 2**32, 2**62])
def test_numbers_of_experts_that_cannot_be(num_experts):
    with pytest.raises(ValueError, match=rf"^expert_layout: num_experts must be in \[1, 16777216\], got {num_experts}"):
        expert_layout(torch.zeros(2, 2, dtype=torch.int32), num_experts)


def test_many_experts_take_little_memory():
    layout = expert_layout(torch.randint(2**20, (2**17, 1)), 2**20)
    assert layout.offsets[-1] == 2**17
    assert torch.equal(layout.slot_order[layout.position.long()], torch.arange(2**17, dtype=torch.int32))
