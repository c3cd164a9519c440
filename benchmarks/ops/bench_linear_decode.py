"""A dense projection of a few tokens: ours and PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from moduleformer_ext import ops

from ..cells import NOT_SLOWER, OURS, REFERENCE, Cell, Race, Tolerance, Work, dtype_name, forward_only
from ..inputs import layer_shape, normal
from ..machine import evict
from ..pytest_cells import run_cell

SECTION = "linear-decode"
TOLERANCES = {torch.float32: Tolerance(1e-4), torch.bfloat16: Tolerance(2e-2)}
VOCABULARY = 50304


def race(rows: int, out: int, dtype: torch.dtype, *, quick: bool) -> Race:
    size = layer_shape(quick).d
    x, weight = normal(rows, size, dtype=dtype), normal(out, size, dtype=dtype, seed=1)
    contestants = (
        forward_only(OURS, partial(ops.linear_decode, x, weight), prepare=evict),
        forward_only(REFERENCE, partial(F.linear, x, weight), prepare=evict),
    )
    return Race(contestants, Work(dtype, 2 * rows * out * size, weight.nbytes))


def cells(quick: bool = False) -> Iterator[Cell]:
    shape = layer_shape(quick)
    for threads in (1, 2):
        for dtype in (torch.float32, torch.bfloat16):
            for name, out in (("projection", shape.att_hidden), ("head", 4 * shape.d if quick else VOCABULARY)):
                for rows in (1, 8):
                    yield Cell(
                        SECTION,
                        f"{dtype_name(dtype)}, {name} of {out}, {rows} {'row' if rows == 1 else 'rows'}",
                        threads,
                        partial(race, rows, out, dtype, quick=quick),
                        TOLERANCES[dtype],
                        (NOT_SLOWER,),
                        {"dtype": dtype_name(dtype), "tokens": rows, "direction": "forward", "kind": name},
                    )


@pytest.mark.parametrize("cell", list(cells()), ids=lambda cell: cell.key)
def test_linear_decode(cell: Cell, benchmark: object) -> None:
    run_cell(cell, benchmark)
