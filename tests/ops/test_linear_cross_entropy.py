"""linear_cross_entropy against torch's cross_entropy of logits that exist, in float64."""

import math
import platform

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import run_with

from moduleformer_ext import reference
from moduleformer_ext.ops import linear_cross_entropy

OP = torch.ops.moduleformer_ext
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
# Of the largest element: accumulated rounding, or some units of the last place where products are rounded.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def inputs(*leading, features=12, classes=37, dtype=torch.float32, ignored=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, features, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(classes, features, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(classes, leading, generator=generator)
    return x, weight, target.masked_fill(torch.rand(leading, generator=generator) < ignored, -100)


def plain(x, weight, target, *, ignore_index=-100, reduction="mean", z_loss=0.0):
    """Written out with torch's own losses."""
    logits = F.linear(x, weight).flatten(0, -2)
    rows = F.cross_entropy(logits, target.flatten(), reduction="none", ignore_index=ignore_index)
    counted = target.flatten() != ignore_index
    rows = rows + z_loss * logits.logsumexp(-1).square() * counted
    if reduction == "none":
        return rows.view(target.shape)
    return rows.sum() / counted.sum() if reduction == "mean" else rows.sum()


def gradients(function, x, weight, target, factor=None, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    loss = function(*leaves, target, **options)
    factor = torch.ones_like(loss) if factor is None else factor.to(loss.dtype)
    return loss, *torch.autograd.grad(loss, leaves, factor)


def assert_near(ours, expected, dtype):
    for result, oracle in zip(ours, expected, strict=True):
        assert result.shape == oracle.shape
        error = (result.double() - oracle).abs().max() / oracle.abs().max().clamp_min(1e-30)
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 30, 130])
def test_against_the_oracle(dtype, reduction, z_loss, rows):
    """130 rows of 2^16 classes and 12 features are several chunks."""
    classes = 2**16 + 1 if rows == 130 else 37
    x, weight, target = inputs(rows, classes=classes, dtype=dtype, ignored=0 if rows == 1 else 0.2)
    # Of a mean over many rows and classes float16 holds gradients only if a scale is in them.
    scale = 2.0**7 if dtype == torch.float16 and reduction == "mean" else 1.0
    generator = torch.Generator().manual_seed(1)
    factor = scale * (torch.rand(rows if reduction == "none" else (), generator=generator) + 0.5)
    options = {"reduction": reduction, "z_loss": z_loss}
    ours = gradients(linear_cross_entropy, x, weight, target, factor, **options)
    oracle = gradients(plain, x.double(), weight.double(), target, factor, **options)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [g.dtype for g in ours[1:]] == [dtype, dtype]
    assert_near(ours, oracle, dtype)
    twin = gradients(reference.linear_cross_entropy, x, weight, target, factor, **options)
    assert_near(twin, oracle, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_less_exact_than_with_whole_logits(dtype):
    x, weight, target = inputs(200, features=64, classes=2**15, dtype=dtype)
    oracle = gradients(plain, x.double(), weight.double(), target)

    def errors(results):
        return [(a.double() - b).norm() / b.norm() for a, b in zip(results, oracle, strict=True)]

    whole = errors(gradients(reference.linear_cross_entropy, x, weight, target))
    ours = errors(gradients(linear_cross_entropy, x, weight, target))
    assert all(a <= 1.2 * b + 1e-7 for a, b in zip(ours, whole, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    x, weight, target = inputs(2, 3, dtype=torch.float64)

    def loss(x, weight):
        return linear_cross_entropy(x, weight, target, reduction=reduction, z_loss=0.1)

    leaves = [t.requires_grad_() for t in (x, weight)]
    assert torch.autograd.gradcheck(loss, leaves)
    for i in range(2):  # one of them alone
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate((x, weight))]
        assert torch.autograd.gradcheck(loss, alone)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(reduction, dtype):
    x, weight, target = inputs(2, 5, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, weight)]
    torch.library.opcheck(OP.linear_cross_entropy.default, (*leaves, target, -100, reduction, 0.1))
    with torch.no_grad():
        forward = (*leaves, target, -100, reduction, 0.1)
        torch.library.opcheck(OP.linear_cross_entropy_forward.default, (*forward, True, True))
        loss, *saved = OP.linear_cross_entropy_forward(*forward, True, True)
        torch.library.opcheck(
            OP.linear_cross_entropy_backward.default, (torch.rand_like(loss), *forward, *saved, True, True)
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph(backend, reduction, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def loss(x, weight, target):
        return 2 * linear_cross_entropy(x * 2, weight, target, reduction=reduction)

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for rows in (7, 12):
        x, weight, target = inputs(rows)
        for ours, eager in zip(gradients(compiled, x, weight, target), gradients(loss, x, weight, target), strict=True):
            torch.testing.assert_close(ours, eager)


def test_meta_tensors_tell_the_layout():
    x, weight, target = inputs(2, 3)
    for reduction in REDUCTIONS:
        args = (target, -100, reduction, 0.0, True, True)
        real = OP.linear_cross_entropy_forward(x, weight, *args)
        meta = OP.linear_cross_entropy_forward(x.to("meta"), weight.to("meta"), target.to("meta"), *args[1:])
        for a, b in zip(real, meta, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_autocast_rounds_products_and_keeps_the_loss():
    x, weight, target = inputs(20, features=32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(linear_cross_entropy, x, weight, target)
    narrow = gradients(linear_cross_entropy, x.bfloat16(), weight.bfloat16(), target)
    assert ours[0].dtype == torch.float32 and torch.equal(ours[0], narrow[0])
    for wide, short in zip(ours[1:], narrow[1:], strict=True):
        assert wide.dtype == torch.float32 and torch.equal(wide, short.float())


def test_strides_and_leading_dimensions():
    x, weight, target = inputs(4, 6)
    expected = gradients(linear_cross_entropy, x.reshape(24, 12), weight, target.reshape(24))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    turned = weight.t().contiguous().t()
    ours = gradients(linear_cross_entropy, strided, turned, target.t().contiguous().t())
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b)
    one = linear_cross_entropy(x[0, 0], weight, target[0, 0].clamp_min(0))
    torch.testing.assert_close(one, F.cross_entropy(weight @ x[0, 0], target[0, 0].clamp_min(0)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows_and_none_that_count(reduction):
    for rows in (0, 3):
        x, weight, target = inputs(rows)
        loss, *grads = gradients(linear_cross_entropy, x, weight, target.fill_(-100), reduction=reduction)
        if reduction == "mean":
            assert loss.isnan()
        else:
            assert not loss.any()
            assert not any(g.any() for g in grads)


def test_other_index_to_ignore():
    x, weight, target = inputs(9, ignored=0)
    for index in (3, 255):
        target[2:4] = index
        ours = gradients(linear_cross_entropy, x, weight, target, ignore_index=index)
        assert_near(ours, gradients(plain, x.double(), weight.double(), target, ignore_index=index), torch.float32)


def test_large_logits_stay_finite():
    x, weight, target = inputs(9)
    ours = gradients(linear_cross_entropy, x * 1e4, weight, target, z_loss=1e-4)
    assert all(t.isfinite().all() for t in ours)
    assert_near(ours, gradients(plain, x.double() * 1e4, weight.double(), target, z_loss=1e-4), torch.float32)


def test_values_that_are_not_finite_are_not_hidden():
    x, weight, target = inputs(3, ignored=0)
    x[1, 0] = torch.nan
    rows = linear_cross_entropy(x, weight, target, reduction="none")
    assert rows.isnan().tolist() == [False, True, False]


@pytest.mark.usefixtures("new_memory_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time_and_nothing_left_out(dtype):
    x, weight, target = inputs(50, classes=2**17, features=8, dtype=dtype)
    first = gradients(linear_cross_entropy, x, weight, target)
    assert all(t.isfinite().all() for t in first)
    for _ in range(2):
        again = gradients(linear_cross_entropy, x, weight, target)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_backward_again_and_with_another_factor():
    x, weight, target = (*(t.requires_grad_() for t in inputs(9)[:2]), inputs(9)[2])
    loss = linear_cross_entropy(x, weight, target)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    third = torch.autograd.grad(loss, (x, weight), torch.tensor(3.0), retain_graph=True)
    again = torch.autograd.grad(loss, (x, weight))
    for a, b, c, kept_one in zip(first, third, again, kept, strict=True):
        assert torch.equal(a, kept_one) and torch.equal(c, kept_one)
        torch.testing.assert_close(b, 3 * kept_one)


def test_gradients_accumulate():
    x, weight, target = inputs(9)
    weight.requires_grad_()
    for _ in range(2):
        linear_cross_entropy(x, weight, target).backward()
    _, _, once = gradients(linear_cross_entropy, x, weight, target)
    torch.testing.assert_close(weight.grad, 2 * once)


def test_a_scaled_loss_of_float16_keeps_small_gradients():
    """A mean over many rows: each gradient is below what float16 holds, unless the scale is in it."""
    x, weight, target = inputs(3000, classes=50, dtype=torch.float16, ignored=0)
    x, weight = x / 8, weight / 8
    scale = torch.tensor(2.0**12)
    ours = gradients(linear_cross_entropy, x, weight, target, scale)
    assert_near(ours, gradients(plain, x.double(), weight.double(), target, scale), torch.float16)


def test_logits_are_never_whole():
    """The largest block that is allocated, by the profiler's count, is far below the logits."""
    x, weight, target = inputs(1024, features=16, classes=2**15)
    x.requires_grad_(), weight.requires_grad_()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear_cross_entropy(x, weight, target).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 2**23 < largest <= 2**24 + 2**20 < 1024 * 2**15 * 4 / 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(())}, r"x must be \[\.\.\., features\], got shape \[\]"),
        ({"x": torch.ones(3, 12, dtype=torch.int32)}, "x must be float32, float64, bfloat16 or float16, got Int"),
        ({"weight": torch.ones(12)}, r"weight must have 2 dimensions, got shape \[12\]"),
        ({"weight": torch.ones(37, 11)}, r"weight must be \[classes, features\] with features = 12.* \[37, 11\]"),
        ({"weight": torch.ones(0, 12)}, r"weight must have at least one class, got shape \[0, 12\]"),
        ({"weight": torch.ones(37, 12).half()}, r"weight must have the dtype of x \(Float\), got Half"),
        ({"weight": torch.ones(37, 12, device="meta")}, "weight must be on the device of x"),
        ({"target": torch.zeros(4, dtype=torch.long)}, r"target must have shape \[3\], got shape \[4\]"),
        ({"target": torch.zeros(3, dtype=torch.int32)}, "target must be Long, got Int"),
        ({"target": torch.tensor([0, 37, 1])}, r"target must lie in \[0, 37\) or be ignore_index = -100, got 37"),
        ({"target": torch.tensor([0, -1, 1])}, "target must lie in .*, got -1"),
        ({"reduction": "all"}, "reduction must be 'mean', 'sum' or 'none', got 'all'"),
        ({"z_loss": -1.0}, r"z_loss must be in \[0, 1e\+38\], got -1"),
        ({"z_loss": math.nan}, r"z_loss must be in \[0, 1e\+38\], got nan"),
        ({"z_loss": 2e38}, r"z_loss must be in \[0, 1e\+38\], got 2e\+38"),
    ],
)
def test_errors(change, message):
    arguments = dict(zip(("x", "weight", "target"), inputs(3), strict=True)) | change
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {message}"):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_ignored_rows_alone_are_zero(reduction, dtype):
    x, weight, target = inputs(4, ignored=1, dtype=dtype)
    loss, *ours = gradients(linear_cross_entropy, x, weight, target, reduction=reduction)
    expected = F.cross_entropy(F.linear(x, weight), target, reduction=reduction)
    torch.testing.assert_close(loss, expected.to(loss.dtype), equal_nan=True)
    assert not any(gradient.any() for gradient in ours)


IN_FLOAT32 = """
import torch
import test_linear_cross_entropy as t
from moduleformer_ext._extension import build_info

assert build_info()["slow_in_torch"].split() == ["bfloat16", "float16"]
for dtype in (torch.bfloat16, torch.float16):
    for reduction in t.REDUCTIONS:
        t.test_against_the_oracle(dtype, reduction, 0.3, 130)
        # Rounded nowhere but at the end: the numbers of float32.
        x, weight, target = t.inputs(300, dtype=dtype, features=64, classes=2**15)
        narrow = t.gradients(t.linear_cross_entropy, x, weight, target, reduction=reduction)
        wide = t.gradients(t.linear_cross_entropy, x.float(), weight.float(), target, reduction=reduction)
        assert torch.equal(narrow[0], wide[0])
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(narrow[1:], wide[1:]))
    t.test_opcheck("mean", dtype)
    x, weight, target = t.inputs(3, dtype=dtype)
    for leaf in (x, weight):  # one gradient alone
        t.linear_cross_entropy(*(a.detach().requires_grad_(a is leaf) for a in (x, weight)), target).backward()
t.test_no_less_exact_than_with_whole_logits(torch.bfloat16)
t.test_autocast_rounds_products_and_keeps_the_loss()
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="torch's products are taken as they are")
def test_in_float32_where_torch_multiplies_16_bits_slowly():
    run_with({"MFX_BRGEMM": "0"}, IN_FLOAT32)
