"""`experts.patch`: models that were already made, routers, and what is refused before anything changes."""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from moe_models import ROUTED, STEP3P7, alone, assert_same, make, outcome, run, tokens
from torch import Tensor, nn
from transformers.integrations import moe

from moduleformer_ext.hf import experts as hf_experts
from moduleformer_ext.hf._routers import _FAMILIES, is_router

MODELS = Path(moe.__file__).parents[1] / "models"


@pytest.mark.parametrize("name", ROUTED)
def test_patched_with_routers(name: str, calls: list[str]) -> None:
    family, changes = ROUTED[name]
    model = make(family, **changes)
    for buffer in (b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")):
        buffer.copy_(torch.linspace(-0.5, 0.5, len(buffer)))
    expected = outcome(model)
    assert hf_experts.patch(model, routers=True) is model
    calls.clear()  # of the comparisons with what was there
    assert_same(outcome(model), expected)
    assert sum(name.startswith("route_topk") for name in calls) == len(hf_routers(model))


def hf_routers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_router(module)]


def router_of(family: str, **config: Any) -> nn.Module:
    """A router of transformers that is ours to replace, whichever file it is in."""
    pattern = re.compile(rf"^class ({family}Top[kK]Router)\(", re.MULTILINE)
    found = ((f, pattern.search(f.read_text(encoding="utf-8"))) for f in MODELS.glob("*/modeling_*.py"))
    file, name = next(((f, match[1]) for f, match in found if match), (None, ""))
    if file is None:
        pytest.skip(f"this transformers has no router of {family}")
    module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
    return getattr(module, name)(SimpleNamespace(**(ROUTER | config)))


ROUTER = {
    "hidden_size": 16,
    "moe_num_experts": 8,
    "moe_topk": 3,
    "n_group": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_local_experts": 8,
    "routed_scaling_factor": 2.5,
    "router_scaling_factor": 1.5,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
}


