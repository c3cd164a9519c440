"""A dense projection of a few tokens: ours and PyTorch's."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch.nn.functional as F

from moduleformer_ext import ops

from ..inputs import LayerShape, normal
from ..machine import DTYPES, Work, evict
from ..race import OURS, REFERENCE, Race, Run, Tolerance, contestant

pytestmark = pytest.mark.benchmark(group="Dense projection of a few tokens")
TOLERANCES = {"fp32": Tolerance(1e-4), "bf16": Tolerance(2e-2)}


@pytest.mark.cases(
    "threads dtype tokens width", cpu=[*product([1, 2], DTYPES, [1, 8], ["projection", "head"])], cuda=[]
)
def test_linear_decode(run: Run, shape: LayerShape, threads: int, dtype: str, tokens: int, width: str) -> None:
    x = normal(tokens, shape.d, dtype=DTYPES[dtype])
    rows = shape.vocab_size if width == "head" else shape.att_hidden
    weight = normal(rows, shape.d, dtype=DTYPES[dtype], seed=1)
    contestants = [
        contestant(OURS, partial(ops.linear_decode, x, weight), prepare=evict),
        contestant(REFERENCE, partial(F.linear, x, weight), prepare=evict),
    ]
    run(Race(contestants, TOLERANCES[dtype], Work(DTYPES[dtype], 2 * tokens * weight.numel(), weight.nbytes)))
