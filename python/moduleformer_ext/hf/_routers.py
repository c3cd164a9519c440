"""The routers of transformers' mixture-of-experts models on `route_topk`."""

from __future__ import annotations

import inspect
from itertools import permutations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduleformer_ext import ops

_TOKENS = 4
"""On which a router is compared with route_topk."""


class _Family(NamedTuple):
    """What the routers of a family do, beside what their attributes say."""

    orders: tuple[str, str]
    """That of `route_topk` where `norm_topk_prob` is false, and where it is true or the router has none."""
    float32: bool = False
    """Whether x and the weights are multiplied in float32 whatever their types."""


# A softmax over all experts that is renormalised over the chosen ones is a softmax over their logits.
_SOFTMAX = ("softmax_topk", "topk_softmax")
_PLAIN = ("softmax_topk", "softmax_topk")
_SIGMOID = ("sigmoid_topk", "sigmoid_topk_renormalised")
_SOFTMAX_FAMILIES = (
    "AriaText", "FlexOlmo", "GptOss", "GraniteMoe", "GraniteMoeHybrid", "GraniteMoeSWA", "GraniteMoeShared", "Mellum",
    "MiniMax", "Mistral4", "Mixtral", "Olmoe", "Qwen2Moe", "Qwen3Moe", "Qwen3Next", "Qwen3OmniMoeTalkerText",
    "Qwen3OmniMoeText", "Qwen3OmniMoeThinkerText", "Qwen3VLMoeText", "Qwen3_5Moe", "Qwen4ExpText",
)  # fmt: skip
_SIGMOID_FAMILIES = (
    "AXK1", "BailingHybrid", "Beam", "DeepseekV3", "DeepseekV32", "Dots1", "Dots3NoteText", "Dots3NoteVision",
    "ExaoneMoe", "Flint", "Glm4Moe", "Glm4MoeLite", "Glm4vMoeText", "Glm5NextText", "GlmMoeDsa", "HYV3", "HYV4",
    "HYV4VL", "KimiLinear", "MiMoV2Flash", "NemotronH", "SolarOpen",
)  # fmt: skip
_FAMILIES: dict[str, _Family] = {
    **dict.fromkeys(_SOFTMAX_FAMILIES, _Family(_SOFTMAX)),
    **dict.fromkeys(("LaraMini", "MistralLarge4Text"), _Family(_SOFTMAX, float32=True)),
    **dict.fromkeys(("DeepseekOcr2Text", "DeepseekV2", "UnlimitedOcrText"), _Family(_PLAIN, float32=True)),
    "Jamba": _Family(_PLAIN),
    **dict.fromkeys(_SIGMOID_FAMILIES, _Family(_SIGMOID, float32=True)),
    **dict.fromkeys(("MiniMaxM2", "MiniMaxM3VL", "Step3p7"), _Family(_SIGMOID)),
}
"""By what comes before TopKRouter in their names."""

_BIAS = "e_score_correction_bias"


class Rule(NamedTuple):
    """What a router does."""

    options: dict[str, Any]
    """Keyword arguments of `route_topk`."""
    float32: bool
    returns: tuple[int, ...]
    """Which of logits, weights and ids (0, 1, 2) it returns in each place: releases of transformers differ."""


def is_router(module: nn.Module) -> bool:
    """Whether a module is one of those that choose experts for tokens."""
    return type(module).__name__.lower().endswith("topkrouter")


