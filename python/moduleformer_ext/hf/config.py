"""A MoLM's description as transformers has it."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from moduleformer_ext.models import MoLMConfig
from moduleformer_ext.models.published import ALIASES, FORMAT, MODEL_TYPE, is_own, without_aliases

FIELDS: tuple[str, ...] = tuple(MoLMConfig().to_dict())
"""What describes the model itself."""


class ModuleFormerConfig(PreTrainedConfig):
    """The fields of :class:`moduleformer_ext.models.MoLMConfig` under their published names, with its defaults and its
    checks, beside those that transformers has for every model.

    Args:
        use_cache: keep keys and values by default.
        output_router_logits: return every router's logits and the routing loss by default.
        router_dtype: "float32" where routers are more precise than the model's other weights; they are then loaded as
            they were saved.
        skip_logits: training steps with labels return no logits, which takes less memory.

    Raises:
        ValueError: a field is out of range or contradicts another; the message names it.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "router_logits", "aux_loss"]
    attribute_map: ClassVar[dict[str, str]] = dict(ALIASES)

    def __post_init__(self, **fields: Any) -> None:
        fields = without_aliases(fields)
        own = {name: fields.pop(name) for name in FIELDS if name in fields}
        for name, value in MoLMConfig.from_dict(own).to_dict().items():
            setattr(self, name, value)
        self.format = FORMAT  # in a file, says that all fields mean what they mean here
        self.use_cache = fields.pop("use_cache", True)
        self.output_router_logits = fields.pop("output_router_logits", False)
        self.router_dtype = fields.pop("router_dtype", None)
        if self.router_dtype not in (None, "float32"):
            raise ValueError(f"ModuleFormerConfig: router_dtype must be None or 'float32', got {self.router_dtype!r}")
        self.skip_logits = fields.pop("skip_logits", False)
        self.pad_token_id = fields.pop("pad_token_id", None)
        super().__post_init__(**fields)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a config.json: of a published MoLM, whose fields mean what they meant in its implementation, or ours."""
        if not is_own(config_dict):
            published = MoLMConfig.from_reference(config_dict).to_dict()
            config_dict = {n: v for n, v in config_dict.items() if n not in cls.attribute_map} | published
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def of(cls, config: MoLMConfig, **fields: Any) -> ModuleFormerConfig:
        """The same description for transformers."""
        return cls(**config.to_dict(), **fields)

    @property
    def molm(self) -> MoLMConfig:
        """The same description for :mod:`moduleformer_ext.models`.

        Raises:
            ValueError: fields that were set since contradict one another.
        """
        return MoLMConfig.from_dict({name: getattr(self, name) for name in FIELDS})
