"""Routing losses of a batch that is split over processes are those of the whole batch, gradients too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from small_models import random_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.distributed.ranks import Ranks
from moduleformer_ext import ops
from moduleformer_ext.ops import losses
from moduleformer_ext.types import RouteTopK

NUM_EXPERTS = 5
SPLITS = [[6, 6], [9, 3], [12, 0]]
LOSSES = {
    "mi": losses.mutual_information_loss,
    "concentration": losses.concentration_loss,
    "switch": losses.switch_loss,
    "new": lambda route: losses.new_expert_loss(route, 2),
}


def _logits(layer: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(12, NUM_EXPERTS, dtype=dtype, generator=torch.Generator().manual_seed(layer))


def _routes(own: slice, dtype: torch.dtype) -> tuple[list[Tensor], list[RouteTopK]]:
    logits = [_logits(layer, dtype)[own].requires_grad_() for layer in range(2)]
    return logits, [ops.route_topk(each, 2) for each in logits]


def _split_loss(name: str, split: list[int], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    rank = dist.get_rank()
    start = sum(split[:rank])
    logits, routes = _routes(slice(start, start + split[rank]), dtype)
    group = dist.group.WORLD
    assert group is not None
    loss = sum(LOSSES[name](sums) for sums in losses.sum_over_processes(routes, group))
    loss.backward()
    return loss.detach(), [each.grad / len(split) for each in logits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", LOSSES)
def test_split_batch_equals_whole(pair: Ranks, name: str, split: list[int], dtype: torch.dtype) -> None:
    found = pair.run(_split_loss, name, split, dtype)
    logits, routes = _routes(slice(None), dtype)
    whole = sum(LOSSES[name](route) for route in routes)
    whole.backward()
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][0].dtype == dtype
    torch.testing.assert_close(found[0][0], whole.detach())
    for layer, each in enumerate(logits):
        torch.testing.assert_close(torch.cat([gradients[layer] for _, gradients in found]), each.grad)
    if name != "new" and split == [6, 6]:  # these are no means over tokens
        own = sum(LOSSES[name](route) for route in _routes(slice(0, 6), dtype)[1])
        assert abs(own.item() - whole.item()) > 1e-3


def _no_tokens_anywhere() -> tuple[Tensor, Tensor]:
    logits = torch.empty(0, NUM_EXPERTS, requires_grad=True)
    (sums,) = losses.sum_over_processes([ops.route_topk(logits, 2)], dist.group.WORLD)
    loss = torch.stack([of(sums) for of in LOSSES.values()]).sum()
    loss.backward()
    return loss.detach(), logits.grad


def test_no_tokens_anywhere(pair: Ranks) -> None:
    assert losses.sum_over_processes([], None) == []
    for loss, grad in pair.run(_no_tokens_anywhere):
        assert loss == 0 and grad.shape == (0, NUM_EXPERTS)


IDS = torch.arange(24).reshape(4, 6) * 7 % 13


def _gradients(of: torch.nn.Module, ids: Tensor) -> dict[str, Tensor]:
    of(ids, labels=ids).loss.backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in of.named_parameters()}


def _model(kind: str, weight: float = 0.5) -> torch.nn.Module:
    return random_model(torch.float64, aux_loss_type=kind, aux_loss_weight=weight).train()


def _ddp_gradients(kind: str) -> dict[str, Tensor]:
    model = _model(kind)
    model.set_routing_group(dist.group.WORLD)
    return _gradients(DistributedDataParallel(model), IDS.chunk(2)[dist.get_rank()])


@pytest.mark.parametrize("kind", ["mi", "concentration", "switch", "none"])
def test_model_under_ddp_has_the_gradients_of_the_whole_batch(pair: Ranks, kind: str) -> None:
    expected = _gradients(_model(kind), IDS)
    for found in pair.run(_ddp_gradients, kind):
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, msg=lambda text, name=name: f"{name}: {text}")
