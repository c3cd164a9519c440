"""attention_layer_decode and ffn_layer_decode: the reference, the ops that they stand for, the caches, refusals."""

import pytest
import torch
import torch.nn.functional as F
from devices import on_cuda
from layer_cases import (
    DTYPES,
    EXPERTS,
    FEATURES,
    GATES,
    MATRICES,
    attention_case,
    changed,
    copied,
    ffn_case,
    quantised,
    widened,
)

from moduleformer_ext import ops, reference
from moduleformer_ext.ops import attention_layer_decode, ffn_layer_decode
from moduleformer_ext.ops._layer_decode import expert_weight
from moduleformer_ext.quantised import BITS, quantise
from moduleformer_ext.types import RouteTopK

# By norm: float32 to accumulated rounding; 16-bit results, and what the norm passes on, are rounded to half a unit of
# the last place.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype
    assert (actual.cpu().double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def rows_of(cache, lengths):
    """The keys or values that are written, of all sequences."""
    return torch.cat([cache[b, :length] for b, length in enumerate(lengths.tolist())])


def check_attention(device, arguments, **options):
    dtype = arguments["x"].dtype
    actual, wide = copied(arguments, device), widened(arguments)
    mask = options.pop("key_padding_mask", None)
    y, route = attention_layer_decode(
        **actual, key_padding_mask=None if mask is None else mask.to(device), return_route=True, **options
    )
    expected, expected_route = reference.attention_layer_decode(
        **wide, key_padding_mask=mask, return_route=True, **options
    )
    assert torch.equal(route.expert_ids.cpu(), expected_route.expert_ids)
    assert torch.equal(route.counts.cpu(), expected_route.counts)
    assert_close(y, expected, dtype)
    lengths = actual["cache_lengths"].cpu()
    assert torch.equal(lengths, wide["cache_lengths"])
    for name in ("k_cache", "v_cache"):
        if actual[name] is None:
            continue
        cache = actual[name].cpu()
        assert_close(rows_of(cache, lengths), rows_of(wide[name], lengths), dtype)
        assert torch.equal(
            rows_of(cache, arguments["cache_lengths"]), rows_of(arguments[name], arguments["cache_lengths"])
        )
        assert all(cache[b, length:].isnan().all() for b, length in enumerate(lengths.tolist()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax", "sigmoid_topk_renormalised"])
def test_attention_against_the_oracle(dtype, gate, order, device):
    check_attention(device, attention_case(dtype=dtype, gate=gate, order=order))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "heads": 1, "head_dim": FEATURES, "shared": True},
        {"batch": 3, "new": 4, "heads": 4, "head_dim": 8, "shared": True, "gate": "linear"},
        {"new": 16, "heads": 1, "head_dim": 24, "k": 1},
        {"new": 3, "lengths": [0, 0]},
        {"new": 2, "bias": False, "lengths": [30, 0], "k": EXPERTS},
        {"batch": 1, "cache": 300, "lengths": [290], "head_dim": 40},
        {"segments": 3, "gate": "linear"},
        {"batch": 9},
        {"cache": 10, "lengths": [9, 4]},
    ],
    ids=str,
)
def test_attention_of_other_shapes(sizes, dtype, device):
    check_attention(device, attention_case(dtype=dtype, **sizes))


def test_empty(device):
    for sizes in ({"batch": 0}, {"new": 0}):
        arguments = copied(attention_case(**sizes), device)
        y, route = attention_layer_decode(**arguments, return_route=True)
        assert y.shape == arguments["x"].shape
        assert route.gates.shape == (0, 2) and not route.counts.any()
        arguments = copied(ffn_case(**sizes), device)
        assert ffn_layer_decode(**arguments).shape == arguments["x"].shape


def test_padding_and_epsilon(device):
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    check_attention(device, attention_case(new=2), key_padding_mask=mask)
    check_attention(device, attention_case(new=2), key_padding_mask=mask, stick_epsilon=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("activation", "segments"), [("gelu_tanh", 1), ("swiglu", 2)])
def test_ffn_against_the_oracle(dtype, gate, activation, segments, device):
    for new in (1, 5):
        arguments = ffn_case(dtype=dtype, gate=gate, activation=activation, segments=segments, new=new)
        y, route = ffn_layer_decode(**copied(arguments, device), return_route=True)
        expected, expected_route = reference.ffn_layer_decode(**widened(arguments), return_route=True)
        assert torch.equal(route.expert_ids.cpu(), expected_route.expert_ids)
        assert_close(y, expected, dtype)


