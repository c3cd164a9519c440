"""The cells of a GPU: those of ``benchmarks/ops`` at a GPU's sizes, built on the default device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from ..cells import NOT_SLOWER, OURS, Cell, Race, dtype_name
from ..inputs import layer_shape
from ..ops import bench_expert_ffn, bench_route_topk, bench_stick_attention, bench_stick_attention_decode
from .peers import attention_peers, expert_peers

DTYPES = (torch.bfloat16, torch.float32)
LONGEST_DENSE = 2048
"""Beyond it the dense formulations of attention take too much memory."""


def _cell(
    section: str, case: str, build: Callable[[], Race], dtype: torch.dtype, tokens: int, direction: str, kind: str
) -> Cell:
    tolerances = {
        bench_stick_attention.SECTION: bench_stick_attention.TOLERANCES,
        bench_stick_attention_decode.SECTION: bench_stick_attention_decode.TOLERANCES,
        bench_expert_ffn.SECTION: bench_expert_ffn.TOLERANCES,
        bench_route_topk.SECTION: bench_route_topk.TOLERANCES,
    }
    tags = {"dtype": dtype_name(dtype), "tokens": tokens, "direction": direction, "kind": kind}
    title = f"{dtype_name(dtype)} {direction}, T {tokens}, {case}"
    return Cell(section, title, 0, build, tolerances[section][dtype], (NOT_SLOWER,), tags)


def attention_cells(quick: bool) -> Iterator[Cell]:
    """Heads of 64 and 128 at equal width, exact and with early exit; then grouped queries; then one head, V is K."""
    width, peers = (128, {}) if quick else (2048, attention_peers())
    for tokens in (64,) if quick else (1024, 4096, 16384):
        for dtype in DTYPES:
            for backward in (False, True):
                direction = "forward+backward" if backward else "forward"
                build = partial(
                    bench_stick_attention.race, tokens, dtype, backward=backward, dense_peers=tokens <= LONGEST_DENSE
                )
                for dim in (64, 128):
                    for case, epsilon in (("ε = 0", 0.0), ("early exit", None)):
                        yield _cell(
                            bench_stick_attention.SECTION,
                            f"{width // dim} heads of {dim}, {case}",
                            partial(build, k=1, heads=width // dim, head_dim=dim, epsilon=epsilon, peers=peers),
                            dtype,
                            tokens,
                            direction,
                            case,
                        )
                shape = layer_shape(quick)
                for case, sizes in (
                    ("two queries per key", {"heads": shape.heads, "head_dim": shape.head_dim}),
                    ("one head, V is K", {"heads": 1, "head_dim": shape.att_hidden, "v_is_k": True}),
                ):
                    yield _cell(
                        bench_stick_attention.SECTION,
                        f"{case}, ε = 0",
                        partial(build, k=shape.k, epsilon=0.0, **sizes),
                        dtype,
                        tokens,
                        direction,
                        case,
                    )


def decode_cells(quick: bool) -> Iterator[Cell]:
    for cell in bench_stick_attention_decode.cells(quick):
        if cell.threads == 1:
            yield replace(cell, threads=0, goals=(NOT_SLOWER,))


def expert_cells(quick: bool) -> Iterator[Cell]:
    peers = {} if quick else expert_peers()
    for tokens in (32,) if quick else (1, 512, 4096, 16384):
        for dtype in DTYPES:
            for backward in (False, True):
                yield _cell(
                    bench_expert_ffn.SECTION,
                    "top-2",
                    partial(
                        bench_expert_ffn.race,
                        tokens,
                        dtype,
                        quick=quick,
                        backward=backward,
                        into_grad=False,
                        peers=peers,
                    ),
                    dtype,
                    tokens,
                    "forward+backward" if backward else "forward",
                    "top-2",
                )


def router_cells(quick: bool) -> Iterator[Cell]:
    for tokens in (32,) if quick else (1, 4096, 16384):
        for gate in ("mlp", "linear"):
            for dtype in DTYPES:
                for backward in (False, True):
                    yield _cell(
                        bench_route_topk.SECTION,
                        f"{gate} gate",
                        partial(bench_route_topk.race, tokens, dtype, quick=quick, gate=gate, backward=backward),
                        dtype,
                        tokens,
                        "forward+backward" if backward else "forward",
                        gate,
                    )


SECTIONS = {
    bench_stick_attention.SECTION: attention_cells,
    bench_stick_attention_decode.SECTION: decode_cells,
    bench_expert_ffn.SECTION: expert_cells,
    bench_route_topk.SECTION: router_cells,
}


def usable(race: Race) -> tuple[Race, dict[str, str]]:
    """The race without the peers that fail here, and why they do: other libraries do not serve every GPU and shape."""
    kept, failures = [], {}
    for contestant in race.contestants:
        try:
            if contestant.prepare is not None:
                contestant.prepare()
            contestant.run()
        except Exception as error:
            if contestant.name == OURS:
                raise
            failures[contestant.name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            kept.append(contestant)
    return replace(race, contestants=tuple(kept)), failures
