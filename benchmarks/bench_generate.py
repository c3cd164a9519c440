"""Tokens from small models, whose time is mostly that between kernels: greedy generation after a short prompt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM

from .bench_layer import active_bytes
from .inputs import TINY, LayerShape, generator
from .machine import DTYPES, Work
from .race import OURS, Race, Run, Tolerance, contestant

NEW, PROMPT = 32, 16
MODULES = "ours, module by module"
"""What hooks, adapters and the like make of a model: its blocks are not decoded by two ops each."""


def generation(model: MoLMForCausalLM, ids: Tensor) -> Callable[[], Tensor]:
    return partial(model.generate, ids, NEW)


def module_by_module(model: MoLMForCausalLM) -> MoLMForCausalLM:
    """The same weights; a hook that does nothing keeps every block from the two ops."""
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
