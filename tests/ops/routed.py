"""Random routings, operands and tolerances that the tests of grouped_gemm and expert_ffn share."""

from __future__ import annotations

import torch
from torch import Tensor

from moduleformer_ext.ops import expert_layout
from moduleformer_ext.types import ExpertLayout

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_layout(tokens: int, experts: int, choices: int, seed: int = 0) -> ExpertLayout:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :choices].int()
    return expert_layout(ids, experts)


def layout_of(rows: list[list[int]], experts: int) -> ExpertLayout:
    return expert_layout(torch.tensor(rows, dtype=torch.int32).reshape(len(rows), -1), experts)


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


def as_leaves(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


def gradients(out: Tensor, inputs: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, [i for i in inputs if i is not None], grad.to(out.dtype)))


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()