def test_twins_agree():
    arguments = attention_case()
    y, expected = attention_layer_decode(**copied(arguments)), reference.attention_layer_decode(**copied(arguments))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ffn_layer_decode(**ffn_case()), reference.ffn_layer_decode(**ffn_case()))


def routed(arguments):
    """Normed tokens [T, D], their route and layout, by the ops one by one."""
    router = arguments["router"]
    normed = F.layer_norm(arguments["x"], (FEATURES,), router.norm_weight, router.norm_bias, router.norm_epsilon)
    tokens = normed.flatten(0, 1)
    hidden = [part for part in (router.hidden_weight, router.hidden_bias) if part is not None]
    gate = ops.route_topk_mlp if router.gate == "mlp" else ops.route_topk_linear
    route = gate(tokens, *hidden, router.gate_weight, router.k, order=router.order)
    return normed, tokens, route, ops.expert_layout(route.expert_ids, EXPERTS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["linear", "mlp"])
@pytest.mark.parametrize("bits", [None, *BITS])
def test_the_bits_of_the_ops_one_by_one(dtype, gate, bits, device, set_threads):
    if bits is not None and dtype == torch.float64:
        pytest.skip("quantised matrices have float32 sums")
    if on_cuda(device):
        pytest.skip("a CPU's keys are linear_decode's")
    arguments, ffn = attention_case(dtype=dtype, gate=gate, new=3), ffn_case(dtype=dtype, gate=gate, new=3)
    product = ops.grouped_gemm
    if bits is not None:
        arguments, ffn = quantised(arguments, bits), quantised(ffn, bits)
        product = ops.quantised_gemm
    normed, tokens, route, layout = routed(arguments)
    lengths = arguments["cache_lengths"] + 3
    caches = {name: arguments[f"{name}_cache"].clone() for name in "kv"}
    for name, cache in caches.items():
        new = ops.linear_decode(normed, arguments[f"{name}_weight"], arguments[f"{name}_bias"])
        for b, length in enumerate(lengths.tolist()):
            cache[b, length - 3 : length] = new[b].view(3, 2, 16)
    q = product(tokens, arguments["query_weight"], layout, out_order="slot")
    q = q.view(2, 3, 2, 2, 16).transpose(2, 3)
    attended = ops.stick_attention_decode(q, caches["k"], caches["v"], lengths).transpose(2, 3).reshape(6, 2, 32)
    expected = arguments["x"] + product(
        attended, arguments["output_weight"], layout, x_order="slot", out_order="token", gates=route.gates
    ).view(2, 3, FEATURES)

    _, tokens, ffn_route, layout = routed(ffn)
    if bits is None:
        transformed = ops.expert_ffn(tokens, ffn["up"], ffn["down"], layout, ffn_route.gates)
    else:
        hidden = product(tokens, ffn["up"], layout, activation="gelu_tanh")
        transformed = product(hidden, ffn["down"], layout, x_order="expert", out_order="token", gates=ffn_route.gates)
    ffn_expected = ffn["x"] + transformed.view(2, 3, FEATURES)
    for threads in (1, 2, 3):
        set_threads(threads)
        changed = copied(arguments)
        y, found = attention_layer_decode(**changed, return_route=True)
        assert torch.equal(y, expected)
        assert all(torch.equal(a, b) for a, b in zip(found, route, strict=True))
        assert all(torch.equal(changed[f"{n}_cache"].nan_to_num(), cache.nan_to_num()) for n, cache in caches.items())
        y, found = ffn_layer_decode(**ffn, return_route=True)
        assert torch.equal(y, ffn_expected)
        assert all(torch.equal(a, b) for a, b in zip(found, ffn_route, strict=True))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_against_the_oracle(bits, dtype):
    check_attention("cpu", quantised(attention_case(dtype=dtype, new=2), bits))
    check_attention("cpu", quantised(attention_case(dtype=dtype, new=1, heads=3, head_dim=24), bits))
    for new in (1, 8):
        arguments = quantised(ffn_case(dtype=dtype, new=new), bits)
        assert_close(ffn_layer_decode(**arguments), reference.ffn_layer_decode(**widened(arguments)), dtype)
    for name in ("query_weight", "output_weight"):
        check_attention("cpu", quantised(attention_case(dtype=dtype), bits, [name]))
    for name in ("up", "down"):
        mixed = quantised(ffn_case(dtype=dtype, new=8), bits, [name])
        assert_close(ffn_layer_decode(**mixed), reference.ffn_layer_decode(**widened(mixed)), dtype)


