"""The fewest bytes that a process can send for a step, calculated from a model alone."""

from __future__ import annotations

from moduleformer_ext.distributed.sharding import units
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM

_FLOAT = 4


def sent_for_parameters(
    model: MoLMForCausalLM, processes: int, *, expert_parallel: int = 1, reshard: bool = True, size: int = _FLOAT
) -> dict[str, float]:
    """What sharding sends: every parameter is gathered, those of layers twice where they are freed in between, and
    every gradient scattered, in float32. Of n processes each sends its n-th part to the n - 1 others, or n - 1 parts.

    Args:
        model: a whole one, which may be on the meta device; all of it trains.
        expert_parallel: how many processes hold different experts.
        size: bytes of a gathered number.
    """
    sent = {"gather": 0.0, "scatter": 0.0}
    for unit in units(model, expert_parallel=expert_parallel > 1):
        among = processes // expert_parallel if unit.spread else processes
        numbers = sum(parameter.numel() for parameter in unit.parameters) * (among - 1) / among
        numbers /= expert_parallel if unit.spread else 1
        sent["gather"] += size * numbers * (2 if reshard and unit.in_layer else 1)
        sent["scatter"] += _FLOAT * numbers
    return sent


def bytes_of_slot(config: MoLMConfig, kind: str, *, size: int = _FLOAT) -> int:
    """What a slot whose expert is elsewhere sends, there and back, forward and backward; ``kind`` is ``"attention"`` or
    ``"ffn"``.
    """
    there = config.n_embd if kind == "ffn" else config.n_embd + config.attention.hidden
    return 2 * 2 * size * there


def sent_for_tokens(
    config: MoLMConfig, tokens: int, *, expert_parallel: int, recompute: bool = False, size: int = _FLOAT
) -> float:
    """What the tokens of a process send to experts that are chosen evenly."""
    elsewhere = tokens * (expert_parallel - 1) / expert_parallel
    slots = {"attention": config.attention.k, "ffn": config.ffn.k}
    each = sum(k * bytes_of_slot(config, kind, size=size) for kind, k in slots.items())
    return config.n_layer * elsewhere * each * (1.5 if recompute else 1)
