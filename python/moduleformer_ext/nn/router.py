"""Gate networks. Parameters carry the names of the published checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduleformer_ext import ops
from moduleformer_ext.nn.plain import call_in_dtype_of_input, is_plain, plain_layers
from moduleformer_ext.nn.segments import segments_of
from moduleformer_ext.types import RouteTopK, Segments

if TYPE_CHECKING:
    from typing_extensions import Unpack

GateType = Literal["mlp", "linear", "gmm"]
RouterOrder = Literal["softmax_topk", "topk_softmax"]

_ROW_STD = 0.02


class GateWeights(NamedTuple):
    """The weights of a gate network, under the names of :class:`moduleformer_ext.types.NormedRouter`."""

    gate: GateType
    hidden_weight: Tensor | None
    hidden_bias: Tensor | None
    gate_weight: Segments
    """The rows of the experts; centroids where there is a temperature."""
    temperature: Tensor | None = None


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
        self._reset_normaliser_rows()

    w_gate: nn.Module
    """The gate network."""

    def reset_parameters(self) -> None:
        """Draw the router's own parameters anew, not those of the gate network."""
        self._reset_normaliser_rows()

    def _reset_normaliser_rows(self) -> None:
        if self.normaliser_rows is not None:
            nn.init.normal_(self.normaliser_rows, std=_ROW_STD)

    @property
    @abstractmethod
    def rows_parameter(self) -> tuple[nn.Module, str]:
        """Where the experts' rows are: the module and the name of its parameter [E, row_size]."""

    def gate_weights(self) -> GateWeights | None:
        """The weights of all that the router does outside of training; None where it does more than they say."""
        return None if self.normaliser_rows is not None else self._gate_weights()

    def _gate_weights(self) -> GateWeights | None:
        """Those of the gate network."""
        return None

    @abstractmethod
    def _route(self, x: Tensor, noise: Tensor | None, num_sampled: int) -> RouteTopK | None:
        """Route x [T, D] in one pass; None where the gate network is more than its weights say."""

    @abstractmethod
    def _hidden(self, x: Tensor) -> Tensor:
        """What the rows are multiplied by: x [T, D] in the router's precision gives [T, row_size]."""

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """hidden [T, row_size] and rows [R, row_size], both in the router's precision, give [T, R]."""
        return F.linear(hidden, rows)

    def forward(self, x: Tensor) -> RouteTopK:
        """Route x [T, D]. Router arithmetic is float32 at least, whatever the type of x; hooked or wrapped parts of
        the gate network are called, and compute in their own type.
        """
        noise, num_sampled = self._noise(x), self._num_sampled
        if self.normaliser_rows is None:
            route = self._route(x, noise, num_sampled)
            if route is not None:
                return route
        logits, pruned = self._called_logits(x)
        route = ops.route_topk(logits, self.k, order=self.order, noise=noise, num_sampled=num_sampled)
        if pruned is None:
            return route
        # The softmax over all rows is the one over the selectable rows times the probability that these have together.
        remaining = torch.sigmoid(logits.logsumexp(1, keepdim=True) - pruned.logsumexp(1, keepdim=True))
        return route._replace(gates=route.gates * remaining)

    def _called_logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the experts [T, E] and of the pruned ones [T, U], module by module."""
        module, name = self.rows_parameter
        dtype = self._precise(x)
        whole = module is not self and not is_plain(self.w_gate, nn.Sequential)
        called = whole or not (module is self or is_plain(module, nn.Linear))
        if (called and getattr(module, name, None) is None) or (whole and self.normaliser_rows is not None):
            raise ValueError(
                f"{type(self).__name__}: w_gate must have no hooks or adapters on its rows while these are split into "
                f"old and new or some are pruned, got {type(self.w_gate if whole else module).__name__}"
            )
        with torch.autocast(x.device.type, enabled=False):
            if whole:
                return call_in_dtype_of_input(self.w_gate, x.to(dtype)), None
            hidden = self._hidden(x.to(dtype))
            pruned = None if self.normaliser_rows is None else self._logits(hidden, self.normaliser_rows.to(dtype))
            if called:
                return call_in_dtype_of_input(module, hidden), pruned
            rows = segments_of(module, name)
            segments = (rows,) if isinstance(rows, Tensor) else rows
            return self._logits(hidden, torch.cat([segment.to(dtype) for segment in segments])), pruned

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

    w_gate: nn.Sequential

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

    def _gate_weights(self) -> GateWeights | None:
        layers = plain_layers(self.w_gate, nn.Linear)
        return None if layers is None else GateWeights("linear", None, None, segments_of(layers[0], "weight"))

    def _route(self, x: Tensor, noise: Tensor | None, num_sampled: int) -> RouteTopK | None:
        weights = self._gate_weights()
        if weights is None:
            return None
        return ops.route_topk_linear(
            x, weights.gate_weight, self.k, order=self.order, noise=noise, num_sampled=num_sampled
        )

    def _hidden(self, x: Tensor) -> Tensor:
        return x


class MLPRouter(Router):
    """logits = dropout(gelu(x Vᵀ + b)) Wᵀ, with the erf GELU."""

    w_gate: nn.Sequential

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

    @property
    def rows_parameter(self) -> tuple[nn.Module, str]:
        return self.w_gate[3], "weight"

    def _gate_weights(self) -> GateWeights | None:
        layers = plain_layers(self.w_gate, nn.Linear, nn.GELU, nn.Dropout, nn.Linear)
        if layers is None:
            return None
        hidden = cast(nn.Linear, layers[0])
        return GateWeights("mlp", hidden.weight, hidden.bias, segments_of(layers[3], "weight"))

    def _route(self, x: Tensor, noise: Tensor | None, num_sampled: int) -> RouteTopK | None:
        weights = self._gate_weights()
        if weights is None:
            return None
        dropout = cast(nn.Dropout, self.w_gate[2])
        if dropout.training and dropout.p > 0:  # the fused gate network has no dropout
            return None
        hidden_weight, hidden_bias = cast(Tensor, weights.hidden_weight), cast(Tensor, weights.hidden_bias)
        return ops.route_topk_mlp(
            x,
            hidden_weight,
            hidden_bias,
            weights.gate_weight,
            self.k,
            order=self.order,
            noise=noise,
            num_sampled=num_sampled,
        )

    def _hidden(self, x: Tensor) -> Tensor:
        layer, activation, dropout, _ = self.w_gate
        return dropout(activation(call_in_dtype_of_input(layer, x)))


class GMMRouter(Router):
    """logits = exp(temperature) · cosine similarity of x Vᵀ and each expert's centroid."""

    w_gate: nn.Linear

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
        super().reset_parameters()
        nn.init.normal_(self.expert_centroids)
        nn.init.zeros_(self.temperature)

    @property
    def rows_parameter(self) -> tuple[nn.Module, str]:
        return self, "expert_centroids"

    def _gate_weights(self) -> GateWeights | None:
        if not is_plain(self.w_gate, nn.Linear):
            return None
        centroids = segments_of(self, "expert_centroids")
        return GateWeights("gmm", self.w_gate.weight, None, centroids, self.temperature)

    def _route(self, x: Tensor, noise: Tensor | None, num_sampled: int) -> RouteTopK | None:
        weights = self._gate_weights()
        if weights is None:
            return None
        return ops.route_topk_gmm(
            x,
            cast(Tensor, weights.hidden_weight),
            weights.gate_weight,
            cast(Tensor, weights.temperature),
            self.k,
            order=self.order,
            noise=noise,
            num_sampled=num_sampled,
        )

    def _hidden(self, x: Tensor) -> Tensor:
        return F.normalize(call_in_dtype_of_input(self.w_gate, x), dim=-1)

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return F.linear(hidden, F.normalize(rows, dim=-1)) * self.temperature.to(hidden.dtype).exp()


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
