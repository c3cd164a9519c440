"""The experts of a Mixtral in transformers: our implementation, and those that come with it."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from .inputs import LayerShape, expert_weights, normal, random_gates
from .machine import DTYPES, Work
from .race import BEST_PEER, OURS, Backward, Race, Run, Tolerance, contestant

moe = pytest.importorskip("transformers.integrations.moe")

pytestmark = pytest.mark.benchmark(group="Experts of transformers")
# The others round to bfloat16 between all steps, so that a single sum may lose a bit or two.
TOLERANCES = {"fp32": Tolerance(1e-4), "bf16": Tolerance(0.05, quantile=0.95)}
MOST_EXPERTS = 8
"""Eager's backward makes a gradient of all experts for each of them."""
MOST_TOKENS_BATCHED = 16
"""batched_mm copies the matrices for every slot."""


def experts_of(shape: LayerShape, dtype: torch.dtype) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts = min(MOST_EXPERTS, shape.ffn_experts)
    config = MixtralConfig(hidden_size=shape.d, intermediate_size=shape.ffn_hidden, num_local_experts=experts)
    with torch.device("meta"):
        module = MixtralExperts(config)
    up = expert_weights(experts, shape.d, 2 * shape.ffn_hidden, dtype, seed=1)
    down = expert_weights(experts, shape.ffn_hidden, shape.d, dtype, seed=2)
    module.gate_up_proj = nn.Parameter(up.transpose(1, 2).contiguous(), requires_grad=False)
    module.down_proj = nn.Parameter(down.transpose(1, 2).contiguous(), requires_grad=False)
    return module


@pytest.mark.cases(
    "threads dtype direction tokens",
    cpu=[*product([2, 1], DTYPES, ("forward", "forward+backward"), [1, 16, 512, 2048, 4096])],
    cuda=[*product([0], DTYPES, ("forward", "forward+backward"), [1, 16, 512, 2048, 4096])],
)
def test_hf_experts(run: Run, shape: LayerShape, threads: int, dtype: str, direction: str, tokens: int) -> None:
    from moduleformer_ext.hf.experts import experts_forward

    kind, backward = DTYPES[dtype], direction != "forward"
    module = experts_of(shape, kind)
    x = normal(tokens, shape.d, dtype=kind)
    weights, ids = random_gates(tokens, module.num_experts, shape.k)
    ids = ids.long()
    train = None
    if backward:
        leaves: dict[str, Tensor] = {
            "x": x,
            "up": module.gate_up_proj,
            "down": module.down_proj,
            "weights": weights,
        }
        train = Backward(leaves, normal(tokens, shape.d, dtype=kind, seed=3))
    functions = {
        OURS: experts_forward,
        "eager": type(module).forward.__wrapped__,
        "grouped_mm": moe.grouped_mm_experts_forward,
    }
    if tokens <= MOST_TOKENS_BATCHED:
        functions["batched_mm"] = moe.batched_mm_experts_forward
    contestants = [contestant(name, partial(f, module, x, ids, weights), train) for name, f in functions.items()]
    passes = 3 if backward else 1
    per_slot = 3 * shape.d * shape.ffn_hidden
    read = len(ids.unique()) * per_slot * x.element_size() * (2 if backward else 1)
    work = Work(kind, passes * 2 * tokens * shape.k * per_slot, read)
    run(Race(contestants, TOLERANCES[dtype], work, {BEST_PEER: 1.3} if threads and tokens >= 512 else {}))
