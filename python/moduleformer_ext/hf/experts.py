"""The mixture-of-experts models of transformers on the kernels of this library.

Importing `moduleformer_ext.hf` registers "moduleformer_ext" among the implementations of experts:

>>> AutoModelForCausalLM.from_pretrained(directory, experts_implementation="moduleformer_ext")  # doctest: +SKIP

The modules, their parameters and their files stay transformers' own; expert matrices are read as they are stored, and
their gradients lie likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import activations
from transformers.integrations import moe

from moduleformer_ext import ops
from moduleformer_ext.hf._routers import in_a_line, is_router, route, rule_of

__all__ = ["NAME", "experts_forward", "patch"]

NAME = "moduleformer_ext"

Model = TypeVar("Model", bound=nn.Module)

_ACTIVATIONS: dict[type[nn.Module], str] = {
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """y_t = Σ_k w_tk · expert_(t,k)(x_t), as the `forward` of an experts module of transformers.

    One op where the module's activation is among those of :func:`moduleformer_ext.ops.grouped_gemm`; else two
    products with the module's own activation or gate between them.

    Args:
        module: with `gate_up_proj` or `up_proj`, `down_proj` and, with `has_bias`, their biases.
        hidden_states: [T, D].
        top_k_index: [T, K] expert ids.
        top_k_weights: [T, K].

    Returns:
        y [T, D] in x's dtype.

    Raises:
        ValueError: for weights that are not plain tensors [E, ., .], and as the ops do.
    """
    gated = _is_gated(module)
    up_name = "gate_up_proj" if gated else "up_proj"
    up, up_bias = _weight_and_bias(module, up_name)
    down, down_bias = _weight_and_bias(module, "down_proj")
    gates = top_k_weights.to(torch.float64 if hidden_states.dtype == torch.float64 else torch.float32)
    if getattr(module, "_is_expert_parallel", False):  # experts of other processes have the first id beyond ours
        elsewhere = top_k_index >= up.shape[0]
        top_k_index, gates = top_k_index.clamp(max=up.shape[0] - 1), gates.masked_fill(elsewhere, 0)
    layout = ops.expert_layout(top_k_index, up.shape[0])
    norm = getattr(module, "post_expert_norm", None) if getattr(module, "has_post_expert_norm", False) else None
    function = _activation(module, gated)
    if function is not None and norm is None:
        y = ops.expert_ffn(
            hidden_states, up, down, layout, gates, activation=function, up_bias=up_bias, down_bias=down_bias
        )
        return y.to(hidden_states.dtype)
    hidden = ops.grouped_gemm(hidden_states, up, layout, bias=up_bias)
    hidden = _apply_gate(module)(hidden) if gated else module.act_fn(hidden)
    if norm is None:
        y = ops.grouped_gemm(hidden, down, layout, x_order="expert", out_order="token", gates=gates, bias=down_bias)
    else:
        y = norm(ops.grouped_gemm(hidden, down, layout, x_order="expert", out_order="slot", bias=down_bias))
        y = (y * gates[..., None]).sum(1)
    return y.to(hidden_states.dtype)


def patch(model: Model, *, routers: bool = False) -> Model:
    """Let the experts of a model run on our kernels, whether or not transformers can choose their implementation.

    Args:
        model: with experts modules whose `forward` takes hidden states, expert ids and weights, and whose matrices
            are `down_proj` and `gate_up_proj` [E, 2F, D] (or [E, D, 2F]), or `up_proj` where transformers says how it
            lies.
        routers: replace the routers beside them, too: scores and top-k by :func:`moduleformer_ext.ops.route_topk`,
            with float32 weights.

    Returns:
        The model, changed in place.

    Raises:
        ValueError: no module has such experts, one of them does not compute what its kind does, which a few tokens
            show (unless it is on the meta device) or, with `routers`, there is no router, or one routes by a rule that
            `route_topk` has not, or returns something else. The model is then as it was.
    """
    experts: list[Any] = [module for module in model.modules() if _has_experts(module)]
    if not experts:
        raise ValueError(
            "patch: model must have experts stored as gate_up_proj (or up_proj) and down_proj [E, out, in], got "
            f"{type(model).__name__}, which has none"
        )
    found: list[Any] = [module for module in model.modules() if routers and is_router(module)]
    if routers and not found:
        raise ValueError(
            f"patch: model must have routers of a class ...TopKRouter, got {type(model).__name__}, which has none"
        )
    rules = [rule_of(router) for router in found]  # all are known before anything changes
    transposed = [getattr(module, "is_transposed", None) for module in experts]
    try:
        for module in experts:
            if not hasattr(module, "is_transposed"):
                module.is_transposed = _lies_transposed(module)
            _check_experts(module)
    except BaseException:
        for module, before in zip(experts, transposed, strict=True):
            if before is None and hasattr(module, "is_transposed"):
                del module.is_transposed
        raise
    for module in experts:
        module.forward = partial(experts_forward, module)  # a bound method could not be pickled
    for router, rule in zip(found, rules, strict=True):
        router.forward = partial(route, router, rule)
    return model


def _is_gated(module: Any) -> bool:
    return bool(getattr(module, "has_gate", hasattr(module, "gate_up_proj")))


def _weight_and_bias(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """A module's matrices as the ops take them, [E, in, out], and their biases."""
    weight: Any = getattr(module, name, None)
    # Adapters put what they computed in the place of the parameter.
    if not isinstance(weight, Tensor) or weight.dim() != 3 or _is_wrapper(weight):
        flat = isinstance(weight, Tensor) and weight.dim() != 3
        got = f"shape {list(weight.shape)}" if flat else type(weight).__name__
        raise ValueError(
            f"{NAME}: {type(module).__name__}.{name} must be a plain tensor [E, out, in], got {got}; "
            "quantised or distributed experts need another experts_implementation"
        )
    has_bias = getattr(module, "has_bias", hasattr(module, f"{name}_bias"))
    bias = getattr(module, f"{name}_bias", None) if has_bias else None
    if has_bias and not isinstance(bias, Tensor):
        raise ValueError(
            f"{NAME}: {type(module).__name__}.{name}_bias must be a tensor [E, out], got {type(bias).__name__}"
        )
    return (weight if getattr(module, "is_transposed", False) else weight.transpose(1, 2)), bias


