"""Gate networks. Parameters carry the names of the published checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduleformer_ext import ops
from moduleformer_ext.nn.segments import segments_of
from moduleformer_ext.types import RouteTopK, Segments

if TYPE_CHECKING:
    from typing_extensions import Unpack

GateType = Literal["mlp", "linear", "gmm"]
RouterOrder = Literal["softmax_topk", "topk_softmax"]

_ROW_STD = 0.02


class RouterOptions(TypedDict, total=False):
    """Keyword arguments of :class:`Router`, which explains them; the gate networks pass them on."""

    order: RouterOrder
    sample_topk: int
    num_normaliser_rows: int


class Router(nn.Module, ABC):
    """Chooses ``k`` of ``num_experts`` experts for every token.

    Args:
        num_experts: E.
        k: experts per token, at most E.
        row_size: width of the vector (embedding, centroid) that stands for an expert.
        order: ``"softmax_topk"`` takes the gates from the softmax over all experts (ModuleFormer),
            ``"topk_softmax"`` from the softmax over the chosen ones (JetMoE).
        sample_topk: in training, how many of the k experts are sampled instead of taken from the top.
        num_normaliser_rows: U, rows of pruned experts. They cannot be chosen, but stay in the softmax that the gates
            are taken from, so that the gates of the others are what they were. Statistics are those of the softmax
            over the E experts that can be chosen.
    """

    def __init__(
        self,
        num_experts: int,
        k: int,
        *,
        row_size: int,
        order: RouterOrder = "softmax_topk",
        sample_topk: int = 0,
        num_normaliser_rows: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(f"Router: k must be in [1, {num_experts}] (num_experts), got {k}")
        if not 0 <= sample_topk <= k:
            raise ValueError(f"Router: sample_topk must be in [0, {k}] (k), got {sample_topk}")
        if num_normaliser_rows and order != "softmax_topk":
            raise ValueError(f"Router: num_normaliser_rows must be 0 with order {order!r}, got {num_normaliser_rows}")
        self.num_experts = num_experts
        self.k = k
        self.order = order
        self.sample_topk = sample_topk
        self.normaliser_rows: nn.Parameter | None = None
        if num_normaliser_rows:
            self.normaliser_rows = nn.Parameter(torch.empty(num_normaliser_rows, row_size))
            nn.init.normal_(self.normaliser_rows, std=_ROW_STD)

    @property
    @abstractmethod
    def rows_parameter(self) -> tuple[nn.Module, str]:
        """Where the experts' rows are: the module and the name of its parameter [E, row_size]."""

    @abstractmethod
    def _route(self, x: Tensor, rows: Segments, noise: Tensor | None, num_sampled: int) -> RouteTopK:
        """Route x [T, D] among all the rows."""

    @abstractmethod
    def _logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """The gate network alone, for what the fused one does not know: x [T, D] and rows [R, row_size], both in the
        router's precision, give [T, R].
        """

    def forward(self, x: Tensor) -> RouteTopK:
        """Route x [T, D]. Router arithmetic is float32 at least, whatever the type of x."""
        rows = segments_of(*self.rows_parameter)
        noise, num_sampled = self._noise(x), self._num_sampled
        if self.normaliser_rows is None:
            return self._route(x, rows, noise, num_sampled)
        all_logits = self._plain_logits(x, rows, self.normaliser_rows)
        logits, pruned = all_logits[:, : self.num_experts], all_logits[:, self.num_experts :]
        route = ops.route_topk(logits, self.k, order=self.order, noise=noise, num_sampled=num_sampled)
        # The softmax over all rows is the one over the selectable rows times the probability that these have together.
        remaining = torch.sigmoid(logits.logsumexp(1, keepdim=True) - pruned.logsumexp(1, keepdim=True))
        return route._replace(gates=route.gates * remaining)

    def _plain_logits(self, x: Tensor, rows: Segments, *more_rows: Tensor) -> Tensor:
        segments = (rows,) if isinstance(rows, Tensor) else tuple(rows)
        dtype = self._precise(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._logits(x.to(dtype), torch.cat([segment.to(dtype) for segment in (*segments, *more_rows)]))

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
        **options: Unpack[RouterOptions],
    ) -> None:
        super().__init__(num_experts, k, row_size=n_embd, **options)
        self.w_gate = nn.Sequential(nn.Linear(n_embd, num_experts, bias=False))

    @property
    def rows_parameter(self) -> tuple[nn.Module, str]:
        return self.w_gate[0], "weight"

    def _route(self, x: Tensor, rows: Segments, noise: Tensor | None, num_sampled: int) -> RouteTopK:
        return ops.route_topk_linear(x, rows, self.k, order=self.order, noise=noise, num_sampled=num_sampled)

    def _logits(self, x: Tensor, rows: Tensor) -> Tensor:
        return F.linear(x, rows)


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
        **options: Unpack[RouterOptions],
    ) -> None:
        super().__init__(num_experts, k, row_size=gating_size, **options)
        self.w_gate = nn.Sequential(
            nn.Linear(n_embd, gating_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(gating_size, num_experts, bias=False),
        )
        self.dropout = dropout

    @property
    def rows_parameter(self) -> tuple[nn.Module, str]:
        return self.w_gate[3], "weight"

    def _route(self, x: Tensor, rows: Segments, noise: Tensor | None, num_sampled: int) -> RouteTopK:
        if self.training and self.dropout > 0:  # the fused gate network has no dropout
            logits = self._plain_logits(x, rows)
            return ops.route_topk(logits, self.k, order=self.order, noise=noise, num_sampled=num_sampled)
        hidden = cast(nn.Linear, self.w_gate[0])
        return ops.route_topk_mlp(
            x, hidden.weight, hidden.bias, rows, self.k, order=self.order, noise=noise, num_sampled=num_sampled
        )

    def _logits(self, x: Tensor, rows: Tensor) -> Tensor:
        hidden = cast(nn.Linear, self.w_gate[0])
        activated = F.gelu(F.linear(x, hidden.weight.to(x.dtype), hidden.bias.to(x.dtype)))
        if self.training and self.dropout > 0:
            activated = F.dropout(activated, self.dropout)
        return F.linear(activated, rows)


class GMMRouter(Router):
    """logits = exp(temperature) · cosine similarity of x Vᵀ and each expert's centroid."""

    def __init__(
        self,
        n_embd: int,
        num_experts: int,
        k: int,
        *,
        gating_size: int,
        **options: Unpack[RouterOptions],
    ) -> None:
        super().__init__(num_experts, k, row_size=gating_size, **options)
        self.w_gate = nn.Linear(n_embd, gating_size, bias=False)
        self.expert_centroids = nn.Parameter(torch.empty(num_experts, gating_size))
        self.temperature = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.expert_centroids)
        nn.init.zeros_(self.temperature)

    @property
    def rows_parameter(self) -> tuple[nn.Module, str]:
        return self, "expert_centroids"

    def _route(self, x: Tensor, rows: Segments, noise: Tensor | None, num_sampled: int) -> RouteTopK:
        return ops.route_topk_gmm(
            x,
            self.w_gate.weight,
            rows,
            self.temperature.squeeze(0),
            self.k,
            order=self.order,
            noise=noise,
            num_sampled=num_sampled,
        )

    def _logits(self, x: Tensor, rows: Tensor) -> Tensor:
        direction = F.normalize(F.linear(x, self.w_gate.weight.to(x.dtype)), dim=-1)
        return F.linear(direction, F.normalize(rows, dim=-1)) * self.temperature.to(x.dtype).exp()


def make_router(
    gate_type: GateType,
    n_embd: int,
    num_experts: int,
    k: int,
    *,
    gating_size: int,
    dropout: float = 0.0,
    **options: Unpack[RouterOptions],
) -> Router:
    """The router that a configuration names. ``gating_size`` and ``dropout`` matter only where there is a hidden
    layer.
    """
    if gate_type not in ("mlp", "linear", "gmm"):
        raise ValueError(f"make_router: gate_type must be 'mlp', 'linear' or 'gmm', got {gate_type!r}")
    if gate_type == "linear":
        return LinearRouter(n_embd, num_experts, k, **options)
    if gate_type == "gmm":
        return GMMRouter(n_embd, num_experts, k, gating_size=gating_size, **options)
    return MLPRouter(n_embd, num_experts, k, gating_size=gating_size, dropout=dropout, **options)
