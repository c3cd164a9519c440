"""The ops: native kernels as drop-in, differentiable PyTorch functions.

Each has a plain-PyTorch twin of the same name and signature in :mod:`moduleformer_ext.reference`.
"""

from moduleformer_ext import _extension  # noqa: F401  (registers torch.ops.moduleformer_ext)
from moduleformer_ext.ops import _dtensor, flops, losses  # noqa: F401  (flops registers its formulas)
from moduleformer_ext.ops.attention_layer_decode import attention_layer_decode
from moduleformer_ext.ops.blocks_decode import blocks_decode
from moduleformer_ext.ops.expert_ffn import expert_ffn
from moduleformer_ext.ops.expert_layout import expert_layout
from moduleformer_ext.ops.ffn_layer_decode import ffn_layer_decode
from moduleformer_ext.ops.grouped_gemm import grouped_gemm
from moduleformer_ext.ops.linear_cross_entropy import linear_cross_entropy
from moduleformer_ext.ops.linear_decode import linear_decode
from moduleformer_ext.ops.quantised_gemm import quantised_gemm
from moduleformer_ext.ops.route_topk import route_topk, route_topk_gmm, route_topk_linear, route_topk_mlp
from moduleformer_ext.ops.stick_attention import stick_attention
from moduleformer_ext.ops.stick_attention_decode import stick_attention_decode

__all__ = [
    "attention_layer_decode",
    "blocks_decode",
    "expert_ffn",
    "expert_layout",
    "ffn_layer_decode",
    "grouped_gemm",
    "linear_cross_entropy",
    "linear_decode",
    "losses",
    "quantised_gemm",
    "route_topk",
    "route_topk_gmm",
    "route_topk_linear",
    "route_topk_mlp",
    "stick_attention",
    "stick_attention_decode",
]

_dtensor.register_once_imported()
