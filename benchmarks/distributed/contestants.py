"""What is measured, in the process that measures it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moduleformer_ext.data import LaneReader
from moduleformer_ext.distributed import Processes
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.train import TrainConfig, Trainer
from moduleformer_ext.train.sharded import ShardedTrainer

from ..inputs import TINY, LayerShape
from ..peers import jetmoe
from .traffic import Traffic

TRAINED = {
    "n_embd": 256,
    "n_layer": 4,
    "att_hidden": 256,
    "n_head": 4,
    "ffd_hidden": 512,
    "n_att_experts": 8,
    "n_mlp_experts": 16,
    "vocab_size": 2048,
    "block_size": 256,
    "history_length": 256,
}
QUICK = {**TRAINED, "n_embd": 32, "att_hidden": 32, "ffd_hidden": 32, "n_layer": 2, "vocab_size": 64}
QUICK |= {"block_size": 16, "history_length": 16, "gating_size": 8}
WRAPPED = LayerShape(d=512, att_hidden=512, heads=8, att_experts=8, ffn_experts=8, ffn_hidden=1024, vocab_size=2048)
MOLM, JETMOE = "MoLM", "JetMoE"
_WRAPPED_LAYERS = 2
_steps: dict[str, Callable[[], object]] = {}
"""By name, in this process."""


def trained_config(quick: bool) -> MoLMConfig:
    """The model whose training is measured."""
    return MoLMConfig.preset("molm-nano", **(QUICK if quick else TRAINED), aux_loss_weight=0.01)


def make_trainer(name: str, lanes: int, expert_parallel: int, quick: bool) -> None:
    """A trainer on random tokens with so many lanes in all; one process trains without sharding."""
    architecture, size = trained_config(quick), dist.get_world_size()
    options = {"steps": 1000, "batch_size": lanes, "expert_parallel": expert_parallel}
    config = TrainConfig.from_dict({**options, "segment_length": architecture.block_size})
    count = (lanes + 1) * architecture.block_size * 16
    tokens = np.random.default_rng(0).integers(0, architecture.vocab_size, count).astype(np.uint16)
    if size == 1:
        reader = LaneReader({"random": tokens}, {"random": lanes}, architecture.block_size)
        trainer = Trainer(config, architecture, reader, steps=1000, dtype="fp32")
    else:
        processes = Processes(dist.get_rank(), size, init_device_mesh("cpu", (size,)))
        own = processes.own_part(lanes)
        reader = LaneReader({"random": tokens}, {"random": lanes}, architecture.block_size, own)
        trainer = ShardedTrainer(config, architecture, reader, processes, steps=1000, dtype="fp32")
    _steps[name] = trainer.take_step


def wrapped_size(quick: bool) -> tuple[LayerShape, int]:
    """Of the models that are wrapped alike, and how many tokens a process gives them."""
    return (TINY, 16) if quick else (WRAPPED, 512)


def make_wrapped(name: str, quick: bool) -> None:
    """A model of a kind, each layer and the rest of it a unit of FSDP2, and a pass forward and backward."""
    shape, length = wrapped_size(quick)
    torch.manual_seed(0)
    if name == MOLM:
        model: nn.Module = MoLMForCausalLM(molm_config(shape))
        layers, options = model.transformer.h, {"output_aux_loss": False}
    else:
        model = jetmoe.model(shape, _WRAPPED_LAYERS, shape.vocab_size, torch.float32, distinct_layers=_WRAPPED_LAYERS)
        layers, options = model.model.layers, {"use_cache": False}
    model.train()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tokens = torch.randint(shape.vocab_size, (1, length))

    def step() -> None:
        model(tokens, labels=tokens, **options).loss.backward()
        model.zero_grad()

    _steps[name] = step


def molm_config(shape: LayerShape) -> MoLMConfig:
    """The layers of ``shape``, without a history."""
    return MoLMConfig.preset(
        "molm-nano",
        vocab_size=shape.vocab_size,
        n_embd=shape.d,
        n_layer=_WRAPPED_LAYERS,
        n_head=shape.heads,
        att_hidden=shape.att_hidden,
        n_att_experts=shape.att_experts,
        n_mlp_experts=shape.ffn_experts,
        ffd_hidden=shape.ffn_hidden,
        gate_type="linear",
        k_att=shape.k,
        k_mlp=shape.k,
        aux_loss_type="none",
    )


def step(name: str) -> tuple[float, float]:
    """Seconds of a step by the clock and of this process's CPU, from when all processes are ready."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    _steps[name]()
    return time.perf_counter() - wall, time.process_time() - cpu


def sent(name: str) -> dict[str, Any]:
    """What this process sends in a step."""
    with Traffic() as counted:
        _steps[name]()
    return counted.sent


def forget(name: str) -> None:
    """Let go of what was made."""
    del _steps[name]
