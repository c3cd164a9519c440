"""Expert matrices, and the mixture of feed-forward experts made of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moduleformer_ext import ops
from moduleformer_ext.nn.dispatch import Dispatch, Exchange, arrange
from moduleformer_ext.nn.plain import is_plain
from moduleformer_ext.nn.quantised import QuantisedExpertLinear
from moduleformer_ext.nn.router import Router
from moduleformer_ext.nn.segments import segments_of
from moduleformer_ext.ops.grouped_gemm import GATED_ACTIVATIONS
from moduleformer_ext.types import ExpertLayout, RouteTopK, Segments


class ExpertLinear(nn.Module):
    """One matrix per expert, weight [E, in, out] with y = x W_e."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, out_features))
        self.reset_parameters()

    @property
    def segments(self) -> Segments:
        """The matrices as the ops take them: one tensor, or the segments it was split into."""
        return segments_of(self, "weight")

    def forward(
        self,
        x: Tensor,
        layout: ExpertLayout | Dispatch,
        *,
        x_order: str = "token",
        out_order: str = "expert",
        gates: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """The products of all slots; see :func:`moduleformer_ext.ops.grouped_gemm`."""
        if isinstance(layout, Dispatch):

            def product(rows: Tensor, weight: Segments, own: ExpertLayout) -> Tensor:
                return ops.grouped_gemm(rows, weight, own, out_order="slot", activation=activation).squeeze(1)

            return layout.apply(product, x, [self.segments], x_order=x_order, out_order=out_order, gates=gates)
        return ops.grouped_gemm(
            x, self.segments, layout, x_order=x_order, out_order=out_order, gates=gates, activation=activation
        )

    def reset_parameters(self) -> None:
        for weight in self.parameters():
            bound = 1 / weight.shape[1]
            nn.init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        weights = list(self.parameters())
        num_experts, (in_features, out_features) = sum(map(len, weights)), weights[0].shape[1:]
        return f"num_experts={num_experts}, in_features={in_features}, out_features={out_features}"


def make_experts(
    num_experts: int, in_features: int, out_features: int, bits: int | None
) -> ExpertLinear | QuantisedExpertLinear:
    """Matrices of 8 or 4 bits, or with None of the default dtype."""
    if bits is None:
        return ExpertLinear(num_experts, in_features, out_features)
    return QuantisedExpertLinear(num_experts, in_features, out_features, bits)


class MixtureOfFFN(nn.Module):
    """y = Σ_k gate_k · down_k(activation(up_k(x))) over the experts that the router chose.

    Args:
        n_embd: D.
        ffd_hidden: width of one expert.
        router: decides which experts see a token.
        activation: as in :func:`moduleformer_ext.ops.grouped_gemm`; gated ones double the columns of ``experts``.
        expert_bits: of the experts' matrices, 8 or 4, for inference; None for numbers of the layer's dtype.
    """

    def __init__(
        self,
        n_embd: int,
        ffd_hidden: int,
        router: Router,
        *,
        activation: str = "gelu_tanh",
        expert_bits: int | None = None,
    ) -> None:
        super().__init__()
        columns = 2 * ffd_hidden if activation in GATED_ACTIVATIONS else ffd_hidden
        self.experts = make_experts(router.num_experts, n_embd, columns, expert_bits)
        self.output_experts = make_experts(router.num_experts, ffd_hidden, n_embd, expert_bits)
        self.gate = router
        self.activation = activation
        self.exchange: Exchange | None = None
        """Takes tokens to experts that other processes hold; None: all of them are here."""

    def forward(self, x: Tensor) -> tuple[Tensor, RouteTopK]:
        """x [..., D] -> y [..., D] and how its tokens (leading dimensions flattened) were routed."""
        tokens = x.reshape(-1, x.shape[-1])
        route = self.gate(tokens)
        layout = arrange(route, self.exchange)
        if is_plain(self.experts, ExpertLinear) and is_plain(self.output_experts, ExpertLinear):
            weights = self.experts.segments, self.output_experts.segments
            if isinstance(layout, Dispatch):
                y = layout.apply(self._transform, tokens, weights, gates=route.gates)
            else:
                y = self._transform(tokens, *weights, layout, route.gates)
        else:
            hidden = self.experts(tokens, layout, activation=self.activation)
            y = self.output_experts(hidden, layout, x_order="expert", out_order="token", gates=route.gates)
        return y.view_as(x), route

    def _transform(
        self, x: Tensor, up: Segments, down: Segments, layout: ExpertLayout, gates: Tensor | None = None
    ) -> Tensor:
        """Without gates: that of one choice is 1."""
        if gates is None:
            gates = x.new_ones(len(x), 1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        return ops.expert_ffn(x, up, down, layout, gates, activation=self.activation)
