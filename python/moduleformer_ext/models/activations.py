"""Names of activations."""

from moduleformer_ext.ops.grouped_gemm import GATED_ACTIVATIONS

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
} | {name: name for name in sorted(GATED_ACTIVATIONS)}
"""Names that a configuration may use for an activation -> the name in :mod:`moduleformer_ext.ops`."""
