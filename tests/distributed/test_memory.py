"""Calculated memory is what is measured, and no process ever holds a whole model."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from benchmarks.distributed.ranks import Ranks
from moduleformer_ext.data import LaneReader
from moduleformer_ext.distributed import Processes, memory
from moduleformer_ext.distributed.expert_parallel import spread_experts
from moduleformer_ext.distributed.sharding import blocks
from moduleformer_ext.models import KVCache, MoLMConfig, MoLMForCausalLM
from moduleformer_ext.train import TrainConfig
from moduleformer_ext.train.checkpoints import CheckpointStore
from moduleformer_ext.train.sharded import ShardedTrainer

SMALL = {"vocab_size": 50, "n_embd": 16, "att_hidden": 32, "n_head": 2, "ffd_hidden": 12, "gating_size": 8}
CONFIG = MoLMConfig.preset("molm-nano", **{**SMALL, "block_size": 12, "history_length": 20})


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_calculated_activations_are_those_of_a_real_pass(recompute: bool, autocast: torch.dtype | None) -> None:
    calculated = memory.memory_per_process(CONFIG, 1, lanes=3, recompute=recompute, autocast=autocast)
    model = MoLMForCausalLM(CONFIG).train()
    model.set_activation_checkpointing(recompute)
    past, history = memory._past(CONFIG, 3, autocast)
    assert past is not None
    for layer in past.layers:
        layer.keys.normal_()
    found = memory._kept(lambda: memory._forward(model, 3, _filled(past), autocast), model)
    if recompute:
        x = torch.randn(3, CONFIG.block_size, CONFIG.n_embd, requires_grad=True)
        found += memory._kept(lambda: memory._block(model.transformer.h[0], x, past, autocast), model)
    assert calculated.activations == pytest.approx(found, rel=0.02)
    assert calculated.history == history
    assert calculated.parameters == 4 * sum(parameter.numel() for parameter in model.parameters())


def _filled(past: KVCache) -> KVCache:
    for layer in past.layers:
        layer.keys.zero_()
        if layer.values is not None:
            layer.values.zero_()
    return past


def test_lanes_have_to_be_divided() -> None:
    with pytest.raises(ValueError, match="lanes must be a multiple of 2 micro-batches, got 3"):
        memory.memory_per_process(CONFIG, 1, lanes=3, micro_batches=2)


def _kept_with_spread_experts() -> int:
    torch.manual_seed(0)
    model = MoLMForCausalLM(CONFIG).train()
    spread_experts(blocks(model), init_device_mesh("cpu", (dist.get_world_size(),)))
    own = sum(parameter.to_local().nbytes for parameter in model.parameters() if isinstance(parameter, DTensor))
    return memory._kept(lambda: memory._forward(model, 2, None, None), model) - own


def test_calculated_activations_with_spread_experts(pair: Ranks) -> None:
    config = CONFIG.replace(history_length=0)
    calculated = memory.memory_per_process(config, 2, lanes=2, autocast=None, expert_parallel=2)
    kept = pair.run(_kept_with_spread_experts)
    assert calculated.activations == pytest.approx(sum(kept) / 2, rel=0.02)  # tokens are not dealt out evenly


def test_experts_and_processes_have_to_fit() -> None:
    with pytest.raises(ValueError, match="expert_parallel must divide the 8 processes, got 3"):
        memory.memory_per_process(CONFIG, 8, lanes=1, expert_parallel=3)


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    memory.main(["molm-nano", "--processes", "2", "4", "--lanes", "2", "--activation-checkpointing"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| 2 | ") and lines[3].startswith("| 4 | ")


def _trainer(fields: dict[str, Any], **options: Any) -> ShardedTrainer:
    size = dist.get_world_size()
    processes = Processes(dist.get_rank(), size, init_device_mesh("cpu", (size,)))
    config = TrainConfig.from_dict({"steps": 2, "batch_size": 4, "reshard": True, **options})
    tokens = torch.randint(50, (700,), generator=torch.Generator().manual_seed(0)).numpy().astype("uint16")
    reader = LaneReader({"d": tokens}, {"d": 4}, 12, processes.own_part(4))
    return ShardedTrainer(config, MoLMConfig.preset("molm-nano", **fields), reader, processes, steps=2, dtype="fp32")


def _held(expert_parallel: int) -> tuple[int, int, int]:
    trainer = _trainer({**SMALL, "history_length": 12}, expert_parallel=expert_parallel)
    trainer.take_step()
    parameters = sum(4 * parameter.to_local().numel() for parameter in trainer.model.parameters())
    moments = sum(4 * moment.to_local().numel() for moment in trainer._moments().values())
    assert trainer.history is not None
    history = sum(tensor.nbytes for layer in trainer.history.layers for tensor in (layer.keys, layer.values))
    return parameters, moments, history


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_calculated_parts_are_those_of_a_process(pair: Ranks, expert_parallel: int) -> None:
    config = CONFIG.replace(history_length=12)
    calculated = memory.memory_per_process(config, 2, lanes=2, autocast=None, expert_parallel=expert_parallel)
    for parameters, moments, history in pair.run(_held, expert_parallel):
        assert parameters == pytest.approx(calculated.parameters, rel=0.02)
        assert moments == pytest.approx(calculated.optimizer, rel=0.02)
        assert history == calculated.history


LARGE = {"n_embd": 1024, "att_hidden": 1024, "n_head": 1, "n_layer": 8, "n_att_experts": 8, "n_mlp_experts": 8}
"""More than a gigabyte with feed-forward experts of 1024."""


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def _peak_above(start: int) -> int:
    return _status("VmHWM") - start


def _save_and_load(folder: Path) -> tuple[int, dict[str, int]]:
    start, peaks = _status("VmRSS"), {}

    def reset() -> int:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")

    reset()
    trainer = _trainer({**LARGE, "ffd_hidden": 1024, "vocab_size": 2048})
    peaks["make"] = _peak_above(start)
    trainer._make_moments(1)
    size = sum(4 * parameter.numel() for parameter in trainer.model.parameters())
    store = CheckpointStore(folder)
    before = reset()
    store.save(0, trainer.save, trainer.processes)
    peaks["save"] = _peak_above(before)
    checkpoint = store.latest()
    assert checkpoint is not None
    before = reset()
    trainer.load(checkpoint)
    peaks["load"] = _peak_above(before)
    return size, peaks


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_no_process_holds_a_whole_model(four: Ranks, tmp_path: Path) -> None:
    for size, peaks in four.run(_save_and_load, tmp_path):
        assert size > 2**30
        print({name: f"{peak / size:.2f} of the model" for name, peak in peaks.items()})
        assert all(peak < 0.75 * size for peak in peaks.values()), peaks
