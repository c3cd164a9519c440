"""The whole molm-4b-k2 in bf16 with random weights (8.2 GB): reading a prompt, then one token after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM

from .bench_layer import JETMOE, STEPS, Decoder, active_bytes, matrix_flops
from .inputs import TINY, LayerShape, generator, randomize
from .machine import Work
from .peers import jetmoe
from .peers.attention import DenseStickAttention
from .peers.block import ReferenceModel
from .race import LIMIT, OURS, REFERENCE, Contestant, Outputs, Race, Run, Tolerance, contestant

pytestmark = pytest.mark.benchmark(group="molm-4b-k2, 24 layers, bf16")
DTYPE = torch.bfloat16
LONGEST = 512
JETMOE_DISTINCT_LAYERS = 8
"""2.9 GB: many times what caches hold."""
TOLERANCE = Tolerance(0.15, quantile=0.8)


class Models:
    """Ours, the reference on the same weights, JetMoE (None without `transformers`)."""

    def __init__(self, config: MoLMConfig) -> None:
        with torch.device("meta"):
            ours = MoLMForCausalLM(config)
        self.ours = ours.to(DTYPE).to_empty(device="cpu").eval()  # made in bf16: no other copy ever exists
        randomize(self.ours)
        self.shape = LayerShape.of(config)
        dense = DenseStickAttention(LONGEST + STEPS, DTYPE)
        with torch.device("meta"):
            reference = ReferenceModel(self.shape, config.n_layer, config.vocab_size, dense)
        reference.load_state_dict(dict(self.ours.named_parameters()), assign=True)
        self.reference = reference.eval()
        self.jetmoe: Any = None
        if jetmoe.AVAILABLE:
            distinct = min(JETMOE_DISTINCT_LAYERS, config.n_layer)
            # 16 heads of 64: JetMoE has no attention with one head of 1024.
            shape = replace(self.shape, heads=16)
            self.jetmoe = jetmoe.model(shape, config.n_layer, config.vocab_size, DTYPE, distinct_layers=distinct)

    def layers(self, ids: Tensor) -> tuple[Callable[[], Outputs], Callable[[], Outputs]]:
        """Every layer of ours and of the reference on the input that our model gives it: over 24 layers, roundings that
        send a token to another expert would add up to different models.
        """

        @torch.no_grad()
        def outputs(model: Any) -> Outputs:
            states = self.ours.transformer(ids, output_hidden_states=True).hidden_states
            assert states is not None
            return {f"layer {i}": model.transformer.h[i](x)[0] - x for i, x in enumerate(states[:-1])}

        return partial(outputs, self.ours), partial(outputs, self.reference)

    def prompt(self, tokens: int) -> Tensor:
        return torch.randint(self.shape.vocab_size, (1, tokens), generator=generator(1))


@pytest.fixture(scope="module")
def models(shape: LayerShape) -> Models:
    config = MoLMConfig.preset("molm-4b-k2")
    if shape == TINY:
        sizes = {"n_embd": 64, "att_hidden": 64, "ffd_hidden": 96, "gating_size": 32, "vocab_size": 256}
        config = config.replace(n_layer=2, n_att_experts=4, n_mlp_experts=4, **sizes)
    return Models(config)


def read_prompt(models: Models, tokens: int) -> Race:
    ids = models.prompt(tokens)
    our_layers, reference_layers = models.layers(ids)
    ways: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: models.ours(ids, use_cache=True).logits,
        REFERENCE: lambda: models.reference(ids)[0],
    }
    checks = {OURS: our_layers, REFERENCE: reference_layers}
    contestants = [Contestant(name, contestant(name, way).run, check=checks[name]) for name, way in ways.items()]
    if models.jetmoe is not None:
        contestants.append(contestant(JETMOE, lambda: models.jetmoe(ids, use_cache=True).logits, comparable=False))
    ours, config, shape = models.ours, models.ours.config, models.shape
    flops = matrix_flops(shape, tokens) * config.n_layer + 2 * tokens * shape.d * shape.vocab_size
    read = sum(parameter.nbytes for parameter in ours.parameters()) - ours.transformer.wte.weight.nbytes
    return Race(contestants, TOLERANCE, Work(DTYPE, flops, read), {REFERENCE: 4.0, JETMOE: 2.0})


def decode(models: Models, tokens: int) -> Race:
    """One token after another, `tokens` being in the cache at first."""
    ids, new = models.prompt(tokens), models.prompt(STEPS)
    our_layers, reference_layers = models.layers(new[:, :16])

    def step(model: Any, token: Tensor, past: Any) -> tuple[Tensor, Any]:
        output = model(token, past_key_values=past, use_cache=True)
        return output.logits, output.past_key_values

    def decoder(model: Any) -> Decoder:
        return Decoder(partial(step, model), new, model(ids, use_cache=True).past_key_values)

    with torch.no_grad():
        reference = Decoder(models.reference, new, models.reference(ids)[1])
        contestants = [
            Contestant(OURS, decoder(models.ours), check=our_layers),
            Contestant(REFERENCE, reference, check=reference_layers),
        ]
        if models.jetmoe is not None:
            contestants.append(Contestant(JETMOE, decoder(models.jetmoe), comparable=False))
    read = active_bytes(models.shape, DTYPE) * models.ours.config.n_layer + models.ours.lm_head.weight.nbytes
    return Race(contestants, TOLERANCE, Work(DTYPE, bytes_read=read), {REFERENCE: 4.0, LIMIT: 1.4})


PHASES = {"prefill": read_prompt, "decode": decode}


@pytest.mark.cases("threads phase tokens", cpu=[*product([2], PHASES, [512])], cuda=[])
def test_model(run: Run, models: Models, phase: str, tokens: int) -> None:
    run(PHASES[phase](models, tokens))
