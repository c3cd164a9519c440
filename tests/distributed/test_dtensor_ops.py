"""The ops on DTensors give what they give on whole tensors, gradients too, and move only what they must."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from sharded_ops import CALLS, Found, compute

from benchmarks.distributed.ranks import Ranks

# call; placements of arguments (others: R), of results, of gradients (others: R)
HEADS = {"q": "S2", "k": "S2", "v": "S2"}
ROWS = {"q": "S0", "k": "S0", "v": "S0"}
ROUTE = "S0 S0 P P P P S0"
NATURAL = [
    ("attention", ROWS, "S0 S0", ROWS),
    ("attention", HEADS, "S2 S2", HEADS),
    ("attention", {"q": "S2"}, "S2 S2", HEADS),
    ("attention", {}, "R R", {}),
    ("attention of padded keys", {**ROWS, "key_padding_mask": "S0"}, "S0 S0", ROWS),
    ("attention of padded keys", HEADS, "S2 S2", HEADS),
    ("attention where k is v", {"q": "S3"}, "S3 S3", {"q": "S3", "k": "P"}),
    ("attention where k is v", {"q": "S0", "k": "S0"}, "S0 S0", {"q": "S0", "k": "S0"}),
    ("attention with one key head", {"q": "S2"}, "S2 S2", {"q": "S2", "k": "P", "v": "P"}),
    ("attention in bfloat16", HEADS, "S2 S2", HEADS),
    ("attention in bfloat16", {}, "R R", {}),
    ("packed attention", ROWS, "S0 S0", ROWS),
    ("packed attention", {"q": "S1", "k": "S1", "v": "S1"}, "S1 S1", {"q": "S1", "k": "S1", "v": "S1"}),
    ("packed attention with a past", ROWS, "S0 S0", ROWS),
    ("decode", {**ROWS, "cache_lengths": "S0"}, "S0 S0", {}),
    ("decode", HEADS, "S2 S2", {}),
    ("decode where k is v", {"q": "S3"}, "S3 S3", {}),
    ("decode where k is v", {"q": "S0", "k": "S0", "cache_lengths": "S0", "key_padding_mask": "S0"}, "S0 S0", {}),
    ("route_topk", {"x": "S0"}, ROUTE, {"x": "S0"}),
    ("route_topk", {}, "R R R R R R R", {}),
    ("route_topk by score", {"x": "S0"}, ROUTE, {"x": "S0"}),
    ("route_topk_linear", {"x": "S0", "noise": "S0"}, ROUTE, {"x": "S0", "w0": "P"}),
    ("route_topk_mlp", {"x": "S0"}, ROUTE, {"x": "S0", "w0": "P", "w1": "P", "old": "P", "new": "P"}),
    ("expert_layout", {}, "R R R R", {}),
    ("gemm", {"x": "S0"}, "S0", {"x": "S0", "weight0": "P"}),
    ("gemm", {"weight0": "S2"}, "S2", {"x": "P", "weight0": "S2"}),
    ("gemm", {"x": "S1", "weight0": "S1"}, "P", {"x": "S1", "weight0": "S1"}),
    ("gemm", {"weight0": "S0"}, "P", {"x": "P", "weight0": "S0"}),
    (
        "gemm with gates",
        {"x": "S0", "gates": "S0"},
        "S0",
        {"x": "S0", "gates": "S0", "weight0": "P", "weight1": "P"},
    ),
    (
        "gemm with gates",
        {"weight0": "S2", "weight1": "S2"},
        "S1",
        {"x": "P", "gates": "P", "weight0": "S2", "weight1": "S2"},
    ),
    (
        "gemm with gates",
        {"x": "S2", "weight0": "S1", "weight1": "S1"},
        "P",
        {"x": "S2", "gates": "P", "weight0": "S1", "weight1": "S1"},
    ),
    (
        "gemm with gates",
        {"weight0": "S0", "weight1": "S0"},
        "P",
        {"x": "P", "gates": "P", "weight0": "S0", "weight1": "S0"},
    ),
    ("gemm in expert order", {"weight0": "S0"}, "P", {"x": "P", "weight0": "S0"}),
    ("gemm in expert order", {"weight0": "S2"}, "S1", {"x": "P", "weight0": "S2"}),
    ("gemm from expert order", {"weight0": "S0"}, "P", {"x": "P", "weight0": "S0"}),
    ("gemm from expert order", {"x": "S1", "weight0": "S1"}, "P", {"x": "S1", "weight0": "S1"}),
    ("gemm with activation", {"weight0": "S2"}, "S1", {"x": "P", "weight0": "S2"}),
    ("gemm with activation", {"weight0": "S0"}, "P", {"x": "P", "weight0": "S0"}),
    ("gemm with a gated activation", {"weight0": "S0"}, "P", {"x": "P", "weight0": "S0"}),
    ("ffn", {"x": "S0", "gates": "S0"}, "S0", {"x": "S0", "gates": "S0", "up0": "P", "down0": "P"}),
    ("ffn", {"up0": "S0", "down0": "S0"}, "P", {"x": "P", "gates": "P", "up0": "S0", "down0": "S0"}),
    ("ffn", {"up0": "S2", "down0": "S1"}, "P", {"x": "P", "gates": "P", "up0": "S2", "down0": "S1"}),
    (
        "ffn of segments",
        {"up0": "S0", "down0": "S0", "up1": "S0", "down1": "S0"},
        "P",
        {"x": "P", "gates": "P", "up0": "S0", "down0": "S0", "up1": "S0", "down1": "S0"},
    ),
    (
        "ffn with a gated activation",
        {"up0": "S0", "down0": "S0"},
        "P",
        {"x": "P", "gates": "P", "up0": "S0", "down0": "S0"},
    ),
    (
        "gemm with a bias",
        {"x": "S0", "gates": "S0"},
        "S0",
        {"x": "S0", "gates": "S0", "weight0": "P", "bias": "P"},
    ),
    (
        "gemm with a bias",
        {"weight0": "S2", "bias": "S1"},
        "S1",
        {"x": "P", "gates": "P", "weight0": "S2", "bias": "S1"},
    ),
    ("gemm with a bias", {"x": "S1", "weight0": "S1"}, "P", {"x": "S1", "gates": "P", "weight0": "S1", "bias": "R"}),
    ("gemm with a bias", {"weight0": "S0"}, "P", {"x": "P", "gates": "P", "weight0": "S0", "bias": "P"}),
    (
        "ffn with biases",
        {"up0": "S2", "up1": "S2", "down0": "S1", "down1": "S1", "bias_up": "S1"},
        "P",
        {
            "x": "P",
            "gates": "P",
            "up0": "S2",
            "up1": "S2",
            "down0": "S1",
            "down1": "S1",
            "bias_up": "S1",
            "bias_down": "R",
        },
    ),
    (
        "ffn with biases",
        {"up0": "S0", "up1": "S0", "down0": "S0", "down1": "S0"},
        "P",
        {
            "x": "P",
            "gates": "P",
            "up0": "S0",
            "up1": "S0",
            "down0": "S0",
            "down1": "S0",
            "bias_up": "P",
            "bias_down": "P",
        },
    ),
    ("loss, sum", {"x": "S0", "target": "S0"}, "P", {"x": "S0", "weight": "P"}),
    ("loss, none", {"x": "S1", "target": "S1"}, "S1", {"x": "S1", "weight": "P"}),
    ("loss, mean", {}, "R", {}),
    ("linear_decode", {"x": "S0"}, "S0", {}),
    ("linear_decode", {"x": "S1"}, "S1", {}),
    ("linear_decode", {"weight": "S0", "bias": "S0"}, "S2", {}),
    ("linear_decode", {"x": "S2", "weight": "S1"}, "P", {}),
]


def _check(found: Sequence[Found], name: str) -> None:
    expected = compute(name)
    for ours in found:
        assert ours.gradients.keys() == expected.gradients.keys()
        for got, want in zip(ours.results, expected.results, strict=True):
            torch.testing.assert_close(got, want)
        for key, want in expected.gradients.items():
            torch.testing.assert_close(ours.gradients[key], want, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("name", "place", "results", "gradients"), NATURAL)
def test_sharded_equals_whole(
    pair: Ranks, name: str, place: dict[str, str], results: str, gradients: dict[str, str]
) -> None:
    found = pair.run(compute, name, place)
    _check(found, name)
    for ours in found:
        assert ours.placements == results.split()
        assert ours.gradient_placements == {key: gradients.get(key, "R") for key in ours.gradients}
        assert ours.collectives == (0, 0)


# What no strategy takes is moved to where the cheapest one wants it. Collectives forward and backward.
MOVED = [
    ("attention", {"q": "S1", "k": "S1", "v": "S1"}, "S0 S0", (3, 3)),
    ("attention", {"q": "P", "k": "S0", "v": "S0"}, "S0 S0", (1, 1)),
    ("route_topk", {"x": "S1"}, ROUTE, (1, 1)),
    ("expert_layout", {"ids": "S0"}, "R R R R", (1, 0)),
    ("gemm in expert order", {"x": "S0", "weight0": "S2"}, "S1", (1, 1)),
    ("gemm with a gated activation", {"weight0": "S2"}, "P", (1, 1)),
    ("ffn with a gated activation", {"up0": "S2", "down0": "S1"}, "P", (2, 2)),
    ("loss, mean", {"x": "S0", "target": "S0"}, "R", (2, 2)),
    ("loss, sum", {"weight": "S0"}, "R", (1, 1)),
    ("linear_decode", {"x": "P"}, "S0", (1, 0)),
]


@pytest.mark.parametrize(("name", "place", "results", "collectives"), MOVED)
def test_moved_equals_whole(
    pair: Ranks, name: str, place: dict[str, str], results: str, collectives: tuple[int, int]
) -> None:
    found = pair.run(compute, name, place)
    _check(found, name)
    for ours in found:
        assert ours.placements == results.split()
        assert ours.collectives == collectives


def test_router_of_parameters_that_are_made(pair: Ranks) -> None:
    """The gmm gate normalises its centroids first, whose gradient is a sum over processes."""
    found = pair.run(compute, "route_topk_gmm", {"x": "S0"})
    _check(found, "route_topk_gmm")
    for ours in found:
        assert ours.placements == ROUTE.split()
        assert set(ours.gradient_placements.values()) == {"S0", "P"}


def _twice(name: str, place: dict[str, str]) -> bool:
    first, second = compute(name, place), compute(name, place)
    pairs = zip([*first.results, *first.gradients.values()], [*second.results, *second.gradients.values()], strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("name", "place"),
    [("ffn", {"up0": "S0", "down0": "S0"}), ("ffn", {"up0": "S2", "down0": "S1"}), ("attention", HEADS)],
)
def test_repeats_bitwise(pair: Ranks, name: str, place: dict[str, str]) -> None:
    assert pair.run(_twice, name, place) == [True, True]


# On a mesh of two dimensions each has a strategy of its own; of one dimension two may be sharded by both.
TWO_DIMENSIONS = [
    ("attention", {"q": "S0 S2", "k": "S0 S2", "v": "S0 S2"}, ["S0 S2"] * 2),
    ("attention where k is v", {"q": "S3 S3"}, ["S3 S3"] * 2),
    ("packed attention", {"q": "S1 S0", "k": "S1 S0", "v": "S1 S0"}, ["S1 S0"] * 2),
    ("route_topk_mlp", {"x": "S0 S0"}, [*["S0 S0"] * 2, *["P P"] * 4, "S0 S0"]),
    ("ffn", {"x": "S0 S0", "gates": "S0 S0"}, ["S0 S0"]),
    ("ffn", {"x": "S0 R", "gates": "S0 R", "up0": "R S2", "down0": "R S1"}, ["S0 P"]),
    ("ffn", {"x": "R S0", "gates": "R S0", "up0": "S0 R", "down0": "S0 R"}, ["P S0"]),
    ("ffn", {"up0": "S0 S2", "down0": "S0 S1"}, ["P P"]),
    ("gemm with a bias", {"x": "R S1", "gates": "R R", "weight0": "S0 S1"}, ["P P"]),
    ("ffn", {"up0": "S0 S0", "down0": "S0 S0"}, ["P P"]),
    ("gemm", {"x": "R S1", "weight0": "S2 S1"}, ["S2 P"]),
]


@pytest.mark.parametrize(("name", "place", "results"), TWO_DIMENSIONS)
def test_on_two_mesh_dimensions(four: Ranks, name: str, place: dict[str, str], results: list[str]) -> None:
    found = four.run(compute, name, place, (2, 2))
    _check(found, name)
    for ours in found:
        assert ours.placements == results
        assert ours.collectives == (0, 0)


def test_more_processes_than_parts(four: Ranks) -> None:
    """Processes without a sequence, token or expert; heads that do not divide are gathered."""
    for name, place, results in [
        ("ffn", {"up0": "S0", "down0": "S0"}, ["P"]),
        ("ffn", {"x": "S0", "gates": "S0"}, ["S0"]),
        ("ffn of segments", {"up0": "S0", "down0": "S0", "up1": "S0", "down1": "S0"}, ["P"]),
        ("attention", ROWS, ["S0"] * 2),
        ("attention", HEADS, ["S0"] * 2),
    ]:
        found = four.run(compute, name, place, (4,))
        _check(found, name)
        assert all(ours.placements == results for ours in found)


def test_calls_cover_the_ops() -> None:
    ours = {name for name, *_ in (*NATURAL, *MOVED)} | {"route_topk_gmm"}
    assert ours == set(CALLS)
