"""Models of :mod:`moduleformer_ext.models` to transformers' and back, in memory and as directories."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedTokenizerFast

from moduleformer_ext.data.tokenizer import END_OF_TEXT
from moduleformer_ext.files import write_file
from moduleformer_ext.hf.config import ModuleFormerConfig
from moduleformer_ext.hf.modeling import ModuleFormerForCausalLM
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.models.state import canonical_state, router_dtype

_CODE = "modeling_moduleformer.py"
_CLASSES = {
    "AutoConfig": "ModuleFormerConfig",
    "AutoModel": "ModuleFormerModel",
    "AutoModelForCausalLM": "ModuleFormerForCausalLM",
    "AutoModelForSequenceClassification": "ModuleFormerForSequenceClassification",
}
CHAT_TEMPLATE = (
    "{{ messages | map(attribute='content') | join('\n') }}{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)
"""A MoLM was trained on text alone: to it, a chat is its messages, one a line."""


def from_native(model: MoLMForCausalLM, **fields: object) -> ModuleFormerForCausalLM:
    """The model for transformers, with the very tensors of ``model``, in its mode; ``fields`` go to the
    :class:`ModuleFormerConfig`.

    Raises:
        ValueError: the model holds other weights than its configuration says; the message lists the tensors.
    """
    if not isinstance(model, MoLMForCausalLM):
        raise TypeError(f"from_native: model must be a MoLMForCausalLM, got {type(model).__name__}")
    state = canonical_state(model)
    fields = {"router_dtype": router_dtype(state), **fields}
    config = ModuleFormerConfig.of(model.config, architectures=[ModuleFormerForCausalLM.__name__], **fields)
    with torch.device("meta"):
        converted = ModuleFormerForCausalLM(config)
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    converted.load_state_dict(state, assign=True)
    converted.tie_weights()
    converted.config.dtype = converted.dtype
    return converted.train(model.training)


def to_native(model: ModuleFormerForCausalLM) -> MoLMForCausalLM:
    """The model without transformers, with the very tensors of ``model``, in its mode.

    Raises:
        ValueError: adapters, quantised or distributed weights; the message lists the tensors.
    """
    if not isinstance(model, ModuleFormerForCausalLM):
        raise TypeError(f"to_native: model must be a ModuleFormerForCausalLM, got {type(model).__name__}")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if wrapped := [name for name, tensor in state.items() if is_traceable_wrapper_subclass(tensor)]:
        raise ValueError(
            f"to_native: weights must be plain tensors, got quantised or distributed: {', '.join(wrapped)}"
        )
    native = MoLMForCausalLM.from_state(model.config.molm, state, copy=False)
    return native.train(model.training)


def save_directory(
    model: MoLMForCausalLM,
    directory: str | Path,
    tokenizer: str | Path | None = None,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write what ``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`` reads where this package
    is installed, or without ``trust_remote_code`` after ``import moduleformer_ext.hf``.

    Args:
        tokenizer: a ``tokenizer.json``, to become ``AutoTokenizer.from_pretrained(directory)``, with
            :data:`CHAT_TEMPLATE`.
        max_shard_size: larger weights go into several files.

    Raises:
        ValueError: as :func:`from_native`.
    """
    directory = Path(directory)
    fields = {"auto_map": {auto: f"{Path(_CODE).stem}.{name}" for auto, name in _CLASSES.items()}}
    converted = from_native(model, **fields)
    if tokenizer is not None:
        _save_tokenizer(Path(tokenizer), directory, converted)
    converted.save_pretrained(directory, max_shard_size=max_shard_size)
    names = ", ".join(sorted(_CLASSES.values()))
    write_file(directory / _CODE, f"from moduleformer_ext.hf import {names}  # noqa: F401\n")


def _save_tokenizer(file: Path, directory: Path, model: ModuleFormerForCausalLM) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), chat_template=CHAT_TEMPLATE)
    if (end := tokenizer.convert_tokens_to_ids(END_OF_TEXT)) is not None:
        tokenizer.eos_token = tokenizer.bos_token = tokenizer.pad_token = END_OF_TEXT
        for fields in (model.config, model.generation_config):
            fields.eos_token_id = fields.eos_token_id if fields.eos_token_id is not None else end
            fields.pad_token_id = end
    tokenizer.save_pretrained(directory)
