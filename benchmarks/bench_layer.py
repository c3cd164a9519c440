"""A whole layer, norms and residuals included: many tokens at once, then one new token against caches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moduleformer_ext.nn import Block, LayerCache, MixtureOfAttention, MixtureOfFFN, make_router

from .inputs import LayerShape, live_keys, normal, randomize
from .machine import DTYPES, Work, evict
from .peers import jetmoe
from .peers.attention import DenseStickAttention
from .peers.block import ReferenceBlock
from .race import LIMIT, MEMORY, OURS, REFERENCE, Backward, Contestant, Outputs, Race, Run, Tolerance, contestant

JETMOE = "JetMoE (softmax)"
JETMOE_LONGEST_BACKWARD = 512
OURS_SHORT = "ours, cache 512"
SHORT_CACHE = 512
STEPS = 256
"""Tokens to decode at most: more than there are rounds."""
# Some tokens tie at the top-k border and go to different experts, and so do tokens that attend to them.
TOLERANCES = {"fp32": Tolerance(1e-3, quantile=0.95), "bf16": Tolerance(0.15, quantile=0.8)}
DECODE_TOLERANCES = {"fp32": Tolerance(1e-3), "bf16": Tolerance(0.15)}
GOALS = {
    ("fp32", "forward"): {512: 4, 2048: 14},
    ("bf16", "forward"): {512: 4, 2048: 25},
    ("fp32", "forward+backward"): {512: 4, 2048: 10},
    ("bf16", "forward+backward"): {512: 3, 2048: 18},
}
"""With one thread, against the reference."""


def our_block(shape: LayerShape, dtype: torch.dtype, *, stick_epsilon: float | None) -> Block:
    """One layer with random weights."""

    def router(experts: int) -> nn.Module:
        return make_router("mlp", shape.d, experts, shape.k, gating_size=shape.gating_size)

    with torch.device("meta"):
        attention = MixtureOfAttention(
            shape.d, shape.att_hidden, shape.heads, router(shape.att_experts), stick_epsilon=stick_epsilon
        )
        block = Block(shape.d, attention, MixtureOfFFN(shape.d, shape.ffn_hidden, router(shape.ffn_experts)))
    block = block.to(dtype).to_empty(device="cpu")
    randomize(block)
    return block


def reference_block(block: nn.Module, shape: LayerShape, dtype: torch.dtype, max_length: int) -> ReferenceBlock:
    """The reference formulation of `block`, on its very parameters."""
    dense = DenseStickAttention(max_length, dtype)
    with torch.device("meta"):
        reference = ReferenceBlock(shape, dense)
    reference.load_state_dict(dict(block.named_parameters()), assign=True)
    return reference


def matrix_flops(shape: LayerShape, tokens: int) -> float:
    """Of a forward pass: routed projections, K/V projections, attention, experts, gates."""
    slots = tokens * shape.k
    projections = 2 * slots * 2 * shape.d * shape.att_hidden
    keys_values = 0 if shape.heads == 1 else 2 * tokens * 2 * shape.d * shape.att_hidden
    attention = 2 * 2 * shape.att_hidden * shape.k * tokens * (tokens + 1) / 2
    experts = 2 * slots * 2 * shape.d * shape.ffn_hidden
    gates = 2 * tokens * shape.gating_size * (2 * shape.d + shape.att_experts + shape.ffn_experts)
    return projections + keys_values + attention + experts + gates


def active_bytes(shape: LayerShape, dtype: torch.dtype) -> int:
    """Weights that one token needs."""
    matrices = 2 * shape.k * shape.d * (shape.att_hidden + shape.ffn_hidden)
    matrices += 0 if shape.heads == 1 else 2 * shape.d * shape.att_hidden
    matrices += shape.gating_size * (2 * shape.d + shape.att_experts + shape.ffn_experts)
    return matrices * dtype.itemsize


class Decoder:
    """Calls `step(x, past) -> (y, past)` with one token after another, each continuing from the last."""

    def __init__(self, step: Callable[[Tensor, Any], tuple[Tensor, Any]], tokens: Tensor, past: Any) -> None:
        self.step, self.tokens, self.past, self.index = step, tokens, past, 0

    def __call__(self) -> Outputs:
        x = self.tokens[:, self.index : self.index + 1]
        self.index += 1
        with torch.no_grad():
            y, self.past = self.step(x, self.past)
        return {"y": y}


@pytest.mark.benchmark(group="A whole layer")
@pytest.mark.cases(
    "threads dtype direction tokens",
    cpu=[
        *product([1], DTYPES, ["forward", "forward+backward"], [512, 2048]),
        *product([2], DTYPES, ["forward", "forward+backward"], [512]),
    ],
    cuda=[],
)
def test_layer(run: Run, shape: LayerShape, threads: int, dtype: str, direction: str, tokens: int) -> None:
    kind, backward = DTYPES[dtype], direction != "forward"
    block = our_block(shape, kind, stick_epsilon=0.0)
    reference = reference_block(block, shape, kind, tokens)
    x = normal(1, tokens, shape.d, dtype=kind)
    parameters = dict(block.named_parameters())

    def differentiate(parameters: dict[str, nn.Parameter]) -> Backward | None:
        cotangent = normal(1, tokens, shape.d, dtype=kind, seed=1)
        return Backward({"x": x, **parameters}, cotangent) if backward else None

    train = differentiate(parameters)
    contestants = [
        contestant(OURS, lambda: block(x)[0], train),
        contestant(REFERENCE, lambda: reference(x)[0], train),
    ]
    if jetmoe.AVAILABLE and not (backward and tokens > JETMOE_LONGEST_BACKWARD):
        peer = jetmoe.JetMoeBlock(shape, kind)
        peer_train = differentiate(dict(peer.layer.named_parameters()))
        contestants.append(contestant(JETMOE, partial(peer, x), peer_train, comparable=False))
    goals = {MEMORY + REFERENCE: 1.0} | ({} if backward else {JETMOE: 1.0})
    if threads == 1:
        goals[REFERENCE] = GOALS[dtype, direction].get(tokens, 1.0)
    read = sum(parameter.nbytes for parameter in parameters.values())
    work = Work(kind, matrix_flops(shape, tokens) * (3 if backward else 1), read * (2 if backward else 1))
    run(Race(contestants, TOLERANCES[dtype], work, goals))


@pytest.mark.benchmark(group="Decoding: one token through one layer")
@pytest.mark.cases(
    "threads dtype tokens sticks",
    cpu=[*product([1, 2], DTYPES, [SHORT_CACHE, 2048, 8192], ["exact", "early exit"])],
    cuda=[],
)
def test_decode(run: Run, shape: LayerShape, dtype: str, tokens: int, sticks: str) -> None:
    """`tokens` are those in the cache. Exact: all of it is read. Otherwise sticks run out early, and ours against a
    cache of SHORT_CACHE tells whether the time still depends on its length.
    """
    kind, epsilon = DTYPES[dtype], 0.0 if sticks == "exact" else None
    block = our_block(shape, kind, stick_epsilon=epsilon).eval()
    reference = reference_block(block, shape, kind, tokens + STEPS)
    new = normal(1, STEPS, shape.d, dtype=kind)
    keys, values = (normal(1, tokens, shape.heads, shape.head_dim, dtype=kind, seed=seed) for seed in (2, 3))

    def our_step(x: Tensor, past: LayerCache) -> tuple[Tensor, Any]:
        y, _, present = block(x, past, use_cache=True)
        return y, present

    def reference_step(x: Tensor, past: Any) -> tuple[Tensor, Any]:
        y, _, present = reference(x, past)
        return y, present

    def our_decoder(length: int) -> Decoder:
        cache = LayerCache(capacity=length + STEPS)
        _, _, past = cache.extend(keys[:, :length].contiguous(), values[:, :length].contiguous())
        return Decoder(our_step, new, past)

    contestants = [
        Contestant(OURS, our_decoder(tokens), evict),
        Contestant(REFERENCE, Decoder(reference_step, new, (keys, values)), evict),
    ]
    goals = {LIMIT: 1.3}
    if epsilon is None and tokens > SHORT_CACHE:
        contestants.append(Contestant(OURS_SHORT, our_decoder(SHORT_CACHE), evict, comparable=False))
        goals[OURS_SHORT] = 0.95
    if jetmoe.AVAILABLE:
        peer = jetmoe.JetMoeBlock(shape, kind)
        cache = peer.new_cache()
        cache.update(keys.transpose(1, 2), values.transpose(1, 2), 0)
        decoder = Decoder(lambda x, cache: (peer(x, cache), cache), new, cache)
        contestants.append(Contestant(JETMOE, decoder, evict, comparable=False))

    with torch.no_grad():
        q = block.attn.q_proj(block.ln_1(new[0]))[0].unflatten(-1, (shape.heads, -1))
    live = live_keys(q[0], keys[0], 2.0**-24 if epsilon is None else epsilon)
    read = active_bytes(shape, kind) + 2 * live * shape.att_hidden * kind.itemsize
    run(Race(contestants, DECODE_TOLERANCES[dtype], Work(kind, bytes_read=read), goals, {"live keys": live}))