@pytest.mark.parametrize(
    "config", [{"norm_topk_prob": False}, {"norm_topk_prob": True, "topk_method": "greedy"}], ids=str
)
@pytest.mark.parametrize("family", _FAMILIES)
def test_the_rules_of_routers(family: str, config: dict[str, Any]) -> None:
    """A token's choices may come in any order from routers that do not sort them."""
    torch.manual_seed(8)
    block = nn.Module()
    block.router = router_of(family, **config)
    block.experts = alone(STEP3P7)
    for tensor in (*block.router.parameters(), *block.router.buffers()):
        nn.init.normal_(tensor)
    arguments = [torch.randn(20, 16, requires_grad=True)]
    if "e_score_correction_bias" in inspect.signature(block.router.forward).parameters:
        arguments.append(torch.randn(8))
    expected = results_by_id(block.router(*arguments))
    hf_experts.patch(block, routers=True)
    cotangent, gradients = torch.randn(20, 3), []
    for results in (expected, results_by_id(block.router(*arguments))):
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b)
        gradients.append(torch.autograd.grad((results[1] * cotangent).sum(), [arguments[0], block.router.weight]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def results_by_id(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Logits, weights and ids, in the order of these."""
    logits = next(r for r in results if r.shape[-1] == 8)
    ids = next(r for r in results if not r.is_floating_point())
    (weights,) = (r for r in results if r is not logits and r is not ids)
    order = ids.argsort(-1)
    return [logits, weights.gather(-1, order), ids.gather(-1, order)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3", "MiniMaxM2"])
def test_routers_of_16_bits(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    block = nn.ModuleList([Experts(), router_of(family, norm_topk_prob=True)])
    nn.init.normal_(block[1].weight)
    hf_experts.patch(block.to(dtype), routers=True)
    assert "forward" in vars(block[1])


def test_a_bias_chooses_and_does_not_weigh() -> None:
    router = router_of("DeepseekV3", norm_topk_prob=False, n_group=1, topk_group=1)
    nn.init.normal_(router.weight)
    hf_experts.patch(nn.ModuleList([Experts(), router]), routers=True)
    x = torch.randn(9, 16)
    router.e_score_correction_bias.fill_(0)
    router.e_score_correction_bias[[1, 4, 6]] = 10.0  # as training without a balancing loss changes it, after patching
    logits, weights, ids = router(x)
    assert ids.sort(-1).values.tolist() == [[1, 4, 6]] * 9
    torch.testing.assert_close(weights, 2.5 * logits.gather(-1, ids).sigmoid())


class MixtralTopKRouter(nn.Module):
    """As a release might have it that returns other things, or weighs otherwise, than those that we know."""

    def __init__(self, factor: float = 1.0, places: tuple[int, ...] = (0, 1, 2), shift: int = 0) -> None:
        super().__init__()
        torch.manual_seed(10)
        self.weight, self.top_k = nn.Parameter(torch.randn(7, 5)), 2
        self.factor, self.places, self.shift = factor, places, shift

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits = x @ self.weight.T
        top, ids = logits.topk(self.top_k)
        ids = (ids + self.shift) % 7 if self.shift < 7 else ids + self.shift
        return tuple((logits, self.factor * top.softmax(-1), ids)[place] for place in self.places)


@pytest.mark.parametrize("places", [*itertools.permutations(range(3))])
def test_a_router_returns_what_it_did_in_the_same_order(places: tuple[int, ...]) -> None:
    model = nn.ModuleList([Experts(), MixtralTopKRouter(places=places)])
    x = torch.randn(9, 5)
    expected = model[1](x)
    hf_experts.patch(model, routers=True)
    for a, b in zip(model[1](x), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change", [{"factor": 2.5}, {"places": (0, 1)}, {"places": (0, 1, 2, 2)}, {"shift": 1}, {"shift": 7}]
)
def test_a_router_that_does_something_else_is_refused_by_name(change: dict[str, Any]) -> None:
    model = nn.ModuleList([Experts(), MixtralTopKRouter(**change)])
    with pytest.raises(
        ValueError, match=r"^patch: MixtralTopKRouter must return logits, weights and ids as route_topk"
    ):
        hf_experts.patch(model, routers=True)
    assert all("forward" not in vars(module) for module in model)


def test_equal_logits_leave_a_choice() -> None:
    class Last(MixtralTopKRouter):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            logits = x @ self.weight.T
            top, ids = logits.flip(-1).topk(self.top_k)
            return logits, top.softmax(-1), 6 - ids

    Last.__name__ = "MixtralTopKRouter"
    router = Last()
    nn.init.zeros_(router.weight)
    hf_experts.patch(nn.ModuleList([Experts(), router]), routers=True)


class OlmoeTopKRouter(nn.Module):
    """Takes more, or has less, than the routers of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.top_k = nn.Parameter(torch.ones(7, 5)), 2

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        return hidden_states


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "TypeError: .*mask"),
        ({"norm_topk_prob": True}, "TypeError: .*mask"),
        ({"norm_topk_prob": True, "forward": lambda x: None}, "TypeError: 'NoneType' object is not iterable"),
        ({"norm_topk_prob": True, "forward": lambda x: (None, x, x)}, "others"),
        ({"norm_topk_prob": True, "weight": None}, "AttributeError"),
    ],
)
def test_a_router_of_another_signature_is_refused_by_name(attributes: dict[str, Any], message: str) -> None:
    model = nn.ModuleList([Experts(), OlmoeTopKRouter()])
    for name, value in attributes.items():
        setattr(model[1], name, value)
    with pytest.raises(ValueError, match=rf"^patch: OlmoeTopKRouter must .*, got {message}"):
        hf_experts.patch(model, routers=True)
    assert "is_transposed" not in vars(model[0])


