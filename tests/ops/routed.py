"""Random routings, operands and tolerances that the tests of grouped_gemm and expert_ffn share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moduleformer_ext import reference
from moduleformer_ext.reference.grouped_gemm import GATED
from moduleformer_ext.types import ExpertLayout

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_layout(tokens: int, experts: int, choices: int, seed: int = 0) -> ExpertLayout:
    generator = torch.Generator().manual_seed(seed)
    return reference.expert_layout(torch.rand(tokens, experts, generator=generator).argsort(1)[:, :choices], experts)


def layout_of(rows: list[list[int]], experts: int) -> ExpertLayout:
    return reference.expert_layout(torch.tensor(rows, dtype=torch.int32).reshape(len(rows), -1), experts)


def on(layout: ExpertLayout, device: torch.device) -> ExpertLayout:
    return ExpertLayout(*(x.to(device) if isinstance(x, Tensor) else x for x in layout))


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)


def rows_shape(order: str, layout: ExpertLayout, features: int) -> tuple[int, ...]:
    tokens = layout.num_slots // layout.num_choices
    return {
        "token": (tokens, features),
        "slot": (tokens, layout.num_choices, features),
        "expert": (layout.num_slots, features),
    }[order]


def assert_as_accurate(
    name: str, actual: Tensor, same_dtype: Tensor, exact: Tensor, storage: torch.dtype, roundings: int = 1
) -> None:
    """The error against float64 is at most twice plain PyTorch's in the same dtype, plus a few units in the last
    place of the type that intermediate results are stored in, for each time that they are.
    """
    assert actual.dtype == same_dtype.dtype, name
    assert actual.shape == exact.shape, name
    if actual.numel() == 0:
        return
    scale = exact.abs().max().item()
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (same_dtype.double() - exact).abs().max().item() + roundings * FLOOR[storage] * scale
    assert error <= allowed, f"{name}: error {error} of {scale}, allowed {allowed}"


def as_leaves(
    *tensors: Tensor | None, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> list[Tensor | None]:
    return [
        None if t is None else t.detach().to(device or t.device, dtype or t.dtype, copy=True).requires_grad_()
        for t in tensors
    ]


def gradients(out: Tensor, inputs: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, [i for i in inputs if i is not None], grad.to(out.dtype)))


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def grouped_values(
    layout: ExpertLayout, x_order: str, n: int, m: int, dtype: torch.dtype, gated: bool = False, scale: float = 1.0
) -> list[Tensor | None]:
    """x, weight and gates of grouped_gemm."""
    tokens, experts = layout.num_slots // layout.num_choices, layout.offsets.numel() - 1
    return [
        randn(*rows_shape(x_order, layout, n), dtype=dtype, scale=scale),
        randn(experts, n, m, dtype=dtype, scale=n**-0.5),
        torch.rand(tokens, layout.num_choices, dtype=gate_dtype(dtype)) if gated else None,
    ]


def ffn_values(layout: ExpertLayout, d: int, f: int, dtype: torch.dtype, activation: str = "gelu_tanh") -> list[Tensor]:
    """x, up, down and gates of expert_ffn."""
    tokens, experts = layout.num_slots // layout.num_choices, layout.offsets.numel() - 1
    return [
        randn(tokens, d, dtype=dtype),
        randn(experts, d, 2 * f if activation in GATED else f, dtype=dtype, scale=d**-0.5),
        randn(experts, f, d, dtype=dtype, scale=f**-0.5),
        torch.rand(tokens, layout.num_choices, dtype=gate_dtype(dtype)),
    ]


def compare(
    op: Callable[..., Tensor],
    layout: ExpertLayout,
    values: list[Tensor | None],
    device: torch.device,
    biases: dict[str, Tensor] | None = None,
    **options: Any,
) -> list[Tensor]:
    """An op's output and every gradient against its twin's, in the same dtype and in float64."""
    plain = getattr(reference, op.__name__)
    biases = biases or {}
    results = []
    for function, dtype in ((op, None), (plain, None), (plain, torch.float64)):
        where = device if function is op else CPU
        inputs = as_leaves(*values, *biases.values(), dtype=dtype, device=where)
        *operands, gates = inputs[: len(values)]
        given = dict(zip(biases, inputs[len(values) :], strict=True))
        out = function(*operands, on(layout, where), gates=gates, **given, **options)
        if not results:
            grad = randn(*out.shape, dtype=out.dtype)
        results.append([t.cpu() for t in (out, *gradients(out, inputs, grad.to(where)))])
    # A gated activation multiplies two saved, that is rounded, halves.
    roundings = 2 if options.get("activation") in GATED else 1
    for i, (ours, same, exact) in enumerate(zip(*results, strict=True)):
        assert_as_accurate(f"result {i}", ours, same, exact, values[0].dtype, roundings)
    return results[0]
