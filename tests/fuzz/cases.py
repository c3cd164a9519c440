"""Runs one fuzz case per seed, and says what is wrong with it.

As a program, ``cases.py FIRST LAST REPORT``, it is the child process of fuzz.py: it writes the current seed to REPORT,
so that fuzz.py can name it after a crash, and prints what is wrong.
"""

from __future__ import annotations

import os
import re
import resource
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mutations import LARGE, from_schema, mutate
from recipes import PUBLIC, Call, Maker, own_copy
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACE = "moduleformer_ext"
OPERATORS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::"))
MOST_MEMORY = 8 << 30
# By norm.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
ROUTING = ("route_topk", "attention_layer_decode", "blocks_decode", "ffn_layer_decode")
"""Ops that choose experts."""
UNCLEAR = re.compile(
    "bad_alloc|INTERNAL ASSERT|Allocator|out of memory|expected scalar type|vector::|stoi|overflow|negative dimension|"
    "not support(ed)? for|SymInt|optional",
    re.IGNORECASE,
)
# What never reaches an op.
TORCHS_OWN = re.compile("Expected a value of type|Could not run 'moduleformer_ext")
OURS = re.compile(r"^\w+: (block \d+: )?((layout|(query_|output_)?weight|up|down)\.)?\w+ (must|is) ", re.DOTALL)


class WrongError(AssertionError):
    """An op did what it must not."""


