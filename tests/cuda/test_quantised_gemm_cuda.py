"""quantised_gemm's CUDA kernels, and the decode steps on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from devices import EMULATED
from layer_cases import attention_case, copied, ffn_case, quantised, widened
from routed import assert_as_accurate, layout_of, on, randn, random_layout, rows_shape

from moduleformer_ext import reference
from moduleformer_ext._extension import cuda_kernels
from moduleformer_ext.ops import attention_layer_decode, ffn_layer_decode, quantised_gemm
from moduleformer_ext.quantised import BITS, QuantisedMatrices, dequantise, quantise
from moduleformer_ext.types import ExpertLayout

if EMULATED:
    import cudasim

DTYPES = [torch.bfloat16, torch.float16]


def moved(weight: QuantisedMatrices, device: torch.device) -> QuantisedMatrices:
    return weight._replace(values=weight.values.to(device), scales=weight.scales.to(device))


def check(
    x: torch.Tensor, weight: QuantisedMatrices, layout: ExpertLayout, device: torch.device, **options
) -> torch.Tensor:
    """Against the dequantised matrices in float64, no worse than plain PyTorch's float32; twice the same bits."""
    wide = dequantise(weight)
    exact_options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    own_options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    own = moved(weight, device)
    y, again = (quantised_gemm(x.to(device), own, on(layout, device), **own_options) for _ in range(2))
    assert torch.equal(y, again)
    plain = reference.quantised_gemm(x, weight, layout, **options)
    exact = reference.grouped_gemm(x.double(), wide.double(), layout, **exact_options)
    assert_as_accurate("y", y.cpu(), plain, exact, x.dtype)
    return y


@pytest.mark.usefixtures("new_memory_is_nan")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("rows", "n", "m"),
    [
        (1, 64, 64),
        (3, 256, 136),
        (16, 1544, 64),
        (40, 328, 200),
        (90, 200, 264),
        (530, 72, 136),
        (5, 70, 130),
        (2, 1, 1),
    ],
)
def test_rows_of_one_expert(rows, n, m, bits, dtype, device):
    """Every tile, the ends of depth, groups and panels, rows that are not aligned, experts without rows."""
    torch.manual_seed(rows)
    layout = layout_of([[1]] * rows + [[3]], 4)
    check(randn(rows + 1, n, dtype=dtype), quantise(randn(4, n, m, scale=n**-0.5), bits), layout, device)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [3, 30])
@pytest.mark.parametrize("x_order", ["token", "slot", "expert"])
@pytest.mark.parametrize("out_order", ["token", "slot", "expert"])
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "swiglu"])
def test_every_order(activation, out_order, x_order, tokens, bits, device):
    torch.manual_seed(tokens)
    layout = random_layout(tokens, 3, 2)
    gates = torch.rand(tokens, 2) if out_order == "token" else None
    options = {"x_order": x_order, "out_order": out_order, "gates": gates, "activation": activation}
    x = randn(*rows_shape(x_order, layout, 48), dtype=torch.bfloat16)
    check(x, quantise(randn(3, 48, 256, scale=0.1), bits), layout, device, **options)


@pytest.mark.parametrize("bits", BITS)
def test_no_tokens_and_strides(bits, device):
    weight = moved(quantise(randn(2, 40, 64), bits), device)
    nothing = on(reference.expert_layout(torch.empty(0, 2, dtype=torch.int32), 2), device)
    assert quantised_gemm(torch.empty(0, 40, dtype=torch.float16, device=device), weight, nothing).shape == (0, 64)
    layout, x = on(random_layout(5, 2, 2), device), randn(5, 40, dtype=torch.float16).to(device)
    expected = quantised_gemm(x, weight, layout)
    for other in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, :40], x[:, None].expand(5, 2, 40)[:, 1]):
        assert torch.equal(quantised_gemm(other, weight, layout), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_exact(dtype, bits, device):
    """A row of x that is 1 in one place takes a row of the matrix out, at every place of a tile."""
    torch.manual_seed(0)
    weight = quantise(randn(1, 64, 128), bits)
    weight.scales.fill_(1.0)
    layout = on(layout_of([[0]] * 64, 1), device)
    y = quantised_gemm(torch.eye(64, dtype=dtype, device=device), moved(weight, device), layout)
    assert torch.equal(y.cpu(), dequantise(weight)[0].to(dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [3, 40])
def test_what_is_not_finite_stays_in_its_row(rows, bits, device):
    x, layout = randn(rows, 72, dtype=torch.bfloat16).to(device), on(layout_of([[0]] * rows, 1), device)
    weight = moved(quantise(randn(1, 72, 136), bits), device)
    expected = quantised_gemm(x, weight, layout)
    x[1, 5] = torch.nan
    y = quantised_gemm(x, weight, layout)
    assert y[1].isnan().all()
    others = [row for row in range(rows) if row != 1]
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [1, 3])
def test_decode_steps(new, dtype, bits, device):
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-3  # 16-bit results are rounded to half a unit of the last place
    for op, twin, case in (
        (attention_layer_decode, reference.attention_layer_decode, attention_case),
        (ffn_layer_decode, reference.ffn_layer_decode, ffn_case),
    ):
        arguments = quantised(case(dtype=dtype, new=new), bits)
        y, expected = op(**copied(arguments, device)).cpu(), twin(**widened(arguments))
        assert (y.double() - expected).norm() <= bound * expected.norm()
        assert torch.equal(op(**copied(arguments, device)).cpu(), y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x.float(), w), "x must be bfloat16 or float16 beside quantised matrices on CUDA, got Float"),
        (
            lambda x, w: (x, w._replace(values=shifted(w.values))),
            "weight.values must begin at a multiple of 16 bytes on CUDA, got 1 bytes beyond one",
        ),
        (
            lambda x, w: (x, w._replace(scales=shifted(w.scales))),
            "weight.scales must begin at a multiple of 16 bytes on CUDA, got 4 bytes beyond one",
        ),
    ],
)
def test_errors(change, message, device):
    x, weight = change(
        torch.ones(5, 40, dtype=torch.bfloat16, device=device), moved(quantise(torch.ones(3, 40, 50), 8), device)
    )
    with pytest.raises(ValueError, match=f"^quantised_gemm: {message}"):
        quantised_gemm(x, weight, on(random_layout(5, 3, 2), device))


