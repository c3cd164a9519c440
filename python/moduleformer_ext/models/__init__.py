"""MoLM, the ModuleFormer language models."""

from moduleformer_ext.models.cache import KVCache, StaticKVCache
from moduleformer_ext.models.config import MoLMConfig
from moduleformer_ext.models.experts import ExpertsConfig
from moduleformer_ext.models.generation import generate, generate_stream
from moduleformer_ext.models.modeling import CausalLMOutput, MoLM, MoLMForCausalLM, MoLMOutput
from moduleformer_ext.models.presets import PRESETS
from moduleformer_ext.models.quantise import quantise_experts

from_pretrained = MoLMForCausalLM.from_pretrained
from_reference = MoLMForCausalLM.from_reference
save_pretrained = MoLMForCausalLM.save_pretrained
to_reference = MoLMForCausalLM.to_reference

__all__ = [
    "PRESETS",
    "CausalLMOutput",
    "ExpertsConfig",
    "KVCache",
    "MoLM",
    "MoLMConfig",
    "MoLMForCausalLM",
    "MoLMOutput",
    "StaticKVCache",
    "from_pretrained",
    "from_reference",
    "generate",
    "generate_stream",
    "quantise_experts",
    "save_pretrained",
    "to_reference",
]