class Recorder(TorchDispatchMode):
    """Keeps the calls of this library's operators, with their arguments as they arrive below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            copies = pytree.tree_map_only(Tensor, lambda t: t.detach(), list(args))
            self.calls.append(Call(func.name(), func, copies, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


@contextmanager
def new_memory_is_nan(fill: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(fill)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def run(call: Call) -> list[Tensor]:
    """Results, and where they have one the gradient of their sum by every input that wants it."""
    results = tensors(call.function(*_arguments(call), **call.kwargs))
    wanted = [t for t in tensors((call.args, call.kwargs)) if t.requires_grad]
    recorded = [t for t in results if t.requires_grad]
    if not (wanted and recorded):
        return results
    gradients = torch.autograd.grad([t.double().sum() for t in recorded], wanted, allow_unused=True)
    return [*results, *(g for g in gradients if g is not None)]


def _arguments(call: Call) -> list[Any]:
    """Those of an operator, copies where it writes to them."""
    if not isinstance(call.function, torch._ops.OpOverload):
        return call.args
    written = [a.alias_info is not None and a.alias_info.is_write for a in call.function._schema.arguments]
    return [own_copy(arg) if writes else arg for arg, writes in zip(call.args, written, strict=False)]


def operator(name: str) -> torch._ops.OpOverload:
    """The operator of a name in OPERATORS."""
    packet, _, overload = name.split("::")[1].partition(".")
    return getattr(getattr(torch.ops.moduleformer_ext, packet), overload or "default")


def bits(t: Tensor) -> Any:
    described = t.shape, t.dtype, t.device
    if t.is_meta or t.numel() >= LARGE:
        return described
    copy = torch.empty(t.shape, dtype=t.dtype).copy_(t.detach())
    return *described, copy.view(-1).view(torch.uint8).numpy().tobytes()


def outcome(call: Call, fill: bool) -> Any:
    """The bits of the results, or the exception as text. Raises WrongError for one that tells nobody anything."""
    try:
        with new_memory_is_nan(fill), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [bits(t) for t in run(call)]
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
        if TORCHS_OWN.search(str(error)) or any(t.numel() >= LARGE for t in tensors((call.args, call.kwargs))):
            return text
        if UNCLEAR.search(str(error)) or (type(error) is ValueError and not OURS.match(str(error))):
            raise WrongError(f"unclear message: {text}") from error
        return text
    except Exception as error:
        raise WrongError(f"not an error of an op: {type(error).__name__}: {error}") from error


def check_any(call: Call) -> None:
    """A call that may be invalid: a clear error, or the same bits whatever was in memory before."""
    inputs = tensors((call.args, call.kwargs))
    before = [bits(t) for t in inputs]
    first, second = outcome(call, fill=True), outcome(call, fill=False)
    if first != second:
        raise WrongError(f"depends on memory that nobody wrote: {str(first)[:200]} against {str(second)[:200]}")
    if before != [bits(t) for t in inputs]:
        raise WrongError("an input was written to")
    mixed = len({t.device for t in inputs}) > 1
    if mixed and not isinstance(first, str) and call.name in OPERATORS:  # layout.counts is part of no operator
        raise WrongError("tensors on several devices were taken")


def check_valid(call: Call) -> None:
    """A valid call: as accurate as it should be, and meta tensors come out the same.

    Attention walks to the end, except in `check_early_exit`: what an early exit may leave out is no rounding.
    """
    check_any(call)
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))

    def outputs(function, change, requires_grad):
        copies = [change(t) if isinstance(t, Tensor) else t for t in leaves]
        wanted = [c for c in copies if isinstance(c, Tensor) and c.is_floating_point() and requires_grad]
        args, kwargs = pytree.tree_unflatten(copies, spec)
        for tensor in wanted:
            tensor.requires_grad_(call.differentiable)
        return tensors(function(*args, **kwargs)), wanted

    def own(t):
        return t.detach()

    def wide(t):
        return t.detach().double() if t.is_floating_point() else t

    with torch.no_grad():
        real, _ = outputs(call.function, lambda t: t, requires_grad=False)
        meta, _ = outputs(call.function, lambda t: t.to("meta"), requires_grad=False)
    layouts = [(t.shape, t.dtype) for t in real]
    if layouts != [(t.shape, t.dtype) for t in meta]:
        raise WrongError(f"meta tensors are told another shape or type: {meta} for {layouts}")

    # The twin in the call's own types says what rounding costs.
    if "stick_epsilon" in call.kwargs:
        epsilon, call.kwargs["stick_epsilon"] = call.kwargs["stick_epsilon"], 0.0
        check_early_exit(call, epsilon, real)
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    runs = [outputs(f, change, True) for f, change in ((call.function, own), (call.twin, own), (call.twin, wide))]
    results = [run[0] for run in runs]
    integers = [(ours, exact) for ours, _, exact in zip(*results, strict=True) if not ours.is_floating_point()]
    if not all(torch.equal(ours.long(), exact.long()) for ours, exact in integers):
        if call.name.startswith(ROUTING):
            return  # experts that are all but tied
        raise WrongError(f"{integers[0][0]} is not {integers[0][1]}")
    for three in zip(*results, strict=True):
        compare(*three, dtype=call_dtype(leaves))
    recorded = [i for i, each in enumerate(zip(*results, strict=True)) if all(t.requires_grad for t in each)]
    if not (call.differentiable and recorded):
        return
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(results[0][i].shape, generator=generator).to(results[0][i].dtype) for i in recorded]
    gradients = [
        torch.autograd.grad(
            [out[i] for i in recorded],
            inputs,
            [c.to(out[i].dtype) for i, c in zip(recorded, cotangents, strict=True)],
            allow_unused=True,
            materialize_grads=True,
        )
        for out, inputs in runs
    ]
    for three in zip(*gradients, strict=True):
        compare(*three, dtype=call_dtype(leaves))


def check_early_exit(call: Call, epsilon: float | None, stopped: list[Tensor]) -> None:
    """What a walk left out, against the one to the end: at most stick_epsilon times the largest value."""
    values = call.args[1] if call.args[2] is None else call.args[2]
    dtype = call_dtype(tensors(call.args))
    if epsilon is None:
        epsilon = 0.0 if dtype == torch.float64 else 2**-24
    with torch.no_grad():
        whole = tensors(call.function(*call.args, **call.kwargs))
    for ours, exact in zip(stopped, whole, strict=True):
        if not ours.numel() or not values.numel():
            continue
        largest = max(1.0, values.double().abs().max().item())  # a remainder is off by at most stick_epsilon
        off = (ours.double() - exact.double()).abs().max().item()
        if not off <= (epsilon + TOLERANCE[dtype]) * largest:
            raise WrongError(f"an early exit at {epsilon} left out {off}, the largest value is {largest}")


def call_dtype(leaves: list[Any]) -> torch.dtype:
    """The coarsest type of the inputs."""
    dtypes = [t.dtype for t in leaves if isinstance(t, Tensor) and t.dtype in TOLERANCE]
    return max(dtypes, key=TOLERANCE.__getitem__, default=torch.float64)


def compare(ours: Tensor, peer: Tensor, exact: Tensor, *, dtype: torch.dtype) -> None:
    """Raises where a result is further from the exact one than rounding takes it."""
    if not ours.shape == peer.shape == exact.shape:
        raise WrongError(f"shape {ours.shape}, the reference has {exact.shape}")
    if not ours.is_floating_point():
        return
    error, cost = ((t.double() - exact).norm().item() for t in (ours, peer))
    if not error <= TOLERANCE[dtype] * (1 + exact.norm().item()) + 4 * cost:
        raise WrongError(f"off by {error} of {exact.norm().item()} in {ours.dtype}, the reference by {cost}")


def case(seed: int) -> tuple[Call, Any]:
    """What a seed stands for: a call and the check of it."""
    m = Maker(seed)
    kind = m.random.choices(("valid", "public", "operator", "schema"), (25, 25, 40, 10))[0]
    if kind == "schema":
        name = m.random.choice(OPERATORS)
        return Call(name, operator(name), from_schema(m, operator(name)._schema)), check_any
    call = PUBLIC[m.random.choice(sorted(PUBLIC))](m)
    if kind == "valid":
        return call, check_valid
    if kind == "operator":
        if call.differentiable:
            for t in tensors((call.args, call.kwargs)):
                t.requires_grad_(t.is_floating_point() and m.chance(0.8))
        with Recorder() as recorder:
            run(call)
        call = m.random.choice(recorder.calls)
    call.args, call.kwargs = mutate(m, (call.args, call.kwargs))
    return call, check_any


def describe(call: Call) -> str:
    def brief(value):
        if isinstance(value, Tensor):
            text = f"Tensor({list(value.shape)}, {str(value.dtype)[6:]}, strides {list(value.stride())}, {value.device}"
            return f"{text}, grad)" if value.requires_grad else f"{text})"
        return repr(value)

    leaves = pytree.tree_map(brief, (call.args, call.kwargs))
    return f"{call.name}{leaves[0]} {leaves[1] or ''}"


def check(seed: int) -> str | None:
    """Nothing, or what is wrong."""
    call = None
    try:
        call, verdict = case(seed)
        verdict(call)
    except Exception as error:
        what = str(error) if isinstance(error, WrongError) else traceback.format_exc(limit=-4)
        return f"seed {seed}: {what}\n  {describe(call) if call else '(while the case was made)'}"
    return None


def main(first: int, last: int, report: str) -> None:
    file = os.open(report, os.O_WRONLY | os.O_CREAT)
    torch.set_num_threads(2)
    if "asan" not in os.environ.get("LD_PRELOAD", ""):  # which maps the whole address space
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    for seed in range(first, last):
        os.pwrite(file, f"{seed:20}".encode(), 0)
        problem = check(seed)
        if problem:
            print(problem, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