@pytest.mark.parametrize("bits", BITS)
def test_quantised_and_gated(bits):
    matrices = {
        "up": quantise(torch.randn(EXPERTS, FEATURES, 128, generator=torch.Generator().manual_seed(1)), bits),
        "down": quantise(torch.randn(EXPERTS, 64, FEATURES, generator=torch.Generator().manual_seed(2)), bits),
    }
    arguments = {**ffn_case(new=3, activation="swiglu"), **matrices}
    assert_close(ffn_layer_decode(**arguments), reference.ffn_layer_decode(**widened(arguments)), torch.float32)


def test_without_the_route(device):
    arguments = attention_case()
    y, route = attention_layer_decode(**copied(arguments, device), return_route=True)
    assert isinstance(route, RouteTopK)
    assert torch.equal(attention_layer_decode(**copied(arguments, device)), y)
    arguments = copied(ffn_case(), device)
    assert torch.equal(ffn_layer_decode(**arguments), ffn_layer_decode(**arguments, return_route=True)[0])


def test_strides(device):
    """Of x, of the caches (heads first, as transformers keep them) and of matrices stored as their transposes."""
    arguments = copied(attention_case(new=2), device)
    expected = attention_layer_decode(**copied(arguments, device))
    arguments["x"] = arguments["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attention_layer_decode(**arguments), expected)
    arguments["query_weight"] = arguments["query_weight"].transpose(1, 2).contiguous().transpose(1, 2)
    arguments["cache_lengths"] -= 2
    torch.testing.assert_close(attention_layer_decode(**arguments), expected)


@pytest.mark.parametrize("lengths", [[3, 39], [-1, 3], [3, 41]])
def test_tokens_that_do_not_fit_write_nothing(lengths, device):
    if on_cuda(device):
        pytest.skip("on a GPU lengths are not read")
    arguments = attention_case(new=2)
    arguments["cache_lengths"] = torch.tensor(lengths, dtype=torch.int32)
    changed = copied(arguments)
    with pytest.raises(ValueError, match=r"cache_lengths must leave room for 2 tokens in k_cache's 40, got "):
        attention_layer_decode(**changed)
    for name in ("k_cache", "v_cache", "cache_lengths"):
        assert torch.equal(changed[name].nan_to_num(), arguments[name].nan_to_num())


def test_tokens_that_do_not_fit_on_a_gpu(device):
    if not on_cuda(device):
        pytest.skip("a CPU says so")
    arguments = copied(attention_case(new=1, lengths=[40, 3]), device)
    attention_layer_decode(**arguments)
    assert arguments["cache_lengths"].tolist() == [41, 4]
    assert arguments["k_cache"][0].isfinite().all()


OP = torch.ops.moduleformer_ext


def raw(arguments, *rest):
    """Positional arguments of the raw op."""
    flat = {"x": arguments["x"], **arguments["router"]._asdict(), **arguments}
    del flat["router"]
    values = []
    for name, value in flat.items():
        if name in MATRICES:
            values += expert_weight("raw", name, value)
        else:
            values.append([value] if name == "gate_weight" and torch.is_tensor(value) else value)
    return values + list(rest)


@pytest.mark.parametrize("overload", ["default", "with_route"])
def test_traced(overload):
    finite, shared = attention_case(), attention_case(shared=True, gate="linear")
    for arguments in (finite, shared):
        arguments["k_cache"] = arguments["k_cache"].nan_to_num()
    finite["v_cache"] = finite["v_cache"].nan_to_num()
    with torch.no_grad():
        torch.library.opcheck(getattr(OP.attention_layer_decode, overload), raw(finite, None, None))
        torch.library.opcheck(getattr(OP.attention_layer_decode, overload), raw(shared, None, 0.0))
        torch.library.opcheck(getattr(OP.ffn_layer_decode, overload), raw(ffn_case()))
        torch.library.opcheck(getattr(OP.attention_layer_decode, overload), raw(quantised(finite, 8), None, None))
        torch.library.opcheck(getattr(OP.ffn_layer_decode, overload), raw(quantised(ffn_case(), 4)))


def test_compiled():
    def block(x, attention, ffn):
        return ffn_layer_decode(attention_layer_decode(x, **attention), **ffn)

    attention, ffn = attention_case(), ffn_case()
    x = attention.pop("x")
    del ffn["x"]
    eager, compiled = copied(attention), copied(attention)
    with torch.no_grad():
        expected = block(x, eager, ffn)
        assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x, compiled, ffn), expected)
    assert torch.equal(compiled["cache_lengths"], eager["cache_lengths"])
    assert torch.equal(compiled["k_cache"].nan_to_num(), eager["k_cache"].nan_to_num())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, FEATURES)}, r"x must have 3 dimensions, got shape \[2, 32\]"),
        ({"x": torch.ones(2, 1, FEATURES).int()}, "x must be float32, float64, bfloat16 or float16, got Int"),
        ({"gate": "logits"}, "gate must be 'linear', 'mlp' or 'gmm', got 'logits'"),
        ({"hidden_bias": None}, "hidden_bias must be given with the mlp gate alone, got none"),
        ({"gate_weight": torch.ones(5, 23)}, r"gate_weight must have G = 24 columns, got shape \[5, 23\]"),
        ({"k": 6}, r"k must be in \[1, 5\] \(the number of experts\), got 6"),
        (
            {"order": "top"},
            "order must be 'softmax_topk', 'topk_softmax', 'sigmoid_topk' or 'sigmoid_topk_renormalised', got 'top'",
        ),
        ({"norm_weight": torch.ones(31)}, r"norm_weight must have shape \[32\], got shape \[31\]"),
        ({"norm_bias": torch.ones(FEATURES).half()}, "norm_bias must be Float, got Half"),
        ({"router": ("mlp", None)}, "router must be a NormedRouter, got tuple"),
    ],
)
def test_errors_of_both(change, message):
    for function, arguments in ((attention_layer_decode, attention_case()), (ffn_layer_decode, ffn_case())):
        with pytest.raises(ValueError, match=f"^{function.__name__}: {message}"):
            function(**changed(arguments, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_weight": torch.ones(4, 32, 32)}, r"query_weight must have as many experts as the gate \(5\), got 4"),
        ({"query_weight": torch.ones(5, 32, 31)}, r"query_weight must have shape \[num_experts, 32, 32\] beside x and"),
        (
            {"output_weight": torch.ones(5, 32, 32).half()},
            r"output_weight must have the dtype of x \(Float\), got Half",
        ),
        ({"k_weight": None}, "v_weight must be given if and only if k_weight is, got one"),
        ({"k_weight": None, "v_weight": None}, "v_cache must be given if and only if k_weight is, got one"),
        (
            {"k_weight": None, "v_weight": None, "v_cache": None},
            "k_bias must be None without k_weight, got one",
        ),
        (
            {"k_weight": torch.ones(31, 32), "k_bias": None},
            "k_weight must have 32 rows, the features of all",
        ),
        ({"v_weight": torch.ones(32, 32).t()[:, ::1].T.t()}, "v_weight must be contiguous, got strides"),
        ({"v_bias": torch.ones(31)}, r"v_bias must be \[out\] with out = 32, got shape \[31\]"),
        ({"k_cache": torch.ones(2, 40, 32)}, "k_cache must have 4 dimensions"),
        ({"k_cache": torch.ones(1, 40, 2, 16)}, "k_cache must have x's batch size 2"),
        ({"k_cache": torch.ones(2, 40, 2, 12)}, "k_cache must have a head dim that is a multiple of 8"),
        ({"k_cache": torch.ones(2, 40, 2, 16).half()}, r"k_cache must have the dtype of x \(Float\), got Half"),
        ({"v_cache": torch.ones(2, 41, 2, 16)}, r"v_cache must have shape \[2, 40, 2, 16\], got shape"),
        ({"cache_lengths": torch.tensor([3, 4])}, "cache_lengths must be int32, got Long"),
        (
            {"cache_lengths": torch.ones(3).int()},
            "cache_lengths must be contiguous and hold one length for each of",
        ),
        ({"key_padding_mask": torch.ones(2, 39).bool()}, r"key_padding_mask must be \[B, S_max\] = \[2, 40\], got"),
        ({"stick_epsilon": 1.0}, r"stick_epsilon must lie in \[0, 1\), got 1"),
    ],
)
def test_errors_of_attention(change, message):
    with pytest.raises(ValueError, match=f"^attention_layer_decode: {message}"):
        attention_layer_decode(**changed(attention_case(), change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": torch.ones(5, 31, 40)}, r"x must have as many features as up has rows \(31\), got 32"),
        ({"down": torch.ones(5, 41, 32)}, r"down must have shape \[num_experts, 40, 32\] beside this up, got shape"),
        ({"down": torch.ones(6, 40, 32)}, r"down must have as many experts as the gate \(5\), got 6"),
        ({"activation": "tanh"}, "activation must be one of 'gelu_tanh'"),
    ],
)
def test_errors_of_ffn(change, message):
    with pytest.raises(ValueError, match=f"^ffn_layer_decode: {message}"):
        ffn_layer_decode(**changed(ffn_case(), change))


