"""What the ops do not take of DTensors is refused by name, on every process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from sharded_ops import CALLS, placements
from torch import Tensor
from torch._library.simple_registry import find_torch_dispatch_rule
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication

from benchmarks.distributed.ranks import Ranks
from moduleformer_ext import ops
from moduleformer_ext.quantised import quantise
from moduleformer_ext.types import NormedRouter

ELSEWHERE = [
    ("attention", "q", "stick_attention: q"),
    ("attention", "v", "stick_attention: v"),
    ("attention of padded keys", "key_padding_mask", "stick_attention: key_padding_mask"),
    ("packed attention", "cu_seqlens_q", "stick_attention: cu_seqlens_q"),
    ("decode", "cache_lengths", "stick_attention_decode: cache_lengths"),
    ("route_topk_linear", "w0", "route_topk_linear: weight"),
    ("route_topk_mlp", "new", "route_topk_mlp: weight"),
    ("route_topk_mlp", "w1", "route_topk_mlp: hidden_bias"),
    ("route_topk_gmm", "w0", "route_topk_gmm: hidden_weight"),
    ("gemm", "x", "grouped_gemm: x"),
    ("gemm", "ids", "grouped_gemm: layout.offsets"),
    ("gemm with gates", "weight1", "grouped_gemm: weight"),
    ("ffn", "gates", "expert_ffn: gates"),
    ("ffn", "down0", "expert_ffn: down"),
    ("linear_decode", "bias", "linear_decode: bias"),
]


def _error(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _with_one_elsewhere(name: str, argument: str, where: str) -> str:
    mesh = init_device_mesh("cpu", (2,))
    replicated, other = placements("R"), init_device_mesh("cpu", (2, 1))
    values = {key: distribute_tensor(value, mesh, replicated) for key, value in CALLS[name].values().items()}
    whole = CALLS[name].values()[argument]
    if where == "implicit":
        with implicit_replication():
            return _error(CALLS[name].run, **{**values, argument: whole})
    one = whole if where == "plain" else distribute_tensor(whole, other, placements("R R"))
    return _error(CALLS[name].run, **{**values, argument: one})


@pytest.mark.parametrize(("name", "argument", "starts"), ELSEWHERE)
def test_a_plain_tensor_among_dtensors(pair: Ranks, name: str, argument: str, starts: str) -> None:
    for found in pair.run(_with_one_elsewhere, name, argument, "plain"):
        assert found.startswith(f"ValueError: {starts} must be a DTensor like ")
        assert "got a plain tensor" in found
    assert pair.run(_with_one_elsewhere, name, argument, "implicit") == ["none", "none"]


@pytest.mark.parametrize(("name", "argument", "starts"), [ELSEWHERE[1], ELSEWHERE[5], ELSEWHERE[13]])
def test_two_meshes(pair: Ranks, name: str, argument: str, starts: str) -> None:
    for found in pair.run(_with_one_elsewhere, name, argument, "other mesh"):
        assert found.startswith(f"ValueError: {starts} must be on ")
        assert "'s mesh" in found


def _packed(cuts: list[int], cuts_k: list[int] | None = None) -> str:
    mesh = init_device_mesh("cpu", (2,))

    def sharded(tensor: Tensor, place: str) -> Tensor:
        return distribute_tensor(tensor, mesh, placements(place))

    q, k = (sharded(torch.ones(rows[-1], 2, 8), "S0") for rows in (cuts, cuts_k or cuts))
    cu = {
        f"cu_seqlens_{name}": sharded(torch.tensor(each, dtype=torch.int32), "R")
        for name, each in (("q", cuts), ("k", cuts_k))
        if each
    }
    return _error(ops.stick_attention, q, k, **cu)


@pytest.mark.parametrize(
    ("cuts", "cuts_k", "named"),
    [([0, 5, 12], None, "q"), ([0, 6, 12], [0, 7, 16], "q and k"), ([0, 6, 6, 12], [0, 9, 9, 16], "q and k")],
)
def test_sequences_cut_in_two(pair: Ranks, cuts: list[int], cuts_k: list[int] | None, named: str) -> None:
    first, second = pair.run(_packed, cuts, cuts_k)
    assert first == second
    assert first.startswith(f"ValueError: stick_attention: {named} must be sharded between sequences, got ")


def test_whole_sequences(pair: Ranks) -> None:
    assert pair.run(_packed, [0, 6, 12]) == ["none"] * 2
    assert pair.run(_packed, [0, 6, 6, 6, 12], [0, 7, 8, 8, 16]) == ["none"] * 2
    for found in pair.run(_packed, [0, 6, 4, 12]):
        assert found.startswith("ValueError: stick_attention: cu_seqlens_q must ")


def _wrong_shape() -> str:
    mesh = init_device_mesh("cpu", (2,))
    q, k = (distribute_tensor(torch.ones(2, 3, heads, 8), mesh, placements("S2")) for heads in (4, 3))
    return _error(ops.stick_attention, q, k)


def test_shapes_are_those_of_the_whole(pair: Ranks) -> None:
    for found in pair.run(_wrong_shape):
        assert found == "ValueError: stick_attention: q must have a multiple of k's 3 heads, got 4"


def _without_a_rule(name: str) -> list[str]:
    """What an op says of each of its tensors as a DTensor, alone and beside others."""
    mesh = init_device_mesh("cpu", (2,))
    whole, run = WITHOUT_RULES[name]
    sharded = {key: distribute_tensor(value, mesh, placements("R")) for key, value in whole.items()}
    return [_error(run, **sharded), *(_error(run, **{**whole, key: value}) for key, value in sharded.items())]


def _quantised(x: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    weight = quantise(torch.ones(3, 32, 64), 8)._replace(values=values)
    layout = ops.expert_layout(torch.arange(3)[:, None], 3)._replace(offsets=offsets)
    return ops.quantised_gemm(x, weight, layout)


def _layer(return_route: bool, x: Tensor, up: Tensor) -> object:
    rows, norm = torch.ones(3, 8), torch.ones(8)
    router = NormedRouter("linear", None, None, rows, 2, "topk_softmax", norm, norm, 1e-5)
    return ops.ffn_layer_decode(x, router, up, up.mT, return_route=return_route)


_LAYER = {"x": torch.ones(1, 1, 8), "up": torch.ones(3, 8, 16)}
WITHOUT_RULES: dict[str, tuple[dict[str, Tensor], Callable[..., Any]]] = {
    "quantised_gemm": (
        {
            "x": torch.ones(3, 32),
            "values": quantise(torch.ones(3, 32, 64), 8).values,
            "offsets": torch.arange(4, dtype=torch.int32),
        },
        _quantised,
    ),
    "ffn_layer_decode": (_LAYER, partial(_layer, False)),
    "ffn_layer_decode.with_route": (_LAYER, partial(_layer, True)),
}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("quantised_gemm", ["x", "x", "weight.values", "layout.offsets"]),
        ("ffn_layer_decode", ["x", "x", "up"]),
        ("ffn_layer_decode.with_route", ["x", "x", "up"]),
    ],
)
def test_ops_without_a_rule_say_so(pair: Ranks, name: str, arguments: list[str]) -> None:
    op = name.partition(".")[0]
    for found in pair.run(_without_a_rule, name):
        for said, argument in zip(found, arguments, strict=True):
            assert said.startswith(f"NotImplementedError: {op}: {argument} must be a plain tensor, got a DTensor")
            assert "to_local()" in said


def test_every_op_has_a_rule_or_is_refused() -> None:
    names = [schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("moduleformer_ext::")]
    assert "moduleformer_ext::quantised_gemm" in names
    for name in names:
        packet = getattr(torch.ops.moduleformer_ext, name.partition("::")[2])
        for overload in packet.overloads():
            function = getattr(packet, overload)
            rule = find_torch_dispatch_rule(function, DTensor)
            composite = torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")
            assert rule is not None or composite, function


SCRIPT = """
import sys
{before}
import moduleformer_ext.models, torch
assert sys.modules.get("torch.distributed.tensor") is None
{after}
"""
RULE = """
from torch.distributed.tensor import DTensor
from torch._library.simple_registry import find_torch_dispatch_rule
assert find_torch_dispatch_rule(torch.ops.moduleformer_ext.expert_ffn_backward.default, DTensor) is not None
import importlib.util, torch.distributed.tensor as module
assert module.__file__ == importlib.util.find_spec(module.__name__).origin
assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
assert not any("moduleformer" in type(finder).__module__ for finder in sys.meta_path)
"""
ABSENT = "sys.modules['torch.distributed.tensor'] = None"


@pytest.mark.parametrize(("before", "after"), [("", RULE), (ABSENT, "assert moduleformer_ext.models")])
def test_nothing_is_imported_for_who_has_no_dtensors(before: str, after: str) -> None:
    script = SCRIPT.format(before=before, after=after)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
