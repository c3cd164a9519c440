"""Which parameters train. What is frozen keeps its bits, has no gradient and no optimiser state.

Where only the new experts of a layer train, its expert parameters are split in two
(:mod:`moduleformer_ext.nn.segments`), so that the kernels compute no weight gradients for the old
ones. Saved models do not show it.
"""

from __future__ import annotations

from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.nn.segments import join_parameter, split_parameter
from moduleformer_ext.surgery.anatomy import sites

PARTS = ("all", "experts", "new")


def set_trainable(model: MoLMForCausalLM, part: str, *, embedding: bool = False) -> None:
    """Let a part of the model train and freeze the rest; may be called again with another part.

    Args:
        part: ``"all"``; ``"experts"``, all experts and their router rows; or ``"new"``, those of the experts that the
            last :func:`~moduleformer_ext.surgery.insert_experts` added.
        embedding: let the token embedding train too (and the head, if both are one).

    Raises:
        ValueError: an unknown part, or ``"new"`` for a model without new experts.
    """
    if part not in PARTS:
        raise ValueError(f"set_trainable: part must be one of {', '.join(PARTS)}, got {part!r}")
    config = model.config
    config.require_whole_experts("set_trainable")
    if part == "new" and not any(site.num_new(config) for site in sites(config)):
        raise ValueError("set_trainable: part must not be 'new' for a model without new experts")

    for site in sites(config):
        for module, name in site.expert_parameters(model):
            if getattr(module, name) is None:
                join_parameter(module, name)
    model.requires_grad_(part == "all")
    if part != "all":
        for site in sites(config):
            num_new = site.num_new(config)
            for module, name in site.expert_parameters(model):
                if part == "experts":
                    module.get_parameter(name).requires_grad_()
                elif num_new:
                    _, new = split_parameter(module, name, site.num_experts(config) - num_new)
                    new.requires_grad_()
    if embedding:
        model.transformer.wte.weight.requires_grad_()
