"""Gate networks. Parameters carry the names of the published checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduleformer_ext import ops
from moduleformer_ext.types import RouteTopK

GateType = Literal["mlp", "linear", "gmm"]
RouterOrder = Literal["softmax_topk", "topk_softmax"]


class Router(nn.Module, ABC):
    """Chooses ``k`` of ``num_experts`` experts for every token.

    Args:
        num_experts: E.
        k: experts per token, at most E.
        order: ``"softmax_topk"`` takes the gates from the softmax over all experts (ModuleFormer),
            ``"topk_softmax"`` from the softmax over the chosen ones (JetMoE).
        sample_topk: in training, how many of the k experts are sampled instead of taken from the top.
    """

    def __init__(self, num_experts: int, k: int, *, order: RouterOrder = "softmax_topk", sample_topk: int = 0) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(f"Router: k must be in [1, {num_experts}] (num_experts), got {k}")
        if not 0 <= sample_topk <= k:
            raise ValueError(f"Router: sample_topk must be in [0, {k}] (k), got {sample_topk}")
        self.num_experts = num_experts
        self.k = k
        self.order = order
        self.sample_topk = sample_topk

    @abstractmethod
    def forward(self, x: Tensor) -> RouteTopK:
        """Route x [T, D]. Router arithmetic is float32 at least, whatever the type of x."""

    def _precise(self, x: Tensor) -> torch.dtype:
        return torch.float64 if x.dtype == torch.float64 else torch.float32

    @property
    def _num_sampled(self) -> int:
        return self.sample_topk if self.training else 0

    def _noise(self, x: Tensor) -> Tensor | None:
        if self._num_sampled == 0:
            return None
        return torch.empty(x.shape[0], self.num_experts, dtype=self._precise(x), device=x.device).exponential_()

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, k={self.k}, order={self.order}, sample_topk={self.sample_topk}"


class LinearRouter(Router):
    """logits = x Wᵀ."""

    def __init__(
        self,
        n_embd: int,
        num_experts: int,
        k: int,
        *,
        order: RouterOrder = "softmax_topk",
        sample_topk: int = 0,
    ) -> None:
        super().__init__(num_experts, k, order=order, sample_topk=sample_topk)
        self.w_gate = nn.Sequential(nn.Linear(n_embd, num_experts, bias=False))

    def forward(self, x: Tensor) -> RouteTopK:
        return ops.route_topk_linear(
            x,
            _linear(self.w_gate, 0).weight,
            self.k,
            order=self.order,
            noise=self._noise(x),
            num_sampled=self._num_sampled,
        )


class MLPRouter(Router):
    """logits = dropout(gelu(x Vᵀ + b)) Wᵀ, with the erf GELU."""

    def __init__(
        self,
        n_embd: int,
        num_experts: int,
        k: int,
        *,
        gating_size: int,
        dropout: float = 0.0,
        order: RouterOrder = "softmax_topk",
        sample_topk: int = 0,
    ) -> None:
        super().__init__(num_experts, k, order=order, sample_topk=sample_topk)
        self.w_gate = nn.Sequential(
            nn.Linear(n_embd, gating_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(gating_size, num_experts, bias=False),
        )
        self.dropout = dropout

    def forward(self, x: Tensor) -> RouteTopK:
        hidden, output = _linear(self.w_gate, 0), _linear(self.w_gate, 3)
        noise, num_sampled = self._noise(x), self._num_sampled
        if self.training and self.dropout > 0:  # the fused gate network has no dropout
            dtype = self._precise(x)
            with torch.autocast(x.device.type, enabled=False):
                z = F.linear(x.to(dtype), hidden.weight.to(dtype), hidden.bias.to(dtype))
                activated = F.dropout(F.gelu(z), self.dropout)
            return ops.route_topk_linear(
                activated, output.weight, self.k, order=self.order, noise=noise, num_sampled=num_sampled
            )
        return ops.route_topk_mlp(
            x,
            hidden.weight,
            hidden.bias,
            output.weight,
            self.k,
            order=self.order,
            noise=noise,
            num_sampled=num_sampled,
        )


class GMMRouter(Router):
    """logits = exp(temperature) · cosine similarity of x Vᵀ and each expert's centroid."""

    def __init__(
        self,
        n_embd: int,
        num_experts: int,
        k: int,
        *,
        gating_size: int,
        order: RouterOrder = "softmax_topk",
        sample_topk: int = 0,
    ) -> None:
        super().__init__(num_experts, k, order=order, sample_topk=sample_topk)
        self.w_gate = nn.Linear(n_embd, gating_size, bias=False)
        self.expert_centroids = nn.Parameter(torch.empty(num_experts, gating_size))
        self.temperature = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.expert_centroids)
        nn.init.zeros_(self.temperature)

    def forward(self, x: Tensor) -> RouteTopK:
        return ops.route_topk_gmm(
            x,
            self.w_gate.weight,
            self.expert_centroids,
            self.temperature.squeeze(0),
            self.k,
            order=self.order,
            noise=self._noise(x),
            num_sampled=self._num_sampled,
        )


def _linear(layers: nn.Sequential, index: int) -> nn.Linear:
    return cast(nn.Linear, layers[index])


def make_router(
    gate_type: GateType,
    n_embd: int,
    num_experts: int,
    k: int,
    *,
    gating_size: int,
    dropout: float = 0.0,
    order: RouterOrder = "softmax_topk",
    sample_topk: int = 0,
) -> Router:
    """The router that a configuration names. ``gating_size`` and ``dropout`` matter only where there is a hidden
    layer.
    """
    if gate_type == "mlp":
        return MLPRouter(
            n_embd,
            num_experts,
            k,
            gating_size=gating_size,
            dropout=dropout,
            order=order,
            sample_topk=sample_topk,
        )
    if gate_type == "linear":
        return LinearRouter(n_embd, num_experts, k, order=order, sample_topk=sample_topk)
    if gate_type == "gmm":
        return GMMRouter(n_embd, num_experts, k, gating_size=gating_size, order=order, sample_topk=sample_topk)
    raise ValueError(f"make_router: gate_type must be 'mlp', 'linear' or 'gmm', got {gate_type!r}")
