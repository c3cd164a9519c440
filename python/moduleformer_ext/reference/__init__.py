"""Every op again in plain PyTorch: the definition to read first and to test the kernels against.

Same names, signatures and results as :mod:`moduleformer_ext.ops`, differentiable by autograd, on any device;
sums are carried in float32 (float64 for float64). No attention is paid to speed or memory.
"""

from moduleformer_ext.reference import losses
from moduleformer_ext.reference.expert_layout import expert_layout
from moduleformer_ext.reference.grouped_gemm import expert_ffn, grouped_gemm
from moduleformer_ext.reference.layer_decode import attention_layer_decode, blocks_decode, ffn_layer_decode
from moduleformer_ext.reference.linear_cross_entropy import linear_cross_entropy
from moduleformer_ext.reference.linear_decode import linear_decode
from moduleformer_ext.reference.quantised_gemm import quantised_gemm
from moduleformer_ext.reference.route_topk import route_topk, route_topk_gmm, route_topk_linear, route_topk_mlp
from moduleformer_ext.reference.stick_attention import stick_attention, stick_attention_decode

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
