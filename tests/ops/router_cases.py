"""Routers to test: a gate network with its tensors, to be called on the ops or on their reference twins."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moduleformer_ext.types import RouteTopK

GATES = ("logits", "linear", "mlp", "gmm")
ORDERS = ("softmax_topk", "topk_softmax")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("gates", "prob_sum", "plogp_sum", "logsumexp_sq_sum", "logits")


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
        seed: int = 0,
    ) -> Router:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

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
        temperature = torch.tensor(0.7, dtype=dtype)
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
        """The same router in float64, in leaves of its own that require grad."""
        parameters = {
            name: value.detach().double() if isinstance(value, Tensor) else tuple(v.detach().double() for v in value)
            for name, value in self.parameters.items()
        }
        return Router(self.gate, self.x.detach().double(), parameters).require_grad()


def weighted_sum(route: RouteTopK, cotangents: dict[str, Tensor]) -> Tensor:
    """A scalar whose gradients with respect to the fields of `route` are the cotangents."""
    terms = [(getattr(route, name) * value.to(getattr(route, name).dtype)).sum() for name, value in cotangents.items()]
    return torch.stack(terms).sum()


def random_cotangents(route: RouteTopK, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(getattr(route, name).shape, generator=generator, dtype=torch.float64)
        for name in DIFFERENTIABLE
    }
