"""Operands whose walks end where one wants, tile of rows by tile of rows, and where they end."""

import torch

TILE = 64
"""Query rows that exit early as one, and keys walked at a time, of the CUDA kernels up to a head dim of 128."""


def rows_of_logits(means, t_k, dim, dtype):
    """q of a tile of rows for each mean logit, at the end of t_k keys; k and v."""
    generator = torch.Generator().manual_seed(7)

    def normal(tokens):
        return torch.randn(1, tokens, 1, dim, generator=generator)

    q, k, v = normal(TILE * len(means)) * 0.3, normal(t_k), normal(t_k)
    k[..., 0] = 2.0
    q[..., 0] = torch.tensor(means).repeat_interleave(TILE).view(1, -1, 1) * dim**0.5 / 2
    return tuple(x.to(dtype) for x in (q, k, v))


def first_tiles(q, k, epsilon):
    """The oldest tile of keys that each row's tile visits; one head, every query at its own key."""
    t_q, t_k = q.shape[1], k.shape[1]
    logits = q[0, :, 0].double() @ k[0, :, 0].double().T * q.shape[-1] ** -0.5
    seen = torch.arange(t_k) <= torch.arange(t_k - t_q, t_k)[:, None]
    log_rest = torch.where(seen, -torch.nn.functional.softplus(logits), 0.0)
    edges = range(0, t_k, TILE)
    rest = torch.stack([log_rest[:, edge:].sum(1) for edge in edges])  # after the tile at each edge
    exhausted = rest.view(len(edges), -1, TILE).amax(2) <= torch.tensor(epsilon).double().log()
    newest = torch.arange(t_k - t_q, t_k).view(-1, TILE)[:, -1] // TILE
    ends = [max([i for i in range(n + 1) if exhausted[i, tile]], default=0) for tile, n in enumerate(newest.tolist())]
    return torch.tensor(ends, dtype=torch.int32).repeat_interleave(TILE).view(1, -1, 1)
