"""Mixture-of-experts models of transformers on our kernels: values and gradients of their own eager implementation."""

from __future__ import annotations

import copy
import importlib
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.integrations import moe

from moduleformer_ext import ops
from moduleformer_ext.hf import experts as hf_experts

OURS = hf_experts.NAME
MODELS = Path(moe.__file__).parents[1] / "models"
COMMON = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE = COMMON | {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
QWEN = MOE | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}
DEEPSEEK = MOE | {
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": QWEN,
    "qwen3_moe": QWEN | {"head_dim": 8, "norm_topk_prob": True},
    "olmoe": MOE,
    "granitemoe": COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": DEEPSEEK | {"topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "jamba": COMMON
    | {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4},
}
ROUTERS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss")


def make(family: str, experts_implementation: str = "eager", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**(FAMILIES[family] | changes))
    model = AutoModelForCausalLM.from_config(config, experts_implementation=experts_implementation)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def tokens() -> Tensor:
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(2))


def outcome(model: nn.Module) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter."""
    x = tokens()
    out = model(input_ids=x, labels=x, use_cache=False)
    model.zero_grad()
    out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **gradients}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-6)
        assert error < tolerance, f"{name}: {error}"


def recorded(op: Any, seen: list[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(op.__name__)
        return op(*args, **kwargs)

    return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of our ops as they are called."""
    seen: list[str] = []
    for name in ("expert_ffn", "grouped_gemm", "route_topk"):
        monkeypatch.setattr(ops, name, recorded(getattr(ops, name), seen))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_eager(family: str, calls: list[str]) -> None:
    expected = outcome(make(family))
    assert not calls
    assert_same(outcome(make(family, OURS)), expected)
    assert set(calls) == ({"grouped_gemm"} if family == "gpt_oss" else {"expert_ffn"})


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_bfloat16_is_as_accurate_as_eager(family: str) -> None:
    """Beyond the router, whose choices rounding may change: the experts alone."""
    module = next(m for m in make(family).modules() if type(m).__name__.endswith("Experts"))
    torch.manual_seed(3)
    x, ids = torch.randn(40, 32), torch.rand(40, 4).argsort(1)[:, :2]
    weights = torch.rand(40, 2)
    exact = module(x, ids, weights)
    low = copy.deepcopy(module).bfloat16()
    errors = [
        (f(low, x.bfloat16(), ids, weights.bfloat16()).float() - exact).norm() / exact.norm()
        for f in (type(module).forward.__wrapped__, hf_experts.experts_forward)
    ]
    assert errors[1] <= 1.2 * errors[0]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_saved_loaded_and_generated_with(family: str, tmp_path: Path) -> None:
    eager = make(family).eval()
    eager.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=OURS, dtype=torch.float32).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    assert torch.equal(model.generate(tokens(), **options), eager.generate(tokens(), **options))
    model.set_experts_implementation("eager")
    assert torch.equal(model(tokens()).logits, eager(tokens()).logits)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_weights_get_contiguous_gradients(family: str) -> None:
    model = make(family, OURS)
    outcome(model)
    gradients = [p.grad for name, p in model.named_parameters() if "experts" in name]
    assert gradients
    assert all(g.is_contiguous() for g in gradients)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_compiles_to_one_graph(family: str) -> None:
    model = make(family, OURS)
    module = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    x, ids, weights = torch.randn(9, 32), torch.rand(9, 4).argsort(1)[:, :2], torch.rand(9, 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ids, weights), module(x, ids, weights))