WEIGHT = quantise(torch.ones(EXPERTS, FEATURES, 40), 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": WEIGHT._replace(bits=3)}, "up.bits must be 8 or 4, got 3"),
        ({"up": WEIGHT._replace(in_features=31)}, r"up.values must have shape \[5, 1, 31, 64\], got shape"),
        ({"up": WEIGHT._replace(scales=WEIGHT.scales.half())}, "up.scales must be Float, got Half"),
        ({"up": quantise(torch.ones(4, FEATURES, 40), 8)}, r"up.values must have shape \[5, 1, 32, 64\], got shape"),
        ({"up": quantise(torch.ones(5, 31, 40), 8)}, r"x must have as many features as up has rows \(31\), got 32"),
        ({"down": WEIGHT}, r"down must have shape \[num_experts, 40, 32\] beside this up, got shape"),
        (
            {
                "up": quantise(torch.ones(EXPERTS, FEATURES, 80), 8),
                "down": quantise(torch.ones(EXPERTS, 40, FEATURES), 8),
                "activation": "swiglu",
            },
            "up.out_features must be a multiple of 128 for a gated activation, got 80",
        ),
    ],
)
def test_errors_of_quantised_experts(change, message):
    with pytest.raises(ValueError, match=f"^ffn_layer_decode: {message}"):
        ffn_layer_decode(**changed(ffn_case(), change))


