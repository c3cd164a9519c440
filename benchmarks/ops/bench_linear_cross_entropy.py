"""The loss of a language model's head over its whole vocabulary: ours, with logits as a whole, and PyTorch's own."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moduleformer_ext import ops

from ..inputs import LayerShape, generator, normal
from ..machine import DTYPES, Work
from ..race import MEMORY, OURS, REFERENCE, Backward, Race, Run, Tolerance, contestant

pytestmark = pytest.mark.benchmark(group="Loss of the head")
TOLERANCES = {"fp32": Tolerance(1e-4), "bf16": Tolerance(5e-2)}


def whole_logits(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), target)


def torch_chunked(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """That of torch 2.13, which has neither a z-loss nor a graph for torch.compile."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, target, options=options).float()


@pytest.mark.cases(
    "threads dtype direction tokens",
    cpu=[*product([1], DTYPES, ["forward", "forward+backward"], [1024])],
    cuda=[*product([0], DTYPES, ["forward", "forward+backward"], [4096])],
)
def test_linear_cross_entropy(
    run: Run, shape: LayerShape, threads: int, dtype: str, direction: str, tokens: int
) -> None:
    kind, backward = DTYPES[dtype], direction != "forward"
    x = normal(tokens, shape.d, dtype=kind)
    weight = normal(shape.vocab_size, shape.d, dtype=kind, std=shape.d**-0.5, seed=1)
    target = torch.randint(shape.vocab_size, (tokens,), generator=generator(2))
    train = Backward({"x": x, "weight": weight}, torch.ones(())) if backward else None
    functions = {OURS: ops.linear_cross_entropy, REFERENCE: whole_logits}
    if hasattr(F, "linear_cross_entropy"):
        functions["torch chunked"] = torch_chunked
    contestants = [contestant(name, partial(f, x, weight, target), train) for name, f in functions.items()]
    flops = 2 * tokens * weight.numel() * (3 if backward else 1)
    run(Race(contestants, TOLERANCES[dtype], Work(kind, flops, weight.nbytes), {MEMORY + REFERENCE: 1.0}))
