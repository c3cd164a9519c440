"""Routers to test: a gate network with its tensors, to be called on the ops or on their reference twins."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moduleformer_ext import ops, reference
from moduleformer_ext.types import RouteTopK

GATES = ("logits", "linear", "mlp", "gmm")
ORDERS = ("softmax_topk", "topk_softmax", "sigmoid_topk", "sigmoid_topk_renormalised")
SOFTMAX_ORDERS = ORDERS[:2]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("gates", "prob_sum", "plogp_sum", "logsumexp_sq_sum", "logits")
# Relative to the largest entry. Results are computed in float32 from whatever is stored, so they do not care about
# 16-bit storage; gradients are rounded to it.
RESULT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@dataclass
class Router:
    """A gate and its inputs: ``x`` (for "logits" the logits) and the parameters by name, in the op's order."""

    gate: str
    x: Tensor
    parameters: dict[str, Tensor | tuple[Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def random(
        cls,
        gate: str,
        tokens: int,
        num_experts: int,
        *,
        dim: int = 24,
        hidden: int = 20,
        dtype: torch.dtype = torch.float64,
        device: torch.device | None = None,
        seed: int = 0,
    ) -> Router:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

        if gate == "logits":
            return cls(gate, normal(tokens, num_experts))
        x = normal(tokens, dim)
        if gate == "linear":
            return cls(gate, x, {"weight": normal(num_experts, dim, scale=dim**-0.5)})
        hidden_weight = normal(hidden, dim, scale=dim**-0.5)
        if gate == "mlp":
            weight = normal(num_experts, hidden, scale=2 * hidden**-0.5)
            return cls(
                gate, x, {"hidden_weight": hidden_weight, "hidden_bias": normal(hidden, scale=0.1), "weight": weight}
            )
        temperature = torch.tensor(0.7, dtype=dtype, device=device)
        return cls(
            gate,
            x,
            {"hidden_weight": hidden_weight, "centroids": normal(num_experts, hidden), "temperature": temperature},
        )

    def __call__(self, module: ModuleType, k: int, **options: Any) -> RouteTopK:
        """Route with `module`, which is moduleformer_ext.ops or moduleformer_ext.reference."""
        name = "route_topk" if self.gate == "logits" else f"route_topk_{self.gate}"
        return getattr(module, name)(self.x, *self.parameters.values(), k, **options)

    def leaves(self) -> list[Tensor]:
        tensors = [self.x]
        for value in self.parameters.values():
            tensors.extend([value] if isinstance(value, Tensor) else value)
        return tensors

    def require_grad(self) -> Router:
        for tensor in self.leaves():
            tensor.requires_grad_()
        return self

    def double(self) -> Router:
        """The same router in float64 on the CPU, in leaves of its own that require grad."""

        def exact(tensor: Tensor) -> Tensor:
            return tensor.detach().cpu().double()

        parameters = {
            name: exact(value) if isinstance(value, Tensor) else tuple(map(exact, value))
            for name, value in self.parameters.items()
        }
        return Router(self.gate, exact(self.x), parameters).require_grad()


def weighted_sum(route: RouteTopK, cotangents: dict[str, Tensor]) -> Tensor:
    """A scalar whose gradients with respect to the fields of `route` are the cotangents."""
    terms = [(getattr(route, name) * value.to(getattr(route, name))).sum() for name, value in cotangents.items()]
    return torch.stack(terms).sum()


def random_cotangents(route: RouteTopK, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(getattr(route, name).shape, generator=generator, dtype=torch.float64)
        for name in DIFFERENTIABLE
    }


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, what
    if expected.numel() == 0:
        return
    scale = expected.abs().max().clamp_min(1e-6)
    error = ((actual.detach().cpu().double() - expected).abs().max() / scale).item()
    assert error <= tolerance, f"{what}: relative error {error}"


def check(router: Router, k: int, **options: Any) -> None:
    """Results and, for a random weighting of them, the gradients of all inputs."""
    dtype, device, exact = router.x.dtype, router.x.device, router.require_grad().double()
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    route, expected = router(ops, k, **there), exact(reference, k, **options)
    assert torch.equal(route.expert_ids.cpu(), expected.expert_ids)
    assert torch.equal(route.counts.cpu(), expected.counts)
    assert route.expert_ids.dtype == route.counts.dtype == torch.int32
    result_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for name in DIFFERENTIABLE:
        field = getattr(route, name)
        assert field.dtype == result_dtype
        assert_close(field, getattr(expected, name), RESULT_TOLERANCE[dtype], name)

    cotangents = random_cotangents(route)
    weighted_sum(route, cotangents).backward()
    weighted_sum(expected, cotangents).backward()
    for index, (tensor, twin) in enumerate(zip(router.leaves(), exact.leaves(), strict=True)):
        assert tensor.grad.dtype == dtype
        assert_close(tensor.grad, twin.grad, GRADIENT_TOLERANCE[dtype], f"gradient of input {index}")