def test_quantised_experts_of_another_kind():
    wide = {**ffn_case(dtype=torch.float64), "up": WEIGHT}
    with pytest.raises(ValueError, match=r"^ffn_layer_decode: x must be float32, bfloat16 or float16, got Double"):
        ffn_layer_decode(**wide)
    arguments = {**attention_case(), "query_weight": quantise(torch.ones(EXPERTS, FEATURES, 31), 4)}
    with pytest.raises(
        ValueError, match=r"query_weight must have shape \[num_experts, 32, 32\] beside x and k_cache, got"
    ):
        attention_layer_decode(**arguments)
    values = raw(ffn_case())
    place = next(i for i, value in enumerate(values) if value == [])
    for format in ([8], [8, 32, 40]):
        with pytest.raises(ValueError, match=r"^ffn_layer_decode: up must be numbers and scales beside bits, in_feat"):
            OP.ffn_layer_decode(*values[:place], format, *values[place + 1 :])


@pytest.mark.parametrize("name", ["up", "down"])
def test_gradients_of_scales_are_refused(name):
    arguments = quantised(ffn_case(), 8)
    wanting = arguments[name]._replace(scales=arguments[name].scales.clone().requires_grad_())
    with pytest.raises(ValueError, match=f"^ffn_layer_decode: {name} must not require grad"):
        ffn_layer_decode(**changed(arguments, {name: wanting}))


@pytest.mark.parametrize("function", [attention_layer_decode, ffn_layer_decode])
def test_gradients_are_refused(function):
    arguments = attention_case() if function is attention_layer_decode else ffn_case()
    named = {**arguments, **arguments["router"]._asdict()}
    for name, value in named.items():
        if torch.is_tensor(value) and value.is_floating_point():
            wanting = changed(arguments, {name: value.clone().requires_grad_()})
            with pytest.raises(ValueError, match=f"^{function.__name__}: {name} must not require grad"):
                function(**wanting)
            with torch.no_grad():
                function(**copied(wanting))
