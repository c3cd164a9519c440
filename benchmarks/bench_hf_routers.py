"""The router of a DeepSeek V3 in transformers: its own forward, and ours.

Sigmoids, a bias in the choice, groups of experts, renormalised and scaled gates, all in float32.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from .inputs import LayerShape, normal
from .machine import Work
from .race import BEST_PEER, OURS, Backward, Race, Run, Tolerance, contestant

deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")

pytestmark = pytest.mark.benchmark(group="Routers of transformers")
# A token whose eighth and ninth expert nearly tie may go to either.
TOLERANCE = Tolerance(1e-3, quantile=0.99)
GROUPS = 8


def router_of(shape: LayerShape) -> nn.Module:
    """Of that model's number of experts, 32 in each of 8 groups, for tokens of width 2 D."""
    config = deepseek.DeepseekV3Config(hidden_size=2 * shape.d, n_routed_experts=GROUPS * shape.ffn_experts)
    router = deepseek.DeepseekV3TopkRouter(config)
    router.weight = nn.Parameter(normal(*router.weight.shape, std=router.weight.shape[1] ** -0.5, seed=1))
    router.e_score_correction_bias = normal(router.weight.shape[0], std=0.1, seed=2)
    return router


@pytest.mark.cases(
    "threads direction tokens",
    cpu=[*product([2, 1], ("forward", "forward+backward"), [1, 16, 512, 4096])],
    cuda=[*product([0], ("forward", "forward+backward"), [1, 16, 512, 4096])],
)
def test_hf_routers(run: Run, shape: LayerShape, threads: int, direction: str, tokens: int) -> None:
    from moduleformer_ext.hf import _routers

    router = router_of(shape)
    x = normal(tokens, router.weight.shape[1])
    train = None
    if direction != "forward":
        train = Backward({"x": x, "weight": router.weight}, normal(tokens, router.weight.shape[0], seed=3))
    rule = _routers.rule_of(router)

    def dense(route: partial[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """The gate of every expert, 0 of those that were not chosen: the order of the chosen ones is free."""
        results = route()
        gates, ids = (results[rule.returns.index(which)] for which in (1, 2))
        return torch.zeros(tokens, router.weight.shape[0]).scatter(1, ids, gates)

    ways = {OURS: partial(_routers.route, router, rule), "eager": router.forward}
    contestants = [contestant(name, partial(dense, partial(way, x)), train) for name, way in ways.items()]
    passes = 3 if train else 1
    work = Work(torch.float32, passes * 2 * tokens * router.weight.numel(), x.nbytes + router.weight.nbytes)
    run(Race(contestants, TOLERANCE, work, {BEST_PEER: 1.0} if threads else {}))
