"""Gate networks as modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from moduleformer_ext.nn import GMMRouter, LinearRouter, MLPRouter, Router, make_router

D, E, K, G = 16, 6, 3, 8


def build(gate_type: str, **options: object) -> Router:
    torch.manual_seed(0)
    router = make_router(gate_type, D, E, K, gating_size=G, **options).double()  # type: ignore[arg-type]
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return router


def dense_logits(router: Router, x: torch.Tensor) -> torch.Tensor:
    if isinstance(router, GMMRouter):
        z, centroids = router.w_gate(x), router.expert_centroids
        return F.cosine_similarity(z[:, None], centroids[None], dim=-1) * router.temperature.exp()
    return router.w_gate(x)


@pytest.mark.parametrize("gate_type", ["mlp", "linear", "gmm"])
def test_routes_as_the_dense_network_does(gate_type: str) -> None:
    router, x = build(gate_type), torch.randn(10, D, dtype=torch.float64)
    route = router(x)
    logits = dense_logits(router, x)
    gates, ids = logits.softmax(-1).topk(K)
    torch.testing.assert_close(route.logits, logits)
    torch.testing.assert_close(route.gates, gates)
    assert torch.equal(route.expert_ids.long(), ids)


def test_the_other_order_renormalises() -> None:
    x = torch.randn(10, D, dtype=torch.float64)
    route = build("linear", order="topk_softmax")(x)
    torch.testing.assert_close(route.gates.sum(-1), torch.ones(10, dtype=torch.float64))


def test_sampling_and_dropout_only_in_training() -> None:
    router, x = build("mlp", sample_topk=2, dropout=0.9), torch.randn(50, D, dtype=torch.float64)
    calm = [router.eval()(x) for _ in range(2)]
    assert torch.equal(calm[0].logits, calm[1].logits) and torch.equal(calm[0].expert_ids, calm[1].expert_ids)
    torch.manual_seed(1)
    wild = [router.train()(x) for _ in range(2)]
    assert not torch.equal(wild[0].logits, wild[1].logits)
    torch.manual_seed(1)
    assert torch.equal(router(x).expert_ids, wild[0].expert_ids)


def test_sampled_experts_are_distinct_and_follow_the_best() -> None:
    router, x = build("linear", sample_topk=2).train(), torch.randn(200, D, dtype=torch.float64)
    ids = router(x).expert_ids.long()
    assert torch.equal(ids[:, 0], router.w_gate(x).argmax(-1))
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    assert not torch.equal(ids, router.eval()(x).expert_ids.long())


def test_dropout_path_equals_the_fused_one_when_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    router, x = build("mlp", dropout=0.5).train(), torch.randn(10, D, dtype=torch.float64)
    monkeypatch.setattr(F, "dropout", lambda h, *_: h)
    torch.testing.assert_close(router(x).logits, router.eval()(x).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate_type", ["mlp", "linear", "gmm"])
def test_normaliser_rows_are_in_the_softmax_and_experts_are_chosen_once(
    gate_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of pruned experts stay; logits and choice are those of the fused gate network without them."""
    router = build(gate_type).to(dtype)
    pruned = build(gate_type, num_normaliser_rows=2).to(dtype)
    pruned.load_state_dict(router.state_dict() | {"normaliser_rows": pruned.normaliser_rows})
    x = torch.randn(20, D, dtype=dtype)
    expected = router(x)

    def refuse(*_: object) -> None:
        raise AssertionError("the fused gate network chooses too")

    monkeypatch.setattr(type(router), "_route", refuse)
    route = pruned(x)
    assert route.logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(route.logits, expected.logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(route.expert_ids, expected.expert_ids)
    with torch.autocast("cpu", torch.bfloat16):  # router arithmetic stays what it is
        all_logits = torch.cat(pruned._called_logits(x), dim=1)
        assert torch.equal(pruned(x).gates, route.gates)
    torch.testing.assert_close(route.gates, all_logits.softmax(-1).gather(1, route.expert_ids.long()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LinearRouter(D, E, 7), r"k must be in \[1, 6\]"),
        (lambda: MLPRouter(D, E, 2, gating_size=G, sample_topk=3), r"sample_topk must be in \[0, 2\]"),
        (lambda: make_router("top1", D, E, 2, gating_size=G), "gate_type must be"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Router], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
