"""One query against a cache: ours, the dense formulation, and softmax attention of the same shape."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch

from moduleformer_ext import ops, reference

from ..inputs import ONE_HEAD, TWO_QUERIES, LayerShape, live_keys, normal
from ..machine import DTYPES, Work
from ..peers.attention import SDPA
from ..race import OURS, REFERENCE, Race, Run, Tolerance, contestant

pytestmark = pytest.mark.benchmark(group="One query against a cache")
TOLERANCES = {"fp32": Tolerance(1e-3), "bf16": Tolerance(2e-2)}
CASES = (DTYPES, [512, 8192], [ONE_HEAD, TWO_QUERIES], ["exact", "early exit"])


@pytest.mark.cases("threads dtype tokens heads sticks", cpu=[*product([1, 2], *CASES)], cuda=[*product([0], *CASES)])
def test_stick_attention_decode(
    run: Run, shape: LayerShape, threads: int, dtype: str, tokens: int, heads: str, sticks: str
) -> None:
    """`tokens` are those in the cache."""
    sizes, kind = shape.attention(heads), DTYPES[dtype]
    q = normal(1, 1, sizes["heads"], sizes["k"], sizes["head_dim"], dtype=kind)
    keys, values = (normal(1, tokens, sizes["heads"], sizes["head_dim"], dtype=kind, seed=seed) for seed in (2, 3))
    cache = (keys, None if heads == ONE_HEAD else values, torch.tensor([tokens], dtype=torch.int32))
    softmax_k = keys.transpose(1, 2)
    softmax_v = softmax_k if heads == ONE_HEAD else values.transpose(1, 2)
    softmax = partial(torch.nn.functional.scaled_dot_product_attention, q[0], softmax_k, softmax_v)
    epsilon = 0.0 if sticks == "exact" else None
    contestants = [
        contestant(OURS, partial(ops.stick_attention_decode, q, *cache, stick_epsilon=epsilon)),
        contestant(REFERENCE, partial(reference.stick_attention_decode, q, *cache)),
        contestant(SDPA, softmax, comparable=False),
    ]
    live = live_keys(q[0, 0].transpose(0, 1), keys[0], 2.0**-24 if epsilon is None else epsilon)
    read = live * keys[0, 0].nbytes * (1 if heads == ONE_HEAD else 2)
    work = Work(kind, bytes_read=read)
    run(Race(contestants, TOLERANCES[dtype], work, {SDPA: 1.0} if threads else {}, {"live keys": live}))
