"""MoLM in transformers: importing this package registers it with the Auto classes, and our kernels for the experts of
other models.

>>> import moduleformer_ext.hf
>>> model = transformers.AutoModelForCausalLM.from_pretrained("path/of/a/MoLM")  # doctest: +SKIP
"""

from moduleformer_ext.hf import requirements  # first: says what to install

requirements.check()

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

from moduleformer_ext.hf import experts  # noqa: E402
from moduleformer_ext.hf.cache import ModuleFormerCache, ModuleFormerStaticCache  # noqa: E402
from moduleformer_ext.hf.config import ModuleFormerConfig  # noqa: E402
from moduleformer_ext.hf.convert import from_native, save_directory, to_native  # noqa: E402
from moduleformer_ext.hf.modeling import (  # noqa: E402
    ModuleFormerForCausalLM,
    ModuleFormerForSequenceClassification,
    ModuleFormerModel,
    ModuleFormerPreTrainedModel,
)

AutoConfig.register(ModuleFormerConfig.model_type, ModuleFormerConfig)
AutoModel.register(ModuleFormerConfig, ModuleFormerModel)
AutoModelForCausalLM.register(ModuleFormerConfig, ModuleFormerForCausalLM)
AutoModelForSequenceClassification.register(ModuleFormerConfig, ModuleFormerForSequenceClassification)

__all__ = [
    "ModuleFormerCache",
    "ModuleFormerConfig",
    "ModuleFormerForCausalLM",
    "ModuleFormerForSequenceClassification",
    "ModuleFormerModel",
    "ModuleFormerPreTrainedModel",
    "ModuleFormerStaticCache",
    "experts",
    "from_native",
    "save_directory",
    "to_native",
]
