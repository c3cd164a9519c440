"""Expert matrix products: every slot is multiplied by the matrix of its expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moduleformer_ext.reference._common import accumulation_dtype, joined, without_autocast
from moduleformer_ext.types import ExpertLayout, Segments

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}
GATED = {"geglu_tanh": "gelu_tanh", "geglu": "gelu", "swiglu": "silu", "reglu": "relu"}
ACTIVATIONS = (*_FUNCTIONS, *GATED)


def _activate(h: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return h
    if activation in GATED:
        gate, value = h.chunk(2, dim=-1)
        return _FUNCTIONS[GATED[activation]](gate) * value
    if activation not in _FUNCTIONS:
        known = ", ".join((*_FUNCTIONS, *GATED))
        raise ValueError(f"grouped_gemm: activation must be None or one of {known}, got {activation!r}")
    return _FUNCTIONS[activation](h)


@without_autocast
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
    """y_s = activation(x_s W_e(s) + b_e(s)) for every slot s, with weight [E, in, out] and bias [E, out].

    x is [T, in] in ``"token"`` order (slot s reads row s // K), [T, K, in] in ``"slot"`` order, [S, in] in
    ``"expert"`` order. y is [S, out] in ``"expert"`` order, [T, K, out] in ``"slot"`` order; in ``"token"``
    order it is the sum over the token's K slots, each times its gate if ``gates`` [T, K] are given, [T,
    out]. Gated activations take 2F columns: the first F are activated and multiplied by the second F.
    """
    orders = ("token", "slot", "expert")
    if x_order not in orders or out_order not in orders:
        raise ValueError(f"grouped_gemm: x_order, out_order must be of {orders}, got {x_order!r}, {out_order!r}")
    if gates is not None and out_order != "token":
        raise ValueError(f"grouped_gemm: gates need out_order='token', got {out_order!r}")
    full_weight = joined(weight)
    dtype = accumulation_dtype(x.dtype)
    k = layout.num_choices
    slot_order, position = layout.slot_order.long(), layout.position.long()

    if x_order == "token":
        rows = x[slot_order // k]
    elif x_order == "slot":
        rows = x.reshape(layout.num_slots, x.shape[-1])[slot_order]
    else:
        rows = x
    groups = torch.split(rows.to(dtype), layout.counts.tolist())
    y = torch.cat([group @ w.to(dtype) for group, w in zip(groups, full_weight, strict=True)])
    if bias is not None:
        y = y + joined(bias).to(dtype).repeat_interleave(layout.counts.long(), dim=0)
    y = _activate(y, activation)

    if out_order != "expert":
        y = torch.unflatten(y[position], 0, (layout.num_slots // k, k))
    if out_order == "token":
        y = (y if gates is None else y * gates.to(dtype)[..., None]).sum(1)
    return y.to(x.dtype)


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
    """y_t = Σ_k gate_tk · (activation(x_t up_e + up_bias_e) down_e + down_bias_e) with e = expert of (t, k).

    x [T, D], up [E, D, F] ([E, D, 2F] for a gated activation), down [E, F, D], gates [T, K]; y [T, D].
    """
    hidden = grouped_gemm(x, up, layout, x_order="token", out_order="expert", activation=activation, bias=up_bias)
    return grouped_gemm(hidden, down, layout, x_order="expert", out_order="token", gates=gates, bias=down_bias)
