"""Greedy generation by `generate` of transformers, whose models are ours."""

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

pytest.importorskip("transformers")

NEW, PROMPT = 32, 16
BLOCKS = "ours, block by block"
"""What a hook makes of a model: every block decodes by itself."""


def generation(native: MoLMForCausalLM, ids: Tensor, *, hooked: bool) -> Callable[[], Tensor]:
    from moduleformer_ext.hf import from_native

    model = from_native(native).eval()
    if hooked:
        for block in model.transformer.h:
            block.register_forward_hook(lambda *_: None)
    return partial(
        model.generate, ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )


@pytest.mark.benchmark(group=f"Generation of {NEW} tokens by molm-nano's layers, transformers' generate")
@pytest.mark.cases("threads dtype layers", cpu=[*product([1, 2], DTYPES, [2, 24])], cuda=[])
def test_hf_generate(run: Run, shape: LayerShape, dtype: str, layers: int) -> None:
    config = MoLMConfig.preset("molm-nano").replace(n_layer=min(layers, 2) if shape == TINY else layers)
    torch.manual_seed(0)
    native = MoLMForCausalLM(config).to(DTYPES[dtype]).eval()
    ids = torch.randint(config.vocab_size, (1, PROMPT), generator=generator())
    read = NEW * (active_bytes(LayerShape.of(config), DTYPES[dtype]) * config.n_layer + native.lm_head.weight.nbytes)
    contestants = [
        contestant(OURS, generation(native, ids, hooked=False)),
        contestant(BLOCKS, generation(native, ids, hooked=True)),
    ]
    run(Race(contestants, Tolerance(0.0), Work(DTYPES[dtype], bytes_read=read), {BLOCKS: 1.0}))
