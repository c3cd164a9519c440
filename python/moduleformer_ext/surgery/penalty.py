"""Routing regularisation: new experts shall take new text, not the tokens of the old ones.

While new experts train on new text alone, nothing stops their router rows A' from growing until every token goes to
them. Two ways to limit what the rows can draw, as ModuleFormer's eq. 10 means to (two readings of its purpose, not a
transcription of it), summed over all routers that have new experts:

* ``"norm"``: ||A'||², the squared size of the new rows, whatever the text;
* ``"share"``: the mean over tokens of the probability that the new experts have together, measured on the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moduleformer_ext import ops
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.nn import BlockRoutes
from moduleformer_ext.surgery.anatomy import sites

PENALTIES = ("norm", "share")


def routing_penalty(model: MoLMForCausalLM, routes: Sequence[BlockRoutes], kind: str = "norm") -> Tensor:
    """The penalty of one pass, a scalar not yet weighted.

    Args:
        routes: of every layer, from ``model(..., output_routes=True)``; read by ``"share"`` only.
        kind: ``"norm"`` or ``"share"``.

    Raises:
        ValueError: an unknown kind, or a model without new experts.
    """
    if kind not in PENALTIES:
        raise ValueError(f"routing_penalty: kind must be one of {', '.join(PENALTIES)}, got {kind!r}")
    terms = []
    for site in sites(model.config):
        if num_new := site.num_new(model.config):
            if kind == "share":
                route = getattr(routes[site.layer], site.kind)
                terms.append(ops.losses.new_expert_loss(route, num_new))
            else:
                module, name = site.modules(model)[2].rows_parameter
                whole: Tensor | None = getattr(module, name)
                new = getattr(module, f"{name}_new") if whole is None else whole
                if hasattr(new, "full_tensor"):  # of a sharded model
                    new = new.full_tensor()
                terms.append(new[-num_new:].float().square().sum())
    if not terms:
        raise ValueError("routing_penalty: model must have new experts, got none")
    return torch.stack(terms).sum()
