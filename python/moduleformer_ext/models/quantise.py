"""A model whose experts are integers of a few bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moduleformer_ext.models.state import canonical_state
from moduleformer_ext.quantised import quantise

if TYPE_CHECKING:
    from moduleformer_ext.models.modeling import MoLMForCausalLM

_EXPERTS = (".experts.weight", ".output_experts.weight")


def quantise_experts(model: MoLMForCausalLM, bits: int) -> MoLMForCausalLM:
    """The model with its experts rounded to 8 or 4 bits, for inference: a new one, in evaluation mode, which shares all
    other weights. Routers, keys and values, norms, embeddings and the head stay as they are.

    Its ``config.expert_bits`` is ``bits``; ``save_pretrained`` and ``from_pretrained`` keep it.

    Raises:
        ValueError: other bits, experts that are quantised already, or weights that are not finite.
    """
    model.config.require_whole_experts("quantise_experts")
    state = canonical_state(model)
    for name in [name for name in state if name.endswith(_EXPERTS)]:
        quantised = quantise(state.pop(name), bits)
        prefix = name.removesuffix("weight")
        state |= {f"{prefix}values": quantised.values, f"{prefix}scales": quantised.scales}
    return type(model).from_state(model.config.replace(expert_bits=bits), state, copy=False)