def shifted(part: torch.Tensor) -> torch.Tensor:
    """The same one element further on in memory."""
    memory = part.new_empty(part.numel() + 1)
    return memory[1:].view(part.shape).copy_(part)


@pytest.mark.parametrize("bits", BITS)
def test_float32_is_refused_before_a_cache_is_written(bits, device):
    arguments = copied(quantised(attention_case(dtype=torch.float32), bits), device)
    before = arguments["k_cache"].clone()
    with pytest.raises(ValueError, match=r"^attention_layer_decode: x must be bfloat16 or float16"):
        attention_layer_decode(**arguments)
    assert torch.equal(arguments["k_cache"].nan_to_num(), before.nan_to_num())


emulated = pytest.mark.skipif(not EMULATED, reason="needs the emulated device")


@emulated
@pytest.mark.parametrize("bits", BITS)
def test_decoding_reads_each_byte_once(bits, device):
    layout, weight = random_layout(1, 8, 2), quantise(randn(8, 512, 512), bits)
    x = randn(1, 512, dtype=torch.bfloat16)
    cudasim.reset_stats()
    quantised_gemm(x, weight, layout, out_order="slot")
    (s,) = cudasim.stats()
    assert "_16x64_" in s["kernel"]
    matrices = 2 * (weight.values[0].nbytes + (weight.scales[0].nbytes if bits == 4 else 0))
    rows_of_x = 2 * 512 // 64 * x.nbytes  # once for each tile of 64 columns, from the cache
    assert s["cp_async_bytes"] == matrices + rows_of_x
    assert s["cp_async_bytes"] <= 1.06 * matrices
    assert s["shared_excess_wavefronts"] == 0


@emulated
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("slots", "tile"), [(256, "_64x128_"), (1024, "_128x128_")])
def test_more_rows_meet_no_bank_conflict(slots, tile, bits, device):
    layout, weight = random_layout(slots // 2, 8, 2), quantise(randn(8, 128, 256), bits)
    cudasim.reset_stats()
    quantised_gemm(randn(slots // 2, 128, dtype=torch.bfloat16), weight, layout, out_order="slot")
    (s,) = cudasim.stats()
    assert tile in s["kernel"]
    assert s["mma_flops"] <= 1.3 * 2 * slots * 128 * 256
    assert s["shared_excess_wavefronts"] == 0


def works(weight: QuantisedMatrices, layout: ExpertLayout, x: torch.Tensor) -> Callable[[], bool]:
    expected = reference.quantised_gemm(x, weight, layout).float()
    return lambda: bool((quantised_gemm(x, weight, layout).float() - expected).norm() <= 0.02 * expected.norm())


@emulated
@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize("bits", BITS)
def test_no_barrier_or_wait_is_left_out_in_silence(bits, device, capfd):
    """Several tiles for a block, and more slices of depth than stages."""
    torch.manual_seed(1)
    layout = layout_of([[0]] * 20 + [[1]] * 7, 3)
    run = works(quantise(randn(3, 1000, 640), bits), layout, randn(27, 1000, dtype=torch.bfloat16))
    assert run()
    kernel = f"quantised_{bits}_bf16_16x64_sm80"
    for opcode in ("bar.sync", "cp.async.wait_group"):
        tried = 0
        for index in range(cudasim.count_instructions(kernel, opcode)):
            try:
                with cudasim.dropped(kernel, opcode, index) as instruction:
                    caught = not run()
            except RuntimeError:
                caught = True
            tried += bool(instruction.reached)
            assert caught or not instruction.reached, f"{opcode} number {index} may be left out"
        assert tried, opcode
    capfd.readouterr()
    assert run()


@emulated
def test_kernels_are_listed(device):
    names = [name for op, name, _ in cuda_kernels() if op == "quantised_gemm"]
    assert len(names) == len(set(names)) == 16
