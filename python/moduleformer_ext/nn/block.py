"""One layer of the model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moduleformer_ext.nn.attention import MixtureOfAttention
from moduleformer_ext.nn.decode import Past, decode
from moduleformer_ext.nn.experts import MixtureOfFFN
from moduleformer_ext.types import RouteTopK


class BlockRoutes(NamedTuple):
    """How a block routed its tokens."""

    attention: RouteTopK
    ffn: RouteTopK


pytree._register_namedtuple(BlockRoutes, serialized_type_name="moduleformer_ext.nn.BlockRoutes")


class Block(nn.Module):
    """x += attention(norm(x)); x += ffn(norm(x))."""

    def __init__(
        self,
        n_embd: int,
        attention: MixtureOfAttention,
        ffn: MixtureOfFFN,
        *,
        layer_norm_epsilon: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, eps=layer_norm_epsilon)
        self.attn = attention
        self.ln_2 = nn.LayerNorm(n_embd, eps=layer_norm_epsilon)
        self.mlpf = ffn
        self.resid_dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        past: Past | None = None,
        key_padding_mask: Tensor | None = None,
        use_cache: bool = False,
        output_routes: bool = True,
    ) -> tuple[Tensor, BlockRoutes | None, Past | None]:
        """x [B, T, D] -> x [B, T, D], the routing decisions if ``output_routes``, and the extended cache if
        ``use_cache``.
        """
        decoded = None if past is None else decode(self, x, past, key_padding_mask, output_routes)
        if decoded is not None:
            x, routes, present = decoded
            return x, None if routes is None else BlockRoutes(*routes), present if use_cache else None
        attended, attention_route, present = self.attn(self.ln_1(x), past, key_padding_mask, use_cache)
        x = x + self.resid_dropout(attended)
        transformed, ffn_route = self.mlpf(self.ln_2(x))
        x = x + self.resid_dropout(transformed)
        return x, BlockRoutes(attention_route, ffn_route) if output_routes else None, present
