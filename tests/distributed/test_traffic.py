"""What a sharded step sends is little more than it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from moduleformer_ext.distributed.sharding import shard_model
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM

CONFIG = MoLMConfig.preset("molm-nano", vocab_size=62, n_embd=32, att_hidden=32, ffd_hidden=32, gating_size=8)


class _Bytes(TorchDispatchMode):
    """Adds up the whole tensors of all-gathers and reduce-scatters, and what is all-reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = dict.fromkeys(("gather", "scatter", "reduce"), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            self.sent["gather" if "allgather" in name else "scatter"] += max(args[0].nbytes, args[1].nbytes)
        elif "all_reduce" in name or name == "c10d::allreduce_":
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.sent["reduce"] += sum(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


def _sent(reshard: bool, gather_dtype: torch.dtype | None) -> dict[str, int]:
    torch.manual_seed(0)
    model = MoLMForCausalLM(CONFIG).train()
    shard_model(model, init_device_mesh("cpu", (dist.get_world_size(),)), reshard=reshard, gather_dtype=gather_dtype)
    model.set_routing_group(dist.group.WORLD)
    tokens = torch.arange(8).reshape(1, 8)
    with _Bytes() as counted, torch.autocast("cpu", torch.bfloat16, enabled=gather_dtype is not None):
        model(tokens, labels=tokens).loss.backward()
    return counted.sent


@pytest.mark.parametrize("gather_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("reshard", [True, False])
def test_bytes_of_a_step(pair: Ranks, four: Ranks, reshard: bool, gather_dtype: torch.dtype | None) -> None:
    with torch.device("meta"):
        model = MoLMForCausalLM(CONFIG)
    whole = sum(parameter.numel() for parameter in model.parameters())
    layers = sum(parameter.numel() for parameter in model.transformer.h.parameters())
    least = (whole + (layers if reshard else 0)) * (4 if gather_dtype is None else 2)
    for ranks in (pair, four):
        for sent in ranks.run(_sent, reshard, gather_dtype):
            assert least <= sent["gather"] <= 1.1 * least
            assert 4 * whole <= sent["scatter"] <= 1.1 * 4 * whole
            assert 0 < sent["reduce"] < 0.1 * least  # sums of the routing loss, forward and backward
