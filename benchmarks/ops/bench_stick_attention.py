"""Stick-breaking attention: ours, dense formulations of it, and softmax attention of the same shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor

from moduleformer_ext import ops

from ..cells import (
    NOT_SLOWER,
    OURS,
    REFERENCE,
    Cell,
    Contestant,
    Goal,
    Outputs,
    Peer,
    Race,
    Tolerance,
    Work,
    dtype_name,
    forward_backward,
    forward_only,
)
from ..inputs import attention_inputs, layer_shape, normal
from ..live_tiles import live_tile_fraction
from ..peers.attention import DenseStickAttention, cumsum_stick_attention, softmax_attention, softmax_inputs
from ..pytest_cells import run_cell

SECTION = "attention"
SDPA = "SDPA (softmax)"
LONGEST_DENSE = {2: 2048, 1: 512}
"""By threads: beyond it the dense formulations take more than 10 GB, or too many seconds."""
CHECKED_ROWS = 32
"""Checked where there is no dense formulation."""
LONG_TAIL = -8.0
TOLERANCES = {torch.float32: Tolerance(1e-3), torch.bfloat16: Tolerance(0.1, quantile=0.99)}


def _ours(q: Tensor, k: Tensor, v: Tensor | None, epsilon: float | None) -> Tensor:
    # [B, T, K, H, D] -> [B, T, H, K, D] and back: views
    return ops.stick_attention(q.transpose(2, 3), k, v, stick_epsilon=epsilon).transpose(2, 3)


def _matrix_flops(q: Tensor, backward: bool) -> float:
    """Two products forward, five more backward (scores again, dA, dV, dQ, dK), over the causal half."""
    _, tokens, choices, heads, dim = q.shape
    pairs = choices * heads * tokens * (tokens + 1) / 2
    return 2 * dim * pairs * (7 if backward else 2)


def _last_rows(q: Tensor, k: Tensor, v: Tensor, outputs: Outputs) -> tuple[Outputs, Outputs]:
    """The newest queries' rows, as they are and as they should be."""
    with torch.no_grad():
        wanted = cumsum_stick_attention(*(t.float() for t in (q[:, -CHECKED_ROWS:], k, v)))
    return {"y": outputs["y"][:, -CHECKED_ROWS:]}, {"y": wanted}


def race(
    tokens: int,
    dtype: torch.dtype,
    *,
    k: int,
    heads: int,
    head_dim: int,
    backward: bool,
    epsilon: float | None,
    mean_logit: float = 0.0,
    v_is_k: bool = False,
    against_exact: bool = False,
    dense_peers: bool = True,
    peers: Mapping[str, Peer] | None = None,
) -> Race:
    """The contestants of one cell. ``against_exact`` adds ours with epsilon 0, to see what the early exit saves;
    ``peers`` take q, k and v.
    """
    q, keys, values = attention_inputs(tokens, k, heads, head_dim, dtype, mean_logit=mean_logit)
    cotangent = normal(*q.shape, dtype=dtype, seed=5)
    v = keys if v_is_k else values
    softmax_qkv = softmax_inputs(q, keys, v)
    softmax_leaves = dict(zip("qkv", softmax_qkv, strict=True))
    leaves = {"q": q, "k": keys} if v_is_k else {"q": q, "k": keys, "v": values}

    def contestant(name: str, function: Callable[[], Tensor], comparable: bool = True) -> Contestant:
        if not backward:
            return forward_only(name, function, comparable=comparable)
        for leaf in leaves.values():
            leaf.requires_grad_()
        return forward_backward(name, function, leaves, cotangent, comparable=comparable)

    def yardstick() -> Contestant:
        function = partial(softmax_attention, *softmax_qkv)
        if not backward:
            return forward_only(SDPA, function, comparable=False)
        for leaf in softmax_leaves.values():
            leaf.requires_grad_()
        d_out = normal(*softmax_qkv[0].shape, dtype=dtype, seed=5)
        return forward_backward(SDPA, function, softmax_leaves, d_out, comparable=False)

    contestants = [contestant(OURS, partial(_ours, q, keys, None if v_is_k else v, epsilon))]
    if against_exact:
        contestants.append(contestant("ours, ε = 0", partial(_ours, q, keys, None if v_is_k else v, 0.0)))
    oracle = None
    if dense_peers:
        dense = DenseStickAttention(tokens, dtype)
        contestants.append(contestant(REFERENCE, partial(dense, q, keys, v)))
        contestants.append(contestant("cumsum", partial(cumsum_stick_attention, q, keys, v)))
    else:
        oracle = partial(_last_rows, q, keys, v)
    for name, peer in (peers or {}).items():
        contestants.append(contestant(name, peer.bind(q, keys, v), peer.comparable))
    contestants.append(yardstick())
    effective = 2.0**-24 if epsilon is None else epsilon
    facts = {"live tiles": live_tile_fraction(q.detach(), keys.detach(), effective)}
    return Race(tuple(contestants), Work(dtype, _matrix_flops(q, backward)), facts, oracle)


