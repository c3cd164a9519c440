"""Named configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PAPER: dict[str, Any] = {
    "n_embd": 1024,
    "n_head": 1,
    "att_hidden": 1024,
    "ffd_hidden": 2048,
    "n_att_experts": 16,
    "n_mlp_experts": 32,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # arXiv 2306.04640, Table 1, as published (MoLM-350M-4B, MoLM-700M-4B, MoLM-700M-8B)
    "molm-4b-k2": {**_PAPER, "n_layer": 24, "k_att": 2, "k_mlp": 2},
    "molm-4b-k4": {**_PAPER, "n_layer": 24, "k_att": 4, "k_mlp": 4},
    "molm-8b-k2": {**_PAPER, "n_layer": 48, "k_att": 2, "k_mlp": 2},
    # the same shape, small enough to train without an accelerator: about 1 M, 12 M and 60 M parameters
    "molm-nano": {
        "vocab_size": 1024,
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 1,
        "att_hidden": 128,
        "ffd_hidden": 128,
        "n_att_experts": 4,
        "n_mlp_experts": 8,
        "gating_size": 32,
        "block_size": 128,
        "history_length": 128,
    },
    "molm-tiny": {
        "vocab_size": 4096,
        "n_embd": 256,
        "n_layer": 6,
        "n_head": 1,
        "att_hidden": 256,
        "ffd_hidden": 256,
        "n_att_experts": 4,
        "n_mlp_experts": 8,
        "gating_size": 64,
    },
    "molm-small": {
        "vocab_size": 8192,
        "n_embd": 512,
        "n_layer": 8,
        "n_head": 1,
        "att_hidden": 512,
        "ffd_hidden": 512,
        "n_att_experts": 4,
        "n_mlp_experts": 8,
        "gating_size": 128,
    },
}
