"""Upper bounds on what the router's kernels do, counted on the emulated device: a regression fails here.

1024 tokens, 256 features, a hidden layer of 256, 32 experts. PTX is counted, not SASS.
"""

import pytest
import torch
from devices import EMULATED

from moduleformer_ext import ops

pytestmark = pytest.mark.skipif(not EMULATED, reason="counts need the emulated device")

TOKENS, DIM, HIDDEN, EXPERTS = 1024, 256, 256, 32
WEIGHTS = ("route_topk_backward_weights", "route_topk_backward_pieces")


def launches(gate, dtype, tokens=TOKENS, dim=DIM, experts=EXPERTS, x_wants_gradient=True):
    """Statistics of a forward and a backward pass, by the kernel's name."""
    import cudasim

    torch.manual_seed(0)
    x = torch.randn(tokens, dim).to(dtype).requires_grad_(x_wants_gradient)
    weight = torch.randn(experts, HIDDEN if gate == "mlp" else dim).to(dtype).requires_grad_()
    hidden = (torch.randn(HIDDEN, dim).to(dtype).requires_grad_(), torch.zeros(HIDDEN, requires_grad=True))
    cudasim.reset_stats()
    route = ops.route_topk_mlp(x, *hidden, weight, 2) if gate == "mlp" else ops.route_topk_linear(x, weight, 2)
    route.gates.square().sum().backward()
    return {s["kernel"].split("router::")[1].split("<")[0].split("(")[0]: s for s in cudasim.stats()}


def sectors(*stats):
    return sum(s["global_load_sectors"] + s["global_store_sectors"] for s in stats)


@pytest.mark.parametrize(
    ("gate", "dtype", "instructions", "wavefronts", "traffic"),
    [
        # Of 68.3, 6.1, 135.7 and 14.5 million instructions, 185, 18, 332 and 37 thousand wavefronts, 331, 35, 462 and
        # 51 thousand sectors, when all tokens were summed by one block per 32 x 64 results.
        ("mlp", torch.bfloat16, 20e6, 110e3, 275e3),
        ("linear", torch.bfloat16, 2.3e6, 15e3, 35e3),
        ("mlp", torch.float32, 60e6, 180e3, 380e3),
        ("linear", torch.float32, 9e6, 30e3, 57e3),
    ],
)
def test_weight_gradients(gate, dtype, instructions, wavefronts, traffic):
    stats = launches(gate, dtype)
    weights = [stats[name] for name in WEIGHTS]
    assert sum(s["thread_instructions"] for s in weights) <= instructions
    assert sum(s["shared_wavefronts"] for s in weights) <= wavefronts
    assert sectors(*weights) <= traffic
    for s in stats.values():
        assert s["shared_excess_wavefronts"] == 0, s["kernel"]
    size = torch.finfo(dtype).bits // 8
    assert weights[0]["cp_async_bytes"] >= TOKENS * (DIM * size + EXPERTS * 4)  # x, and a gradient, come by cp.async


def test_weight_gradients_of_many_tokens_are_many_blocks_work():
    """Of 8 x 64 results, which one block computed when it summed all tokens."""
    stats = launches("linear", torch.bfloat16, tokens=32768, dim=64, experts=8, x_wants_gradient=False)
    assert stats[WEIGHTS[0]]["grid"][0] >= 64


@pytest.mark.parametrize(("dim", "hidden_blocks"), [(DIM, 2 * 4 * 2), (512, 4 * 4 * 2)])
def test_pieces_are_as_long_as_suffices(dim, hidden_blocks):
    stats = launches("mlp", torch.bfloat16, tokens=512, dim=dim, x_wants_gradient=False)
    experts, bias = 2 * 2, HIDDEN // 32
    assert stats[WEIGHTS[0]]["grid"] == [hidden_blocks + experts + bias, 1, 1]


def test_operands_come_asynchronously_and_few_tokens_are_many_blocks():
    stats = launches("mlp", torch.bfloat16)
    forward = stats["route_topk_forward"]
    assert forward["grid"] == [TOKENS // 16, 1, 1]
    x, v, activated = TOKENS * DIM * 2, HIDDEN * DIM * 2, TOKENS * HIDDEN * 4
    assert forward["cp_async_bytes"] == HIDDEN // 128 * x + TOKENS // 16 * v + activated
