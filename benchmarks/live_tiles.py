"""How much of an attention matrix has to be visited once sticks run out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def live_tile_fraction(
    q: Tensor, k: Tensor, epsilon: float, *, tile: int = 64, max_heads: int = 2, scale: float | None = None
) -> float:
    """The share of causal (query tile, key tile) pairs, ``tile`` tokens each, that some row of the query tile enters
    with more than ``epsilon`` of its stick.

    q [B, T, K, H, D], k [B, T, H, D]. Counted on the first ``max_heads`` heads of the first sequence: random inputs
    make all heads alike.
    """
    if epsilon == 0:
        return 1.0
    tokens, _, heads, dim = q.shape[1:]
    scale = dim**-0.5 if scale is None else scale
    tiles = -(-tokens // tile)
    live = 0
    visited_heads = min(heads, max_heads)
    positions = torch.arange(tokens, device=q.device)
    for head in range(visited_heads):
        keys = k[0, :, head].float()
        for index in range(tiles):
            rows = slice(index * tile, min(tokens, (index + 1) * tile))
            seen = rows.stop
            logits = torch.einsum("tkd,sd->tks", q[0, rows, :, head].float(), keys[:seen]) * scale
            visible = positions[:seen] <= positions[rows, None]
            log_leave = F.logsigmoid(-logits).masked_fill(~visible[:, None], 0)
            padded = F.pad(log_leave, (0, (index + 1) * tile - seen)).unflatten(-1, (index + 1, tile)).sum(-1)
            # log of what is left at each tile's right edge: the sum over the newer tiles
            left = (padded.flip(-1).cumsum(-1) - padded.flip(-1)).exp()
            live += int((left > epsilon).any(0).any(0).sum())
    return live / (visited_heads * tiles * (tiles + 1) / 2)


@torch.no_grad()
def live_keys(q: Tensor, k: Tensor, epsilon: float, *, scale: float | None = None) -> int:
    """How many of the newest keys the neediest head of one query reads before no more than ``epsilon`` of its stick is
    left. q [K, H, D], k [S, H, D] with S >= 1.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    log_leave = F.logsigmoid(torch.einsum("khd,shd->khs", q.float(), k.float()) * -scale)
    left_before = (log_leave.flip(-1).cumsum(-1) - log_leave.flip(-1)).exp()
    return int((left_before > epsilon).flatten(0, 1).any(0).sum()) if epsilon > 0 else k.shape[0]
