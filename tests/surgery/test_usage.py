import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moduleformer_ext.nn import BlockRoutes
from moduleformer_ext.surgery import (
    ExpertUsage,
    count_usage,
    divergences,
    kl_divergence,
    plot_expert_usage,
    usage_table,
)
from moduleformer_ext.surgery.anatomy import KINDS
from moduleformer_ext.surgery.usage import layer_divergences
from moduleformer_ext.types import RouteTopK


def _route(counts: list[int]) -> RouteTopK:
    empty = torch.empty(0)
    return RouteTopK(empty, empty, empty, empty, empty, torch.tensor(counts, dtype=torch.int32), empty)


def _usage(generator: np.random.Generator, layers: int, experts: dict[str, int]) -> ExpertUsage:
    def draw(kind: str) -> list[np.ndarray]:
        return [generator.multinomial(4000, generator.dirichlet(np.full(experts[kind], 0.5))) for _ in range(layers)]

    return ExpertUsage({kind: draw(kind) for kind in KINDS})


def test_counts_add_up_and_normalise() -> None:
    usage = ExpertUsage()
    usage.add([BlockRoutes(_route([1, 3]), _route([2, 0, 2]))])
    usage.add([BlockRoutes(_route([2, 2]), _route([4, 0, 0]))])
    assert usage.counts["attention"][0].tolist() == [3, 5]
    assert usage.counts["ffn"][0].tolist() == [6, 0, 2]
    assert usage.frequencies("ffn")[0].tolist() == [0.75, 0.0, 0.25]


def test_kl_divergence_is_the_formula() -> None:
    a, b = np.array([10, 0, 5]), np.array([1, 9, 5])
    p = [(n + 0.5) / 16.5 for n in a]
    q = [(n + 0.5) / 16.5 for n in b]
    expected = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    assert kl_divergence(a, b) == pytest.approx(expected, rel=1e-12)
    assert kl_divergence(a, a) == 0.0
    assert kl_divergence(100 * a, 100 * b) > kl_divergence(a, b) > 0.0


def test_layer_divergences() -> None:
    generator = np.random.default_rng(0)
    a, b = (_usage(generator, 3, {"attention": 4, "ffn": 6}) for _ in range(2))
    for kind in KINDS:
        expected = [kl_divergence(x, y) for x, y in zip(a.counts[kind], b.counts[kind], strict=True)]
        assert layer_divergences(a, b, kind).tolist() == expected


def _load_entropy(routes: BlockRoutes) -> float:
    usage = ExpertUsage()
    usage.add([routes])
    return usage.load_entropy()


def test_load_entropy_is_one_when_even_and_zero_when_collapsed() -> None:
    assert _load_entropy(BlockRoutes(_route([5, 5, 5]), _route([1, 1]))) == pytest.approx(1.0)
    assert _load_entropy(BlockRoutes(_route([5, 0, 0]), _route([0, 2]))) == pytest.approx(0.0)
    assert _load_entropy(BlockRoutes(_route([5, 0]), _route([1, 1]))) == pytest.approx(0.5)
    assert _load_entropy(BlockRoutes(_route([5]), _route([1, 1]))) == pytest.approx(1.0)


@pytest.mark.parametrize("domains", [["only"], ["code", "prose"], ["a", "b", "c", "d"]])
def test_plot_is_drawn(tmp_path: Path, domains: list[str]) -> None:
    generator = np.random.default_rng(0)
    usage = {domain: _usage(generator, 4, {"attention": 8, "ffn": 16}) for domain in domains}
    plot_expert_usage(tmp_path / "usage.png", usage)
    assert (tmp_path / "usage.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_layers_with_unequal_numbers_of_experts(tmp_path: Path) -> None:
    usage = ExpertUsage({kind: [np.array([1, 2]), np.array([1, 2, 3])] for kind in KINDS})
    plot_expert_usage(tmp_path / "usage.png", {"a": usage, "b": usage})
    assert (tmp_path / "usage.png").stat().st_size > 10_000


def test_usage_equals_brute_force(make_model, tokens) -> None:
    model = make_model()
    usage = count_usage(model, [tokens[:2], tokens[2:]])
    for kind, module in (("attention", "attn.q_proj"), ("ffn", "mlpf")):
        for layer in range(2):
            seen: list[int] = []
            gate = model.get_submodule(f"transformer.h.{layer}.{module}.gate")
            hook = gate.register_forward_hook(lambda _m, _x, route, seen=seen: seen.extend(route.expert_ids.flatten()))
            model(tokens)
            hook.remove()
            expected = [sum(int(chosen) == expert for chosen in seen) for expert in range(gate.num_experts)]
            assert usage.counts[kind][layer].tolist() == expected


def test_normalisation_and_tables(make_model, tokens) -> None:
    model = make_model()
    usage = count_usage(model, [tokens])
    assert ExpertUsage.from_dict(usage.to_dict()).to_dict() == usage.to_dict()
    for counts, by_max, by_sum in zip(
        usage.counts["ffn"], usage.frequencies("ffn", "max"), usage.frequencies("ffn"), strict=True
    ):
        assert by_max.tolist() == [count / counts.max() for count in counts]
        assert by_sum.tolist() == [count / counts.sum() for count in counts]
    rows = list(csv.DictReader(io.StringIO(usage_table({"a": usage, "b": usage + usage}, model.config))))
    assert len(rows) == 2 * (4 + 5 + 4 + 6)
    assert [int(row["slots"]) for row in rows[:4]] == usage.counts["attention"][0].tolist()
    assert [int(row["slots"]) for row in rows[19:23]] == (2 * usage.counts["attention"][0]).tolist()
    found = divergences({"a": usage, "b": usage + usage})
    assert found["ffn"]["a"]["b"] == layer_divergences(usage, usage + usage, "ffn").tolist()
    with pytest.raises(ValueError, match="normalise must be one of max, sum, got 'mean'"):
        usage.frequencies("ffn", "mean")