def test_autocast() -> None:
    model = make("mixtral", OURS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(tokens()).logits
    exact = model(tokens()).logits
    assert (low.float() - exact).norm() / exact.norm() < 0.1


NEMOTRON_H = "nemotron_h", "NemotronHExperts"
MUSE_SPARK = "muse_spark", "MuseSparkExperts"
PRIVACY_FILTER = "openai_privacy_filter", "OpenAIPrivacyFilterExperts"
STEP3P7 = "step3p7", "Step3p7Experts"
"""Of which transformers 5.17 lacks some."""


def alone(kind: tuple[str, str], **config: Any) -> nn.Module:
    """An experts module of a family that is too large for a test."""
    family, name = kind
    module_of = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    fields = {
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 24,
        "moe_hidden_size": 16,
        "moe_latent_size": None,
        "hidden_act": "silu",
        "mlp_hidden_act": "relu2",
        "swiglu_alpha": 1.7,
        "swiglu_limit": 1.0,
        "post_norm_eps": 1e-5,
        "_experts_implementation": "eager",
    }
    torch.manual_seed(4)
    module = getattr(module_of, name)(SimpleNamespace(**(fields | config)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


ALONE: dict[str, tuple[tuple[str, str], dict[str, Any], set[str]]] = {
    "plain, activation of its own": (NEMOTRON_H, {}, {"grouped_gemm"}),
    "plain, activation of the op": (NEMOTRON_H, {"mlp_hidden_act": "gelu_new"}, {"expert_ffn"}),
    "biases, halves side by side, clamped": (PRIVACY_FILTER, {}, {"grouped_gemm"}),
    "norm behind every expert": (MUSE_SPARK, {}, {"grouped_gemm"}),
    "another activation, gated": (MUSE_SPARK, {"hidden_act": "quick_gelu"}, {"grouped_gemm"}),
}


def run(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    y = module(leaves[0], ids, leaves[1])
    inputs = [*leaves, *module.parameters()]
    return [y, *torch.autograd.grad(y.square().sum(), inputs)]


@pytest.mark.parametrize("case", ALONE)
def test_other_kinds_of_experts(case: str, calls: list[str]) -> None:
    kind, config, used = ALONE[case]
    module = alone(kind, **config)
    torch.manual_seed(5)
    arguments = torch.randn(30, 16), torch.rand(30, 4).argsort(1)[:, :2], torch.rand(30, 2)
    expected = run(module, *arguments)
    module.config._experts_implementation = OURS
    for a, b in zip(run(module, *arguments), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    assert set(calls) == used


@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_every_activation_that_the_op_has(name: str, calls: list[str]) -> None:
    module = alone(NEMOTRON_H, mlp_hidden_act=name)
    arguments = torch.randn(30, 16), torch.rand(30, 4).argsort(1)[:, :2], torch.rand(30, 2)
    expected = run(module, *arguments)
    module.config._experts_implementation = OURS
    for a, b in zip(run(module, *arguments), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    assert calls == ["expert_ffn"]


def test_experts_of_other_processes_count_nothing() -> None:
    module = alone(MUSE_SPARK).requires_grad_(False)
    module.has_post_expert_norm, module.config._experts_implementation = False, OURS
    x, ids, weights = torch.randn(8, 16), torch.tensor([[0, 4], [4, 4], [2, 3], [1, 4]] * 2), torch.rand(8, 2)
    expected = module(x, ids.clamp(max=3), weights.masked_fill(ids == 4, 0))
    module._is_expert_parallel = True
    torch.testing.assert_close(module(x, ids, weights), expected)


# ---- patch ----


@pytest.mark.parametrize("family", ROUTERS)
def test_patched_with_routers(family: str, calls: list[str]) -> None:
    model = make(family)
    expected = outcome(model)
    assert hf_experts.patch(model, routers=True) is model
    calls.clear()  # of the comparisons with what was there
    assert_same(outcome(model), expected)
    assert calls.count("route_topk") == 2


def router_of(family: str, **config: Any) -> nn.Module:
    """A router of transformers that is ours to replace, whichever file it is in."""
    name = f"{family}TopKRouter"
    text = f"class {name}("
    file = next((f for f in MODELS.glob("*/modeling_*.py") if text in f.read_text(encoding="utf-8")), None)
    if file is None:
        pytest.skip(f"this transformers has no {name}")
    module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
    fields = {"num_experts_per_tok": 3, "num_experts": 7, "num_local_experts": 7, "hidden_size": 16}
    return getattr(module, name)(SimpleNamespace(**(fields | config)))


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("family", hf_experts._ORDERS)
def test_the_rules_of_routers(family: str, norm_topk_prob: bool) -> None:
    torch.manual_seed(8)
    block = nn.Module()
    block.router = router_of(family, norm_topk_prob=norm_topk_prob)
    block.experts = alone(STEP3P7)
    for parameter in block.router.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(20, 16)
    expected = block.router(x)
    hf_experts.patch(block, routers=True)
    for a, b in zip(block.router(x), expected, strict=True):
        torch.testing.assert_close(a, b)


class MixtralTopKRouter(nn.Module):
    """As a release might have it that returns other things, or weighs otherwise, than those that we know."""

    def __init__(self, factor: float = 1.0, places: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        torch.manual_seed(10)
        self.weight, self.top_k = nn.Parameter(torch.randn(7, 5)), 2
        self.factor, self.places = factor, places

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits = x @ self.weight.T
        top, ids = logits.topk(self.top_k)
        return tuple((logits, self.factor * top.softmax(-1), ids)[place] for place in self.places)


@pytest.mark.parametrize("places", [*itertools.permutations(range(3))])
def test_a_router_returns_what_it_did_in_the_same_order(places: tuple[int, ...]) -> None:
    model = nn.ModuleList([Experts(), MixtralTopKRouter(places=places)])
    x = torch.randn(9, 5)
    expected = model[1](x)
    hf_experts.patch(model, routers=True)
    for a, b in zip(model[1](x), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("change", [{"factor": 2.5}, {"places": (0, 1)}, {"places": (0, 1, 2, 2)}])
def test_a_router_that_does_something_else_is_refused_by_name(change: dict[str, Any]) -> None:
    model = nn.ModuleList([Experts(), MixtralTopKRouter(**change)])
    with pytest.raises(
        ValueError, match=r"^patch: MixtralTopKRouter must return logits, weights and ids as route_topk"
    ):
        hf_experts.patch(model, routers=True)
    assert all("forward" not in vars(module) for module in model)


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
    model = make("deepseek_v3")
    with pytest.raises(ValueError, match=r"^patch: routers must be those of .*Mixtral.*, got DeepseekV3TopkRouter"):
        hf_experts.patch(model, routers=True)
    assert_same(outcome(model), outcome(make("deepseek_v3")), 1e-9)  # nothing was changed
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


def test_weights_that_are_no_matrices_are_refused_by_name() -> None:
    module = make("mixtral", OURS).model.layers[0].mlp.experts
    module.down_proj = nn.Parameter(torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"MixtralExperts.down_proj must be a plain tensor .*, got shape \[4, 6\]"):
        module(torch.zeros(2, 32), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))


def test_quantised_experts_are_refused_by_name() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    module = make("mixtral", OURS).model.layers[0].mlp.experts
    weight = module.gate_up_proj.detach()
    module.gate_up_proj = nn.Parameter(TwoTensor(weight, weight))
    with pytest.raises(ValueError, match=r"MixtralExperts.gate_up_proj must be a plain tensor .*, got TwoTensor"):
        module(torch.zeros(2, 32), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))


def test_the_name_is_registered() -> None:
    assert OURS in moe.ALL_EXPERTS_FUNCTIONS.valid_keys()
    with pytest.raises(ValueError, match="moduleformer_ext"):  # transformers' own error lists it
        make("mixtral", "no such implementation")


# ---- LoRA ----


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_lora_on_experts(family: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"], task_type="CAUSAL_LM"
    )
    results = {}
    for implementation in ("eager", OURS):
        torch.manual_seed(6)
        model = peft.get_peft_model(make(family, implementation), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
        results[implementation] = outcome(model)
        results[f"{implementation}, merged"] = {"logits": model.merge_and_unload()(tokens()).logits.detach()}
    assert any("lora_" in name for name in results[OURS])
    assert_same(results[OURS], results["eager"])
    assert_same(results[f"{OURS}, merged"], results["eager, merged"])
    plain = make(family)(tokens()).logits
    assert (results[OURS]["logits"] - plain).norm() / plain.norm() > 1e-2
