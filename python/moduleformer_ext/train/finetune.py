"""What a run that starts from a trained model takes over from it, and what its own options may change."""

from moduleformer_ext.models import MoLMConfig
from moduleformer_ext.surgery import sites
from moduleformer_ext.train.config import TrainConfig

ADJUSTABLE = (
    "aux_loss_type",
    "embd_pdrop",
    "moe_pdrop",
    "resid_pdrop",
    "sample_topk",
    "stick_epsilon",
)
"""Model fields that `model` may set: those that leave the weights and the trained function as they are."""


def finetuned_config(base: MoLMConfig, config: TrainConfig) -> MoLMConfig:
    """The model to train, given the one to start from; options that do not fit it are an error."""
    base.require_whole_experts("model")
    if fixed := sorted(config.model.keys() - set(ADJUSTABLE)):
        raise ValueError(
            f"model: a trained model fixes {', '.join(fixed)}; fine-tuning may change {', '.join(ADJUSTABLE)}"
        )
    has_new = any(site.num_new(base) for site in sites(base))
    if config.trainable == "new" and not has_new:
        raise ValueError("trainable: must not be 'new' for a model without new experts; `extend` inserts them")
    if config.routing_penalty and not has_new:
        raise ValueError(f"routing_penalty: must be 0 for a model without new experts, got {config.routing_penalty:g}")
    return base.replace(
        block_size=config.segment_length,
        history_length=config.history_length,
        aux_loss_weight=config.aux_loss_weight,
        **config.model,
    )
