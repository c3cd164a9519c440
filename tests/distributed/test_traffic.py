"""What a sharded step sends is little more than it must."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.distributed.ranks import Ranks
from benchmarks.distributed.traffic import Traffic, fewest_exchanged
from moduleformer_ext.distributed.sharding import shard_model
from moduleformer_ext.distributed.traffic import sent_for_parameters, sent_for_tokens
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM

CONFIG = MoLMConfig.preset("molm-nano", vocab_size=62, n_embd=32, att_hidden=32, ffd_hidden=32, gating_size=8)


def _sent(reshard: bool, gather_dtype: torch.dtype | None) -> dict[str, int]:
    torch.manual_seed(0)
    model = MoLMForCausalLM(CONFIG).train()
    shard_model(model, init_device_mesh("cpu", (dist.get_world_size(),)), reshard=reshard, gather_dtype=gather_dtype)
    model.set_routing_group(dist.group.WORLD)
    tokens = torch.arange(8).reshape(1, 8)
    with Traffic() as counted, torch.autocast("cpu", torch.bfloat16, enabled=gather_dtype is not None):
        model(tokens, labels=tokens).loss.backward()
    return counted.sent


@pytest.mark.parametrize("gather_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("reshard", [True, False])
def test_bytes_of_a_step(pair: Ranks, four: Ranks, reshard: bool, gather_dtype: torch.dtype | None) -> None:
    with torch.device("meta"):
        model = MoLMForCausalLM(CONFIG)
    for ranks in (pair, four):
        least = sent_for_parameters(model, ranks.size, reshard=reshard, size=4 if gather_dtype is None else 2)
        for sent in ranks.run(_sent, reshard, gather_dtype):
            for kind, fewest in least.items():
                assert fewest <= sent[kind] <= 1.1 * fewest
            assert 0 < sent["reduce"] < 0.1 * least["gather"]  # sums of the routing loss, forward and backward
            assert sent["exchange"] == 0


def _exchanged(experts: int, dtype: torch.dtype | None) -> tuple[dict[str, int], int]:
    torch.manual_seed(0)
    model = MoLMForCausalLM(CONFIG).train()
    rank, size = dist.get_rank(), dist.get_world_size()
    expert_mesh = init_device_mesh("cpu", (size // experts, experts), mesh_dim_names=("data", "expert"))
    shard_model(model, init_device_mesh("cpu", (size,)), expert_mesh=expert_mesh, gather_dtype=dtype)
    tokens = torch.arange(128).reshape(2, 64) * (rank + 3) % 62
    with Traffic() as counted, torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        output = model(tokens, labels=tokens, output_routes=True)
        output.loss.backward()
    layers = [layer for block in model.transformer.h for layer in (block.attn.q_proj, block.mlpf)]
    held = iter([layer.exchange.held for layer in layers])
    of_numbers = 4 if dtype is None else 2
    return counted.sent, fewest_exchanged(model, output.routes, held, rank % experts, size=of_numbers)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("experts", [2, 4])
def test_bytes_of_tokens_on_their_way_to_experts(four: Ranks, experts: int, dtype: torch.dtype | None) -> None:
    with torch.device("meta"):
        model = MoLMForCausalLM(CONFIG)
    least = sent_for_parameters(model, 4, expert_parallel=experts, size=4 if dtype is None else 2)
    found = four.run(_exchanged, experts, dtype)
    for sent, _ in found:
        for kind, fewest in least.items():
            assert fewest <= sent[kind] <= 1.1 * fewest
    exchanged, fewest = sum(sent["exchange"] for sent, _ in found), sum(fewest for _, fewest in found)
    assert fewest <= exchanged <= 1.05 * fewest


def test_balanced_tokens_are_those_that_are_counted() -> None:
    model = MoLMForCausalLM(CONFIG.replace(n_att_experts=2, n_mlp_experts=2, k_att=2, k_mlp=2))  # every token has both
    tokens = torch.arange(12).reshape(2, 6)
    routes = model(tokens, output_routes=True).routes
    counted = fewest_exchanged(model, routes, iter([[1, 1]] * 4), 0)
    assert counted == sent_for_tokens(model.config, 12, expert_parallel=2)
