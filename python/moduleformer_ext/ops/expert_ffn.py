"""The feed-forward layer of a mixture of experts as one differentiable op."""

from __future__ import annotations

import torch
from torch import Tensor

from moduleformer_ext.ops._segments import joined, segments
from moduleformer_ext.types import ExpertLayout, Segments


def expert_ffn(
    x: Tensor,
    up: Segments,
    down: Segments,
    layout: ExpertLayout,
    gates: Tensor,
    *,
    activation: str = "gelu_tanh",
    up_bias: Segments | None = None,
    down_bias: Segments | None = None,
) -> Tensor:
    """y_t = sum over k of gate_tk * (activation(x_t U_e + u_e) D_e + d_e), with e the expert of choice k of token t.

    Two :func:`~moduleformer_ext.ops.grouped_gemm` launches, with a backward of their own that saves only x, the
    pre-activation ``[S, F]``, the layout, the gates and the matrices: activation(h) is computed again, and the
    gradient of a gate is the dot product of activation(h) with the gradient that the down projection passes to it.

    Args:
        x: ``[T, D]`` float32, float64, bfloat16 or float16.
        up: U, ``[E, D, F]`` (``[E, D, 2F]`` for a gated activation) of x's dtype, or segments of consecutive experts;
            also, without a copy, as ``w.transpose(1, 2)`` of a weight stored with its outputs first.
        down: D, ``[E, F, D]``, or segments; they need not be split where those of ``up`` are.
        layout: from :func:`~moduleformer_ext.ops.expert_layout`, for these T tokens.
        gates: ``[T, K]`` float32 (float64 beside float64 x).
        activation: as in :func:`~moduleformer_ext.ops.grouped_gemm`, but not None.
        up_bias: u, ``[E, F]`` (``[E, 2F]``) of x's dtype, or segments.
        down_bias: d, ``[E, D]``, or segments.

    Returns:
        y ``[T, D]`` in x's dtype; sums run in float32 (float64 for float64) and repeat bitwise.

    Raises:
        ValueError: as :func:`~moduleformer_ext.ops.grouped_gemm` does.
    """
    return torch.ops.moduleformer_ext.expert_ffn(
        x,
        segments("expert_ffn", "up", up),
        segments("expert_ffn", "down", down),
        layout.offsets,
        layout.slot_order,
        layout.position,
        layout.num_choices,
        gates,
        activation,
        joined("expert_ffn", "up_bias", up_bias),
        joined("expert_ffn", "down_bias", down_bias),
    )
