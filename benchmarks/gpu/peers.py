"""Other libraries' kernels behind the signatures of our races, where they are installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moduleformer_ext.types import ExpertLayout

from ..cells import Peer

Call = Callable[[], Tensor]


def attention_peers() -> dict[str, Peer]:
    """Of q [B, T, 1, H, D], k and v [B, T, H, D]; results are q's shape."""
    peers: dict[str, Peer] = {}
    try:
        from stickbreaking_attention.sb_attn import sb_attn
    except ImportError:
        pass
    else:

        def triton(q: Tensor, k: Tensor, v: Tensor) -> Call:
            def call() -> Tensor:
                heads_first = (t.transpose(1, 2) for t in (q.squeeze(2), k, v))
                output, _ = sb_attn(*heads_first, attend_current=True)
                return output.transpose(1, 2).unsqueeze(2)

            return call

        peers["stickbreaking-attention (Triton)"] = Peer(triton)
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        pass
    else:

        def flash(q: Tensor, k: Tensor, v: Tensor) -> Call:
            return lambda: flash_attn_func(q.squeeze(2), k, v, causal=True).unsqueeze(2)

        peers["flash-attn (softmax)"] = Peer(flash, comparable=False)
    return peers


def expert_peers() -> dict[str, Peer]:
    """Of x [T, D], up [E, D, F], down [E, F, D], a layout and gates [T, K]; results are x's shape."""
    peers: dict[str, Peer] = {}
    try:
        from scattermoe.parallel_experts import parallel_linear
    except ImportError:
        pass
    else:

        def scattermoe(x: Tensor, up: Tensor, down: Tensor, layout: ExpertLayout, gates: Tensor) -> Call:
            experts = torch.arange(layout.num_experts, device=x.device)
            expert_of_place = experts.repeat_interleave(layout.counts, output_size=layout.num_slots)
            routing = expert_of_place, layout.slot_order.long(), layout.offsets[1:].long()

            def call() -> Tensor:
                hidden = parallel_linear(x, up, layout.num_choices, *routing, grouped_out=True)
                hidden = F.gelu(hidden, approximate="tanh")
                return parallel_linear(hidden, down, 1, *routing, gates=gates.to(x.dtype), grouped_in=True)

            return call

        peers["scattermoe (Triton)"] = Peer(scattermoe)
    return peers