def cells(quick: bool = False) -> Iterator[Cell]:
    """Every length, type and direction with ε = 0; then early exit, long tails and one head of 1024."""
    shape = layer_shape(quick)
    common: dict[str, object] = {"k": shape.k, "heads": shape.heads, "head_dim": shape.head_dim}
    lengths = (64,) if quick else (512, 1024, 2048, 4096)
    dtypes = (torch.float32, torch.bfloat16)

    def cell(
        case: str,
        tokens: int,
        dtype: torch.dtype,
        threads: int,
        backward: bool,
        goals: tuple[Goal, ...],
        **options: object,
    ) -> Cell:
        direction = "forward+backward" if backward else "forward"
        dense = tokens <= LONGEST_DENSE[threads] and "against_exact" not in options
        build = partial(race, tokens, dtype, backward=backward, dense_peers=dense, **{**common, **options})
        tags = {"dtype": dtype_name(dtype), "tokens": tokens, "direction": direction, "kind": case}
        title = f"{dtype_name(dtype)} {direction}, T {tokens}, {case}"
        return Cell(SECTION, title, threads, build, TOLERANCES[dtype], goals, tags)

    for threads in (2, 1):
        for tokens in lengths if threads == 2 else lengths[::2]:
            for dtype in dtypes:
                for backward in (False, True):
                    bound = {torch.float32: 1.15, torch.bfloat16: 3.0 if backward else 1.5}[dtype]
                    goals = (Goal("speedup", bound, SDPA), Goal("memory", 1.0, SDPA), NOT_SLOWER)
                    yield cell("ε = 0", tokens, dtype, threads, backward, goals, epsilon=0.0)
    longest = lengths[-1]
    for dtype in dtypes:
        for backward in (False, True):
            exit_goal = (Goal("speedup", 5.0, SDPA),)
            tail_goal = (Goal("speedup", 1.0, "ours, ε = 0"),)
            exits = {"epsilon": None, "against_exact": True}
            yield cell("early exit, logits N(0, 1)", longest, dtype, 2, backward, exit_goal, **exits)
            tail = {**exits, "mean_logit": LONG_TAIL}
            yield cell("long tail, logits N(-8, 1)", longest, dtype, 2, backward, tail_goal, **tail)
    one_head = {"heads": 1, "head_dim": shape.att_hidden, "v_is_k": True}
    for dtype in dtypes:
        for backward in (False, True):
            case = f"one head of {shape.att_hidden}, V is K, ε = 0"
            yield cell(case, lengths[len(lengths) // 2], dtype, 2, backward, (NOT_SLOWER,), epsilon=0.0, **one_head)


@pytest.mark.parametrize("cell", list(cells()), ids=lambda cell: cell.key)
def test_stick_attention(cell: Cell, benchmark: object) -> None:
    run_cell(cell, benchmark)
