"""blocks_decode: the bits of its two halves, the reference, the caches, what it refuses before it writes."""

import pytest
import torch
from devices import on_cuda
from layer_cases import DTYPES, GATES, assert_same_caches, by_halves, copied, stack_case, widened

from moduleformer_ext import reference
from moduleformer_ext.ops import blocks_decode
from moduleformer_ext.ops.blocks_decode import pack_blocks
from moduleformer_ext.quantised import BITS

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        *({"gate": gate} for gate in GATES),
        {"new": 3, "shared": True, "heads": 1, "head_dim": 32},
        {"segments": 2, "gate": "linear", "bias": False},
        {"layers": 1, "batch": 1},
        {"order": "sigmoid_topk", "k": 1, "lengths": [30, 0]},
    ],
    ids=str,
)
def test_the_bits_of_the_halves(options, dtype, device, set_threads):
    case = stack_case(dtype=dtype, **options)
    for threads in (1, 2):
        set_threads(threads)
        halves, whole = copied(case, device), copied(case, device)
        expected = by_halves(**halves)
        whole["blocks"] = pack_blocks(whole["blocks"])
        assert torch.equal(blocks_decode(**whole), expected)
        assert_same_caches(whole, halves)
        assert all(
            torch.equal(a, b + case["x"].shape[1])
            for a, b in zip(whole["cache_lengths"], copied(case, device)["cache_lengths"], strict=True)
        )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_quantised(dtype, bits):
    case = stack_case(dtype=dtype, bits=bits, new=2)
    halves, whole = copied(case), copied(case)
    assert torch.equal(blocks_decode(**whole), by_halves(**halves))
    assert_same_caches(whole, halves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_oracle(dtype, device):
    case = stack_case(dtype=dtype, layers=1)
    expected = reference.blocks_decode(**widened(case))
    actual = blocks_decode(**copied(case, device))
    assert actual.dtype == dtype
    assert (actual.cpu().double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_mask_and_epsilon(device):
    case = stack_case(new=2)
    mask = (torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.6).to(device)
    for epsilon in (None, 0.0, 0.3):
        options = {"key_padding_mask": mask, "stick_epsilon": epsilon}
        expected = by_halves(**copied(case, device), **options)
        assert torch.equal(blocks_decode(**copied(case, device), **options), expected)


def test_empty(device):
    for sizes in ({"batch": 0}, {"new": 0}):
        case = copied(stack_case(**sizes), device)
        assert blocks_decode(**case).shape == case["x"].shape


def test_packed_blocks_are_the_weights_themselves():
    case = stack_case(layers=2)
    packed = pack_blocks(case["blocks"])
    assert any(tensor is case["blocks"][1].down for tensor in packed.tensors)
    case["blocks"][1].down.mul_(2)
    assert torch.equal(blocks_decode(**{**copied(case), "blocks": packed}), by_halves(**copied(case)))


OP = torch.ops.moduleformer_ext.blocks_decode


def raw(case):
    return (case["x"], *pack_blocks(case["blocks"]), case["k_caches"], case["v_caches"] or [], case["cache_lengths"])


@pytest.mark.parametrize("options", [{}, {"shared": True, "head_dim": 16, "gate": "linear"}, {"bits": 4}], ids=str)
def test_traced(options):
    case = stack_case(layers=2, **options)
    for name in ("k_caches", "v_caches"):
        case[name] = case[name] and [cache.nan_to_num() for cache in case[name]]
    with torch.no_grad():
        torch.library.opcheck(OP.default, (*raw(case), None, None))


def test_compiled():
    case = stack_case(layers=2)
    packed = pack_blocks(case["blocks"])

    def step(x, k_caches, v_caches, lengths):
        return blocks_decode(x, packed, k_caches, v_caches, lengths)

    eager, compiled = copied(case), copied(case)
    with torch.no_grad():
        expected = blocks_decode(**eager)
        graph = torch.compile(step, fullgraph=True, backend="aot_eager")
        arguments = (compiled[name] for name in ("x", "k_caches", "v_caches", "cache_lengths"))
        assert torch.equal(graph(*arguments), expected)
    assert_same_caches(compiled, eager)


def refused(case, message):
    """With an error, before any cache is written."""
    before = copied(case)
    with pytest.raises(ValueError, match=message):
        blocks_decode(**case)
    assert_same_caches(case, before)


@pytest.mark.parametrize("lengths", [[3, 40], [-1, 3], [3, 2**31 - 1]])
def test_tokens_that_do_not_fit_write_nothing(lengths, device):
    if on_cuda(device):
        pytest.skip("on a GPU lengths are not read")
    case = stack_case()
    case["cache_lengths"][1] = torch.tensor(lengths, dtype=torch.int32)
    refused(case, r"^blocks_decode: block 1: cache_lengths must leave room for 1 tokens in k_cache's 40, got ")


def test_lengths_that_several_blocks_share(device):
    """They grow with every block: the last one has no room, which nobody may write beyond."""
    if on_cuda(device):
        pytest.skip("on a GPU lengths are not read")
    case = stack_case()
    case["cache_lengths"] = [torch.tensor([38, 3], dtype=torch.int32)] * 3
    with pytest.raises(ValueError, match=r"^blocks_decode: block 2: cache_lengths must leave room for 1 tokens"):
        blocks_decode(**case)


def test_wrong_blocks_are_refused_by_number():
    case = stack_case()
    last = case["blocks"][2]
    for change, message in (
        ({"down": torch.ones(5, 39, 32)}, "down must have"),
        ({"up": torch.ones(5, 32, 40).half()}, "up must have the dtype"),
        ({"query_weight": torch.ones(4, 32, 32)}, "query_weight must have"),
        ({"k_weight": None}, "v_weight must be given if and only if k_weight is"),
        ({"ffn_router": last.ffn_router._replace(norm_bias=torch.ones(31))}, r"norm_bias must have shape \[32\]"),
    ):
        blocks = [*case["blocks"][:2], last._replace(**change)]
        refused({**case, "blocks": blocks}, f"^blocks_decode: block 2: {message}")
    for name, part in (("k_caches", torch.ones(2, 40, 2, 24)), ("v_caches", torch.ones(2, 41, 2, 16))):
        refused({**case, name: [*case[name][:2], part]}, "^blocks_decode: block 2: ")


def test_wrong_lists_are_refused():
    case = stack_case()
    for change, message in (
        ({"k_caches": []}, "k_caches must be one for each of at least one block, got none"),
        ({"v_caches": case["v_caches"][:2]}, "v_caches must be one for each of 3 blocks, or none, got 2"),
        ({"cache_lengths": case["cache_lengths"][:1]}, "cache_lengths must be one for each of 3 blocks, got 1"),
        ({"blocks": case["blocks"][:2]}, "sizes must be 18 numbers for each of 3 blocks, got 36"),
        ({"blocks": []}, "blocks must be at least one, got none"),
        ({"blocks": [1]}, "blocks must be BlockWeights, got int at index 0"),
        (
            {"blocks": [case["blocks"][0]._replace(ffn_router=1)]},
            "ffn_router must be a NormedRouter, got int in block 0",
        ),
    ):
        refused({**case, **change}, f"^blocks_decode: {message}")
    packed = pack_blocks(case["blocks"])
    for change, message in (
        ({"sizes": [-1, *packed.sizes[1:]]}, "sizes must be numbers of tensors, got -1"),
        ({"sizes": [2**62] * 54}, "sizes must be numbers of tensors, got 4611686018427387904"),
        ({"tensors": packed.tensors[:-1]}, r"tensors must be as many as sizes add up to, \d+, got"),
        ({"formats": [8]}, "formats must be 12 numbers for each of 3 blocks, got 1"),
        ({"formats": [8, *packed.formats[1:]]}, "block 0: query_weight must be numbers and scales"),
        ({"sizes": [0, 2, *packed.sizes[2:]]}, "block 0: hidden_bias must be one tensor or none, got 2"),
    ):
        refused({**case, "blocks": packed._replace(**change)}, f"^blocks_decode: {message}")


@pytest.mark.parametrize("change", [{"k": 1}, {"order": "topk_softmax"}, {"norm_epsilon": 0.1}])
def test_blocks_that_differ_are_not_packed(change):
    blocks = stack_case()["blocks"]
    other = blocks[2].ffn_router._replace(**change)
    with pytest.raises(ValueError, match=r"^blocks_decode: blocks must have routers of one gate .* in block 2 beside"):
        pack_blocks([*blocks[:2], blocks[2]._replace(ffn_router=other)])
    with pytest.raises(ValueError, match=r"^blocks_decode: blocks must have routers of one gate .* in block 0 beside"):
        pack_blocks([block._replace(attention_router=block.attention_router._replace(order="?")) for block in blocks])


def test_gradients_are_refused():
    case = stack_case()
    case["blocks"][1].up.requires_grad_()
    refused(case, "^blocks_decode: block 1: up must not require grad")
    with torch.no_grad():
        blocks_decode(**case)