def test_patched_where_transformers_has_no_choice(calls: list[str]) -> None:
    module = alone(STEP3P7)
    assert not hasattr(module, "is_transposed")
    arguments = torch.randn(30, 16), torch.rand(30, 4).argsort(1)[:, :2], torch.rand(30, 2)
    expected = run(module, *arguments)
    hf_experts.patch(module)
    calls.clear()  # of the comparison with its own forward
    for a, b in zip(run(module, *arguments), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert calls == ["grouped_gemm", "grouped_gemm"]


def test_a_copy_of_a_patched_model_has_its_own_weights() -> None:
    model = hf_experts.patch(make("mixtral"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin(tokens()).logits.abs().max() > 0


def test_a_patched_model_is_pickled(tmp_path: Path) -> None:
    model = hf_experts.patch(make("mixtral"), routers=True)
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(twin(tokens()).logits, model(tokens()).logits)


def test_patch_refuses_what_it_does_not_serve() -> None:
    with pytest.raises(ValueError, match=r"^patch: model must have experts stored as gate_up_proj .*, got Linear"):
        hf_experts.patch(nn.Linear(2, 2))
    model = make("mixtral")
    model.model.layers[1].mlp.gate.__class__ = type("OwnTopKRouter", (type(model.model.layers[1].mlp.gate),), {})
    with pytest.raises(ValueError, match=r"^patch: routers must be those of .*Mixtral.*, got OwnTopKRouter"):
        hf_experts.patch(model, routers=True)
    assert_same(outcome(model), outcome(make("mixtral")), 1e-9)  # nothing was changed
    module = nn.Module()
    module.gate_up_proj, module.down_proj = nn.Parameter(torch.zeros(3, 8, 5)), nn.Parameter(torch.zeros(3, 5, 3))
    with pytest.raises(ValueError, match=r"^patch: Module must store gate_up_proj .* got shapes \[3, 8, 5\]"):
        hf_experts.patch(module)


class Experts(nn.Module):
    """As an older transformers, or anybody, has them: no decorator, the gate within forward."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 5))
        self.down_proj = nn.Parameter(torch.randn(3, 5, 4))
        self.act_fn = nn.SiLU()
        for name, value in changes.items():
            setattr(self, name, value)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = torch.zeros_like(hidden_states)
        for token, (ids, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                up = self.gate_up_proj[expert] @ hidden_states[token]
                y[token] += weight * (self.down_proj[expert] @ self.gate(*up.chunk(2)))
        return y

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up


class Clamped(Experts):
    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate.clamp(max=30)) * up


class Halved(Experts):
    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up / 2


class Sorted(Experts):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Bare(Experts):
    def forward(self, *_: Tensor) -> Tensor:
        raise NotImplementedError


class Interrupted(Experts):
    def forward(self, *_: Tensor) -> Tensor:
        raise KeyboardInterrupt


class Infinite(Experts):
    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up / 0


class Guarded(Experts):
    """Ours gives NaN where an expert has it; this one does not."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.down_proj, torch.nan)

    def forward(self, *arguments: Tensor) -> Tensor:
        return super().forward(*arguments).nan_to_num()


class WeightsFirst(Experts):
    def forward(self, hidden_states: Tensor, top_k_weights: Tensor, top_k_index: Tensor) -> Tensor:
        return super().forward(hidden_states, top_k_index, top_k_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_experts_are_patched(dtype: torch.dtype) -> None:
    module = Experts().to(dtype)
    arguments = torch.randn(6, 5, dtype=dtype), torch.rand(6, 3).argsort(1)[:, :2], torch.rand(6, 2, dtype=dtype)
    expected = module(*arguments)
    before = torch.get_rng_state()
    hf_experts.patch(module)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(module(*arguments), expected, rtol=0.05, atol=0.05)
    assert isinstance(hf_experts.patch(Experts().to("meta")), Experts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Sorted, r"^patch: Sorted must make \[T, D\] of hidden states .*, got TypeError: .*positional arguments"),
        (Bare, r"^patch: Bare must make .* got NotImplementedError$"),
        (Guarded, r"^patch: Guarded must compute the sum of .*, got other values from its own forward"),
        (Infinite, r"^patch: Infinite must compute the sum of .*, got NaN or infinity for every token from its own"),
        (WeightsFirst, r"WeightsFirst must make .* got \w+Error"),
        (Halved, r"Halved must compute the sum of .*, got other values from its own forward"),
        (Clamped, r"Clamped must compute the sum of"),
        (lambda: Experts(act_fn=None), "Experts must make .* got TypeError: 'NoneType' object is not callable"),
        (lambda: Experts(has_bias=True), r"Experts.gate_up_proj_bias must be a tensor \[E, out\], got NoneType"),
        (lambda: Experts(is_transposed=True), r"Experts must make .* got \w+Error"),
        (lambda: Experts().to(torch.float8_e4m3fn), r"Experts must make .* got \w+Error"),
        (lambda: Experts(has_post_expert_norm=True, post_expert_norm=nn.LayerNorm(5)), "got other values"),
    ],
)
def test_patch_refuses_what_would_fail_or_differ_later(make: Any, message: str) -> None:
    model = nn.ModuleList([Experts(), make()])
    before = [dict(vars(module)) for module in model]
    with pytest.raises(ValueError, match=message):
        hf_experts.patch(model)
    assert [vars(module) for module in model] == before  # nothing was changed


def test_a_model_is_as_it_was_after_any_error() -> None:
    model = nn.ModuleList([Experts(), Interrupted()])
    before = [dict(vars(module)) for module in model]
    with pytest.raises(KeyboardInterrupt):
        hf_experts.patch(model)
    assert [vars(module) for module in model] == before