def _is_wrapper(weight: Tensor) -> bool:
    return type(weight) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(weight)


def _apply_gate(module: Any) -> Callable[[Tensor], Tensor]:
    own: Callable[[Tensor], Tensor] | None = getattr(module, "_apply_gate", None)
    return own or MethodType(moe._default_apply_gate, module)


def _activation(module: Any, gated: bool) -> str | None:
    """The op's name of what a module does between its two products; None where the op does not have it."""
    act: Any = getattr(module, "act_fn", None)
    name = _ACTIVATIONS.get(type(act))
    if type(act) is nn.GELU:
        name = "gelu_tanh" if act.approximate == "tanh" else "gelu"
    if name is None or not gated:
        return name
    own = getattr(type(module), "_apply_gate", moe._default_apply_gate)
    return _GATED[name] if own is moe._default_apply_gate else None


def _has_experts(module: Any) -> bool:
    def owns(name: str) -> bool:  # adapters show what their base layer has
        own = name in module._parameters or parametrize.is_parametrized(module, name)
        return own and isinstance(getattr(module, name), Tensor) and getattr(module, name).dim() == 3

    says_how = hasattr(module, "is_transposed")
    return owns("down_proj") and (owns("gate_up_proj") or (says_how and owns("up_proj")))


def _lies_transposed(module: Any) -> bool:
    """Whether a gated module that does not say so stores [E, in, out]."""
    (experts, a, b), (same, c, d) = module.gate_up_proj.shape, module.down_proj.shape
    if experts == same and (b == c and a == 2 * d):
        return False
    if experts == same and (a == d and b == 2 * c):
        return True
    raise ValueError(
        f"patch: {type(module).__name__} must store gate_up_proj [E, 2F, D] and down_proj [E, D, F], or both "
        f"transposed, got shapes {list(module.gate_up_proj.shape)} and {list(module.down_proj.shape)}"
    )


_PROBES = (1.0, 1.0, 64.0, 64.0)
"""How large the tokens are on which experts are compared: gates that clamp show it to large ones."""


def _check_experts(module: Any) -> None:
    """Compare what a module's own forward and ours make of some tokens; a forward that takes something else, another
    gate or matrices that do not fit would only be found later, or never.
    """
    name = type(module).__name__
    weight, _ = _weight_and_bias(module, "gate_up_proj" if _is_gated(module) else "up_proj")
    if weight.is_meta:
        return
    experts, features, _ = weight.shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(_PROBES), features, generator=generator) * torch.tensor(_PROBES)[:, None]
    ids = torch.arange(len(_PROBES)) % experts
    arguments = x.to(weight), ids[:, None].to(weight.device), torch.full_like(x[:, :1], 0.5).to(weight)
    with torch.no_grad():
        try:
            own, ours = (f(*arguments).float() for f in (module.forward, partial(experts_forward, module)))
        except Exception as error:
            raise ValueError(
                f"patch: {name} must make [T, D] of hidden states [T, D], expert ids [T, K] and weights [T, K], got "
                f"{in_a_line(error)}"
            ) from error
        tolerance = max(1e-3, 8 * torch.finfo(weight.dtype).eps)
        finite = own.isfinite().all(-1)
        alike = (ours - own).norm(dim=-1) <= tolerance * own.norm(dim=-1)  # not where ours has NaN
        if not alike[finite].all() or not finite.any():
            others = "other values" if finite.any() else "NaN or infinity for every token"
            raise ValueError(
                f"patch: {name} must compute the sum of w · down(gate(up x)) over a token's experts, got {others} "
                "from its own forward"
            )


moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