def rule_of(router: Any) -> Rule:
    """What a router does, which a few tokens show, unless it is on the meta device.

    Raises:
        ValueError: `route_topk` does not have its rule, or it returns something else.
    """
    name = type(router).__name__
    family = _FAMILIES.get(name[: -len("TopKRouter")])
    if family is None:
        raise ValueError(
            f"patch: routers must be those of {', '.join(_FAMILIES)}, got {name}, whose rule route_topk "
            "does not have; without routers=True the experts alone are replaced"
        )
    try:
        options = _options(router, family)
        experts, width = router.weight.shape
        generator = torch.Generator().manual_seed(0)
        arguments = [torch.randn(_TOKENS, width, generator=generator).to(router.weight)]
        if _BIAS in inspect.signature(router.forward).parameters:  # the block around it has the bias
            arguments.append(torch.rand(experts, generator=generator).to(router.weight.device))
        with torch.no_grad():
            own, ours = tuple(router.forward(*arguments)), _routed(router, options, family.float32, *arguments)
    except Exception as error:
        raise ValueError(
            f"patch: {name} must make logits, weights and ids of hidden states [T, D] alone, got {in_a_line(error)}"
        ) from error
    for returns in permutations(range(len(ours))):
        if len(own) == len(ours) and _alike([own[returns.index(which)] for which in range(len(ours))], ours):
            return Rule(options, family.float32, returns)
    raise ValueError(f"patch: {name} must return logits, weights and ids as route_topk chooses them, got others")


def route(router: Any, rule: Rule, hidden_states: Tensor, e_score_correction_bias: Tensor | None = None) -> Any:
    """The `forward` of a router whose rule is known."""
    results = _routed(router, rule.options, rule.float32, hidden_states, e_score_correction_bias)
    return tuple(results[which] for which in rule.returns)


def in_a_line(error: Exception) -> str:
    """Class and first line of an error."""
    name, message = type(error).__name__, str(error).strip()
    return f"{name}: {message.splitlines()[0]}" if message else name


def _options(router: Any, family: _Family) -> dict[str, Any]:
    """Keyword arguments of `route_topk`, from the attributes of a router."""
    order = family.orders[bool(getattr(router, "norm_topk_prob", True))]
    factor = getattr(router, "routed_scaling_factor", getattr(router, "router_scaling_factor", 1.0))
    options: dict[str, Any] = {"order": order, "scale": factor}
    method = getattr(router, "topk_method", "group_limited_greedy")  # DeepSeek V2's, by the best of a group
    if method != "greedy" and getattr(router, "num_group", None) is not None:
        options |= {"num_groups": router.num_group, "top_groups": router.topk_group}
        options["scored_per_group"] = 1 if hasattr(router, "topk_method") else 2
    return options


def _routed(
    router: Any, options: dict[str, Any], float32: bool, hidden_states: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    bias = getattr(router, _BIAS, None) if bias is None else bias
    if float32:
        routed = ops.route_topk_linear(x, router.weight, router.top_k, selection_bias=bias, **options)
        return routed.logits, routed.gates, routed.expert_ids.long()
    logits = F.linear(x.to(router.weight.dtype), router.weight, getattr(router, "bias", None))
    routed = ops.route_topk(logits, router.top_k, selection_bias=bias, **options)
    return logits, routed.gates, routed.expert_ids.long()


def _alike(own: list[Any], ours: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether a router's logits, weights and ids are ours, a token's choices in any order; of ids, whether they are
    those of the same logits: either of two equal ones may be chosen.
    """
    for a, b in zip(own, ours, strict=True):
        if not isinstance(a, Tensor) or a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            return False
    (own_logits, own_weights, own_ids), (logits, weights, ids) = own, ours
    if ids.is_meta:
        return True
    if not ((own_ids >= 0) & (own_ids < logits.shape[-1])).all():
        return False
    chosen = zip(_by_logit(own_weights, logits, own_ids.long()), _by_logit(weights, logits, ids), strict=True)
    return _close(own_logits, logits) and all(_close(a, b) for a, b in chosen)


def _by_logit(weights: Tensor, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen logits of each token in their order, and the weights that stand beside them."""
    chosen, order = logits.gather(-1, ids).sort(dim=-1, stable=True)
    return weights.gather(-1, order), chosen


def _close(own: Tensor, ours: Tensor) -> bool:
    tolerance = max(1e-4, 8 * torch.finfo(own.dtype).eps)
    return torch.allclose(own.float(), ours.float(), rtol=tolerance, atol=tolerance, equal_nan=True)
