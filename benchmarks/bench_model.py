"""The whole molm-4b-k2 in bf16 with random weights (8.2 GB): reading a prompt, then one token after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM

from .bench_block import matrix_flops
from .bench_decode import Decoder, active_bytes
from .cells import NOT_SLOWER, OURS, REFERENCE, Cell, Contestant, Goal, Outputs, Race, Tolerance, Work
from .inputs import generator
from .layers import config_shape, our_model, reference_model
from .peers import jetmoe
from .peers.block import ReferenceModel
from .pytest_cells import run_cell

SECTION = "model"
DTYPE = torch.bfloat16
JETMOE = "JetMoE (softmax)"
PROMPT = 512
STEPS = 256
JETMOE_DISTINCT_LAYERS = 8
"""2.9 GB: many times what caches hold."""
TOLERANCE = Tolerance(0.15, quantile=0.8)


@cache
def models(quick: bool) -> tuple[MoLMForCausalLM, ReferenceModel, Any]:
    """Ours, the reference on the same weights, JetMoE (None without ``transformers``)."""
    config = MoLMConfig.preset("molm-4b-k2")
    if quick:
        sizes = {"n_embd": 64, "att_hidden": 64, "ffd_hidden": 96, "gating_size": 32, "vocab_size": 256}
        config = config.replace(n_layer=2, n_att_experts=4, n_mlp_experts=4, **sizes)
    ours = our_model(config, DTYPE)
    reference = reference_model(ours, DTYPE, PROMPT + STEPS)
    peer = None
    if jetmoe.AVAILABLE:
        # 16 heads of 64: JetMoE has no attention with one head of 1024.
        shape = replace(config_shape(config), heads=16)
        peer = jetmoe.model(
            shape, config.n_layer, config.vocab_size, DTYPE, distinct_layers=min(JETMOE_DISTINCT_LAYERS, config.n_layer)
        )
    return ours, reference, peer


def _prompt(model: MoLMForCausalLM, tokens: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (1, tokens), generator=generator(1))


class _LayerByLayer:
    """Every layer on the input that our model gives it: over 24 layers, roundings that send a token to another expert
    would add up to different models.
    """

    def __init__(self, model: MoLMForCausalLM, ids: Tensor) -> None:
        self.model, self.ids = model, ids

    def _inputs(self) -> tuple[Tensor, ...]:
        states = self.model.transformer(self.ids, output_hidden_states=True).hidden_states
        assert states is not None
        return states[:-1]

    @torch.no_grad()
    def ours(self) -> Outputs:
        return {f"layer {i}": self.model.transformer.h[i](x)[0] - x for i, x in enumerate(self._inputs())}

    @torch.no_grad()
    def reference(self, reference: ReferenceModel) -> Outputs:
        return {f"layer {i}": reference.transformer.h[i](x)[0] - x for i, x in enumerate(self._inputs())}


def _weights_read(model: MoLMForCausalLM, layer_bytes: int) -> int:
    return layer_bytes * model.config.n_layer + model.lm_head.weight.nbytes


def prefill_race(tokens: int, *, quick: bool) -> Race:
    ours, reference, peer = models(quick)
    ids = _prompt(ours, tokens)
    layers = _LayerByLayer(ours, ids)

    def timed(function: Callable[[], Tensor]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            with torch.no_grad():
                return {"logits": function()}

        return run

    contestants = [
        Contestant(OURS, timed(lambda: ours(ids, use_cache=True).logits), check=layers.ours),
        Contestant(REFERENCE, timed(lambda: reference(ids)[0]), check=partial(layers.reference, reference)),
    ]
    if peer is not None:
        contestants.append(Contestant(JETMOE, timed(lambda: peer(ids, use_cache=True).logits), comparable=False))
    shape, config = config_shape(ours.config), ours.config
    flops = matrix_flops(shape, tokens) * config.n_layer + 2 * tokens * config.n_embd * config.vocab_size
    read = sum(parameter.nbytes for parameter in ours.parameters()) - ours.transformer.wte.weight.nbytes
    return Race(tuple(contestants), Work(DTYPE, flops, read))


def decode_race(cached: int, *, quick: bool) -> Race:
    ours, reference, peer = models(quick)
    ids, tokens = _prompt(ours, cached), _prompt(ours, STEPS)

    def our_step(token: Tensor, past: Any) -> tuple[Tensor, Any]:
        output = ours(token, past_key_values=past, use_cache=True)
        return output.logits, output.past_key_values

    def jetmoe_step(token: Tensor, past: Any) -> tuple[Tensor, Any]:
        output = peer(token, past_key_values=past, use_cache=True)
        return output.logits, output.past_key_values

    layers = _LayerByLayer(ours, tokens[:, :16])
    with torch.no_grad():
        our_past = ours(ids, use_cache=True).past_key_values
        contestants = [Contestant(OURS, Decoder(our_step, tokens, our_past), check=layers.ours)]
        decoder = Decoder(reference, tokens, reference(ids)[1])
        contestants.append(Contestant(REFERENCE, decoder, check=partial(layers.reference, reference)))
        if peer is not None:
            past = peer(ids, use_cache=True).past_key_values
            contestants.append(Contestant(JETMOE, Decoder(jetmoe_step, tokens, past), comparable=False))
    shape = config_shape(ours.config)
    return Race(tuple(contestants), Work(DTYPE, bytes_read=_weights_read(ours, active_bytes(shape, DTYPE))))


def cells(quick: bool = False) -> Iterator[Cell]:
    prompt = 32 if quick else PROMPT
    prefill_goals = (Goal("speedup", 4.0, REFERENCE), Goal("speedup", 2.0, JETMOE), NOT_SLOWER)
    decode_goals = (Goal("speedup", 4.0, REFERENCE), Goal("roofline", 1.4), NOT_SLOWER)
    for name, build, goals in (
        ("prefill of", prefill_race, prefill_goals),
        ("decode after", decode_race, decode_goals),
    ):
        title = f"bf16, {name} {prompt} tokens"
        tags = {"dtype": "bf16", "tokens": prompt, "direction": name.split()[0], "kind": ""}
        yield Cell(SECTION, title, 2, partial(build, prompt, quick=quick), TOLERANCE, goals, tags)


@pytest.mark.parametrize("cell", list(cells()), ids=lambda cell: cell.key)
def test_model(cell: Cell, benchmark: object) -> None:
    run_cell(cell, benchmark)
