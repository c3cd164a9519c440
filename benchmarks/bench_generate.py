"""Greedy generation after a short prompt: by small models, whose time is mostly that between kernels, and by a large
one with quantised experts, whose time is that of reading them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM, quantise_experts
from moduleformer_ext.nn import QuantisedExpertLinear
from moduleformer_ext.quantised import BITS, dequantise

from .bench_layer import active_bytes
from .inputs import TINY, LayerShape, generator, randomize
from .machine import DTYPES, Work
from .race import OURS, Contestant, Outputs, Race, Run, Tolerance, contestant

NEW, PROMPT = 32, 16
MODULES = "ours, module by module"
"""What hooks, adapters and the like make of a model: its blocks are not decoded by one op for all."""


def generation(model: MoLMForCausalLM, ids: Tensor) -> Callable[[], Tensor]:
    return partial(model.generate, ids, NEW)


def module_by_module(model: MoLMForCausalLM) -> MoLMForCausalLM:
    """The same weights; a hook that does nothing keeps every block from the ops that decode."""
    with torch.device("meta"):
        other = MoLMForCausalLM(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    for block in other.transformer.h:
        block.ln_1.register_forward_hook(lambda *_: None)
    return other.eval()


@pytest.mark.benchmark(group=f"Generation of {NEW} tokens by molm-nano's layers")
@pytest.mark.cases("threads dtype layers", cpu=[*product([1, 2], DTYPES, [2, 24])], cuda=[])
def test_generate(run: Run, shape: LayerShape, dtype: str, layers: int) -> None:
    config = MoLMConfig.preset("molm-nano").replace(n_layer=min(layers, 2) if shape == TINY else layers)
    torch.manual_seed(0)
    model = MoLMForCausalLM(config).to(DTYPES[dtype]).eval()
    ids = torch.randint(config.vocab_size, (1, PROMPT), generator=generator())
    read = NEW * (active_bytes(LayerShape.of(config), DTYPES[dtype]) * config.n_layer + model.lm_head.weight.nbytes)
    contestants = [
        contestant(OURS, generation(model, ids)),
        contestant(MODULES, generation(module_by_module(model), ids)),
    ]
    run(Race(contestants, Tolerance(0.0), Work(DTYPES[dtype], bytes_read=read), {MODULES: 1.5}))


WHOLE = "the same numbers in bf16"
GOALS = {8: 1.7, 4: 2.8}


@torch.no_grad()
def dequantised(model: MoLMForCausalLM, quantised: MoLMForCausalLM) -> None:
    """Gives the model the numbers of its quantised self."""
    for name, experts in quantised.named_modules():
        if isinstance(experts, QuantisedExpertLinear):
            model.get_parameter(f"{name}.weight").copy_(dequantise(experts.weight))


def read_by_a_token(model: MoLMForCausalLM, k: int) -> float:
    """Of a model with quantised experts."""
    read = float(model.lm_head.weight.nbytes)
    for block in model.transformer.h:
        read += sum(parameter.nbytes for parameter in block.parameters())
        read += sum(buffer.nbytes * k / len(buffer) for buffer in block.buffers())
    return read


@pytest.mark.benchmark(group=f"Generation of {NEW} tokens by 24 layers with quantised experts")
@pytest.mark.cases("threads bits", cpu=[*product([1, 2], BITS)], cuda=[])
def test_generate_by_quantised_experts(run: Run, shape: LayerShape, bits: int) -> None:
    """molm-4b-k2 with fewer experts and words: a token reads as much of every layer."""
    config = MoLMConfig.preset("molm-4b-k2").replace(n_att_experts=4, n_mlp_experts=8, vocab_size=1024)
    if shape == TINY:
        config = config.replace(n_layer=2, n_embd=64, att_hidden=64, ffd_hidden=96, gating_size=32)
    kind = torch.bfloat16
    with torch.device("meta"):
        model = MoLMForCausalLM(config)
    model = model.to(kind).to_empty(device="cpu").eval()
    randomize(model)
    ours = quantise_experts(model, bits)
    dequantised(model, ours)
    ids = torch.randint(config.vocab_size, (1, PROMPT), generator=generator())

    @torch.no_grad()
    def layers(of: MoLMForCausalLM) -> Outputs:
        """Each on the same input: over 24 layers roundings that send a token to another expert would add up."""
        states = ours.transformer(ids, output_hidden_states=True).hidden_states
        assert states is not None
        return {f"layer {i}": of.transformer.h[i](x)[0] - x for i, x in enumerate(states[:-1])}

    contestants = [
        Contestant(name, contestant(name, generation(of, ids)).run, check=partial(layers, of))
        for name, of in ((OURS, ours), (WHOLE, model))
    ]
    work = Work(kind, bytes_read=NEW * read_by_a_token(ours, config.ffn.k))
    run(Race(contestants, Tolerance(0.15, quantile=0.8), work, {WHOLE: GOALS[bits]}))
