"""Small models of ours and for transformers, of the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small_models import BASE, random_state
from torch import Tensor

from moduleformer_ext.hf import ModuleFormerForCausalLM, from_native
from moduleformer_ext.models import MoLMForCausalLM

VOCAB = BASE["vocab_size"]
PUBLISHED = BASE | {
    "model_type": "moduleformer",
    "architectures": ["ModuleFormerForCausalLM"],
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-3,  # neither has an effect
    "bos_token_id": 30,
    "eos_token_id": 30,
    "pad_token_id": 30,
    "torch_dtype": "float32",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "tie_word_embeddings": False,
    "gate_type": "mlp",
}
"""A config.json as published."""


def make_pair(**changes: Any) -> tuple[MoLMForCausalLM, ModuleFormerForCausalLM]:
    config = BASE | {"bos_token_id": None, "eos_token_id": None} | changes
    native = MoLMForCausalLM.from_reference(config, random_state(config, torch.float32))
    return native, from_native(MoLMForCausalLM.from_reference(config, random_state(config, torch.float32)))


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def write_published(folder: Path, layout: str, **changes: Any) -> MoLMForCausalLM:
    """A directory as a published MoLM is downloaded, and the model that is in it."""
    config = PUBLISHED | changes
    state = random_state(config, torch.float32)
    native = MoLMForCausalLM.from_reference(config, state)
    for layer in range(config["n_layer"]):  # buffers that old checkpoints have
        state[f"transformer.h.{layer}.attn.mask"] = torch.ones(4, 4)
        state[f"transformer.h.{layer}.attn.cum_weight"] = torch.ones(4, 4)
    (folder / "config.json").write_text(json.dumps(config))
    parts, suffix = layout.split(" ")
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if parts == "one":
        _write(folder / f"{stem}.{suffix}", state)
        return native
    names = sorted(state)
    shards = {f"{stem}-0000{i + 1}-of-00003.{suffix}": names[i::3] for i in range(3)}
    for file, of_shard in shards.items():
        _write(folder / file, {name: state[name] for name in of_shard})
    weight_map = {name: file for file, of_shard in shards.items() for name in of_shard}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return native


def _write(path: Path, state: dict[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file({name: t.contiguous() for name, t in state.items()}, path, {"format": "pt"})
    else:
        torch.save(state, path)
