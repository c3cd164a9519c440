"""MoLM, the ModuleFormer language models."""

from moduleformer_ext.models.cache import KVCache, StaticKVCache
from moduleformer_ext.models.checkpoint import from_pretrained, save_pretrained
from moduleformer_ext.models.config import MoLMConfig
from moduleformer_ext.models.convert import from_reference, to_reference
from moduleformer_ext.models.generation import generate, generate_stream
from moduleformer_ext.models.modeling import CausalLMOutput, MoLM, MoLMForCausalLM, MoLMOutput
from moduleformer_ext.models.presets import PRESETS

__all__ = [
    "PRESETS",
    "CausalLMOutput",
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
    "save_pretrained",
    "to_reference",
]
