"""Multiply every routed slot by the matrix of its expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moduleformer_ext.ops._segments import joined, segments
from moduleformer_ext.types import ExpertLayout, Segments

GATED_ACTIVATIONS = frozenset({"geglu_tanh", "geglu", "swiglu", "reglu"})
"""Those that make one column of two."""


def grouped_gemm(
    x: Tensor,
    weight: Segments,
    layout: ExpertLayout,
    *,
    x_order: str = "token",
    out_order: str = "expert",
    gates: Tensor | None = None,
    activation: str | None = None,
    bias: Segments | None = None,
) -> Tensor:
    """y_s = activation(x_s W_e(s) + b_e(s)) for every slot s, with e(s) the expert of s.

    Rows come and go in one of three orders, with no copy in between:

    ==========  =============  =====================================================================
    order       shape          meaning
    ==========  =============  =====================================================================
    "token"     ``[T, n]``     x: the K slots of a token share its row; y: the sum of the K slots,
                               each times its gate if ``gates`` are given
    "slot"      ``[T, K, n]``  slot s = t * K + k
    "expert"    ``[S, n]``     sorted by expert, as ``layout.slot_order`` says
    ==========  =============  =====================================================================

    Routed projections into attention are ``x_order="token", out_order="slot"``, the way back is
    ``x_order="slot", out_order="token", gates=...``.

    Sums run in float32 (float64 for float64), over the K slots in the order of the choices: results do not depend
    on the number of threads and repeat bitwise. Saved for backward: x, weight, bias, gates, and the pre-activation
    ``[S, out]`` if there is an activation; never the output. Gradients are computed only for what requires them,
    segment by segment, and lie in memory as the weight does. Under autocast x, weight and bias take its dtype.
    Differentiable once, in reverse mode.

    Args:
        x: float32, float64, bfloat16 or float16 rows in ``x_order`` with ``in`` features, any strides (rows whose
            last dimension is not contiguous are copied).
        weight: ``[E, in, out]`` of x's dtype, or a sequence of segments ``[E_i, in, out]`` of consecutive experts. Read
            as it lies in memory where one of the last two dimensions is contiguous, in all segments the same: a weight
            that is stored ``[E, out, in]`` comes as ``w.transpose(1, 2)``. Any other is copied.
        layout: from :func:`~moduleformer_ext.ops.expert_layout`, for these T tokens.
        x_order, out_order: as above.
        gates: ``[T, K]`` float32 (float64 beside float64 x); only with ``out_order="token"``.
        activation: None; ``"gelu_tanh"`` (also known as gelu_new), ``"gelu"`` (erf), ``"silu"``, ``"relu"``; or
            gated: ``"geglu_tanh"``, ``"geglu"``, ``"swiglu"``, ``"reglu"``, which activate the first half of the
            ``out`` columns and multiply it by the second, leaving ``out / 2``.
        bias: ``[E, out]`` of x's dtype, or segments, which need not be split where those of ``weight`` are.

    Returns:
        y in ``out_order``, contiguous, in x's dtype.

    Raises:
        ValueError: naming the argument, what it must be and what it was, for shapes, dtypes, devices and names
            that do not fit, and for a layout whose contents are not one. Nothing is computed or written then. On CUDA
            the contents are trusted, since to read them would wait for the GPU.
    """
    return torch.ops.moduleformer_ext.grouped_gemm(
        x,
        segments("grouped_gemm", "weight", weight),
        layout.offsets,
        layout.slot_order,
        layout.position,
        layout.num_choices,
        x_order,
        out_order,
        gates,
        activation,
        joined("grouped_gemm", "bias", bias),
    )
