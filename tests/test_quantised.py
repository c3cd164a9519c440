"""The format of quantised matrices."""

from __future__ import annotations

import pytest
import torch

from moduleformer_ext.quantised import BITS, QuantisedMatrices, dequantise, quantise


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(3, 70, 130), (1, 1, 1), (2, 32, 64), (2, 33, 65), (0, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_are_the_nearest(bits, shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    quantised, weight = quantise(weight, bits), weight.float()
    assert (quantised.num_experts, quantised.in_features, quantised.out_features) == shape
    back = dequantise(quantised)
    assert (back.dtype, back.shape) == (torch.float32, shape)
    if back.numel() == 0:
        return
    group = 32 if bits == 4 else shape[1]
    least, largest = (-8, 7) if bits == 4 else (-127, 127)
    scales = quantised.scales.float().repeat_interleave(group, dim=2)  # [E, panels, rows, 64]
    scales = scales.transpose(1, 2).flatten(2)[:, : shape[1], : shape[2]]
    numbers = (weight / scales).round().clamp(least, largest)
    torch.testing.assert_close(back, numbers * scales)


def test_memory_is_as_described():
    """A number at a place that the description names."""
    weight = torch.zeros(2, 70, 130)
    weight[1, 37, 71] = 1.0
    eight, four = quantise(weight, 8), quantise(weight, 4)
    assert eight.values.shape == (2, 3, 70, 64)
    assert eight.scales.shape == (2, 3, 1, 64)
    assert eight.values[1, 1, 37, 7] == 127
    assert eight.values.count_nonzero() == eight.scales.count_nonzero() == 1
    assert four.values.shape == (2, 3, 48, 64)
    assert four.scales.shape == (2, 3, 3, 64)
    assert four.scales[1, 1, 1, 7] < 0  # the largest number is at the end that reaches further
    assert four.values[1, 1, 18, 7] == 16 * -8 + 0 + 8  # row 37 = 2 * 18 + 1
    assert (four.values != 8).sum() == four.scales.count_nonzero() == 1
    assert torch.equal(dequantise(eight), weight)
    assert torch.equal(dequantise(four), weight)


def test_four_bits_take_the_best_scale():
    """Never worse than the plain rule, the largest number over 7, and better on the whole."""
    torch.manual_seed(0)
    weight = torch.randn(1, 32, 640)
    scale = weight.abs().amax(1, keepdim=True) / 7
    plain = (weight - (weight / scale).round() * scale).square().sum(1)
    ours = (weight - dequantise(quantise(weight, 4))).square().sum(1)
    assert (ours <= plain * 1.01).all()  # scales are rounded to float16
    assert ours.sum() < 0.85 * plain.sum()


def test_zeros_and_the_smallest_numbers():
    for bits in BITS:
        assert torch.equal(dequantise(quantise(torch.zeros(1, 40, 3), bits)), torch.zeros(1, 40, 3))
        tiny = dequantise(quantise(torch.full((1, 40, 3), 1e-30), bits))
        assert torch.isfinite(tiny).all()
        assert (tiny <= 1e-30 * (1 + 1e-2)).all()


def test_strides_do_not_matter():
    weight = torch.randn(2, 40, 70)
    for bits in BITS:
        expected = quantise(weight, bits)
        for other in (weight.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([weight, weight], -1)[..., 1]):
            assert all(torch.equal(a, b) for a, b in zip(quantise(other, bits)[:2], expected[:2], strict=True))


@pytest.mark.parametrize(
    ("weight", "bits", "message"),
    [
        (torch.ones(1, 2, 3), 3, "bits must be 8 or 4, got 3"),
        (torch.ones(2, 3), 8, r"weight must be \[E, in, out\].*got torch.float32 of shape \[2, 3\]"),
        (torch.ones(1, 0, 3), 8, r"at least one row and column, got torch.float32 of shape \[1, 0, 3\]"),
        (torch.ones(1, 2, 3, dtype=torch.int8), 8, "floating-point numbers.*got torch.int8"),
        (torch.full((1, 2, 3), torch.nan), 4, "weight must be finite, got NaN"),
        (torch.full((1, 2, 3), torch.inf), 8, "weight must be finite, got NaN or an infinite number"),
        (torch.full((1, 2, 3), -1e6), 4, "weight must be within ±458528 with 4 bits, got 1e"),
    ],
)
def test_errors(weight, bits, message):
    with pytest.raises(ValueError, match=f"^quantise: .*{message}"):
        quantise(weight, bits)


def test_it_is_a_tree():
    leaves, spec = torch.utils._pytree.tree_flatten(quantise(torch.ones(1, 2, 3), 8))
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), QuantisedMatrices)
