"""Every op once, forward and backward, of a small shape: for captures in CUDA graphs (test_graph_capture_cuda.py), and
as a program, `python steps.py [DEVICE]`, for compute-sanitizer (tools/sanitize_gpu.sh), too slow for the tests."""

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from moduleformer_ext import ops
from moduleformer_ext.quantised import QuantisedMatrices, quantise


def attention(q, k, v):
    return ops.stick_attention(q, k, v, stick_epsilon=0.0)


def heads_of_128(q, k, v):
    return ops.stick_attention(q, k, v)


def attention_v_is_k(q, k):
    return ops.stick_attention(q, k, None)


def decoding(q, k):
    lengths = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)
    with torch.no_grad():
        return ops.stick_attention_decode(q[:, -1:], k, None, lengths)


def routed(expert_network, x_router, gate, x, *weights):
    route = ops.route_topk_linear(x_router, gate, 2)
    return expert_network(x, *weights, ops.expert_layout(route.expert_ids, len(gate)), route.gates)


def experts(x_router, gate, x, up, down):
    return routed(ops.expert_ffn, x_router, gate, x, up, down)


@functools.cache
def matrices(bits: int, device: torch.device) -> QuantisedMatrices:
    return quantise(torch.randn(8, 64, 128, device=device), bits)


@torch.no_grad()
def quantised_experts(x_router, gate, x):
    route = ops.route_topk_linear(x_router, gate, 2)
    layout = ops.expert_layout(route.expert_ids, len(gate))
    hidden = ops.quantised_gemm(x, matrices(8, x.device), layout, activation="swiglu")
    return ops.quantised_gemm(
        hidden, matrices(4, x.device), layout, x_order="expert", out_order="token", gates=route.gates
    )


def mlp_router(x, hidden, bias, weight):
    return ops.route_topk_mlp(x, hidden, bias, weight, 2).gates


CASES = {
    attention: [(2, 48, 4, 64), (2, 48, 2, 64), (2, 48, 2, 64)],
    heads_of_128: [(2, 48, 4, 128), (2, 48, 2, 128), (2, 48, 2, 128)],
    attention_v_is_k: [(2, 48, 2, 1024), (2, 48, 1, 1024)],
    decoding: [(2, 48, 4, 64), (2, 48, 2, 64)],
    quantised_experts: [(40, 64), (8, 64), (40, 64)],
    experts: [(40, 64), (8, 64), (40, 64), (8, 64, 96), (8, 96, 64)],
    mlp_router: [(40, 64), (32, 64), (32,), (8, 32)],
}

INFERENCE = (decoding, quantised_experts)
TYPES = (torch.bfloat16, torch.float16, torch.float32)  # beside quantised matrices the first two

Op = Callable[..., Tensor]


def leaves_of(op: Op, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random operands. A bias in float: of another type it would be converted, by PyTorch."""
    leaves = [torch.randn(shape, device=device).to(dtype if len(shape) > 1 else torch.float32) for shape in CASES[op]]
    return [leaf.requires_grad_(op not in INFERENCE) for leaf in leaves]


def cotangent_of(op: Op, leaves: list[Tensor]) -> Tensor:
    return torch.randn_like(op(*leaves))


def run(op: Op, leaves: list[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    """The result, and the gradients of what has one."""
    y = op(*leaves)
    return (y, *torch.autograd.grad(y, leaves, cotangent)) if y.requires_grad else (y,)


def main(device: torch.device) -> None:
    for op in CASES:
        for dtype in TYPES[:2] if op is quantised_experts else TYPES:
            leaves = leaves_of(op, dtype, device)
            results = run(op, leaves, cotangent_of(op, leaves))
            if device.type == "cuda":
                torch.cuda.synchronize()
            finite = all(result.isfinite().all() for result in results)
            print(f"{op.__name__} {dtype}: {'finite' if finite else 'NOT FINITE'}", flush=True)
            if not finite:
                sys.exit(1)


if __name__ == "__main__":
    main(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
