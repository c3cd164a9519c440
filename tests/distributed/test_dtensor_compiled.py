"""torch.compile sees through the ops on DTensors, and is refused by name where a strategy reads values."""

from __future__ import annotations

import pytest
import torch
from sharded_ops import CALLS, placements
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from benchmarks.distributed.ranks import Ranks


def _run(name: str, place: dict[str, str], compiled: bool) -> list[Tensor] | str:
    """The first result and the gradients of a functional of it, or the error."""
    mesh = init_device_mesh("cpu", (2,))
    values = {
        key: distribute_tensor(value, mesh, placements(place.get(key, "R")))
        for key, value in CALLS[name].values().items()
    }
    leaves = [value.requires_grad_() for value in values.values() if value.is_floating_point()]

    def run(**values: DTensor) -> Tensor:
        return CALLS[name].run(**values)[0]

    torch._dynamo.reset()
    function = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    try:
        result = function(**values)
    except Exception as error:
        return str(error)
    grad = result.detach().redistribute(mesh, placements("R")).cos()
    # Reductions stay outside: torch 2.13 cannot compile those of DTensors that it has run uncompiled.
    result.backward(
        grad.redistribute(mesh, placements("R") if result.placements[0].is_partial() else result.placements)
    )
    return [result.detach().full_tensor(), *(leaf.grad.full_tensor() for leaf in leaves)]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("attention", {"q": "S2", "k": "S2", "v": "S2"}),
        ("ffn", {"up0": "S2", "down0": "S1"}),
        ("ffn", {"x": "S0", "gates": "S0"}),
    ],
)
def test_compiled(pair: Ranks, name: str, place: dict[str, str]) -> None:
    expected = pair.run(_run, name, place, False)
    torch.testing.assert_close(pair.run(_run, name, place, True), expected)


@pytest.mark.parametrize(
    ("name", "place", "starts"),
    [
        ("packed attention", {"q": "S0", "k": "S0", "v": "S0"}, "stick_attention: q must not be sharded by tokens"),
        ("ffn", {"up0": "S0", "down0": "S0"}, "expert_ffn: up must not be sharded by experts"),
    ],
)
def test_what_reads_values_is_refused(pair: Ranks, name: str, place: dict[str, str], starts: str) -> None:
    for found in pair.run(_run, name, place, True):
        assert starts in found
