"""The ops at T 4096 and 32768: how many tiles of which kernels, useful operations or bytes, and what others reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from roofline.model import Work

LENGTHS = (4096, 32768)
TOKENS = 16384  # of a batch of attention: four sequences of 4096; one of 32768 is longer
FEATURES = 2048  # of all heads, as in the papers of FlashAttention
CHUNK = 1024  # keys per pair of launches of attention's backward pass
RUNS_BYTES = 4 * 8  # of a row and span of keys, from the query kernel to the key kernel
DIM, HIDDEN, EXPERTS, CHOICES = 1024, 2048, 32, 2
GATE_HIDDEN = 256
CACHES, KV_HEADS = 64, 16  # decoding, two query heads each


@dataclass(frozen=True)
class Op:
    """`works(t)`: kernels by their names in emulated.calls(). `useful(t)`: operations, or bytes, as `unit` says."""

    name: str
    works: Callable[[int], list[tuple[str, Work]]]
    useful: Callable[[int], float]
    published: str = ""
    unit: str = "TFLOP/s"


def heads(t: int, dim: int) -> float:
    """Of all sequences together."""
    return max(TOKENS // t, 1) * FEATURES / dim


def scores(t: int) -> float:
    """Causal ones of a head."""
    return t * (t + 1) / 2


def score_tiles(t: int) -> float:
    return t * t / 2 / 64**2


def attention_forward(dim: int, published: str) -> Op:
    def works(t: int) -> list[tuple[str, Work]]:
        h = heads(t, dim)
        tensors = 3 if dim > 256 else 4  # q, k, v, o
        return [(f"attention forward D {dim}", Work(t * h, score_tiles(t) * h, tensors * 2 * t * h * dim))]

    return Op(f"stick_attention forward, D {dim}", works, lambda t: 4 * dim * scores(t) * heads(t, dim), published)


def attention_backward(dim: int, published: str) -> Op:
    span = {64: 64, 128: 32}.get(dim, 16)  # keys

    def works(t: int) -> list[tuple[str, Work]]:
        h, chunks = heads(t, dim), max(t // CHUNK, 1)
        visits = t * (chunks + 1) / 2  # of rows, by chunks that they see
        states = score_tiles(t) * 64 * 64 / span * RUNS_BYTES
        rows = 2 * t * h * dim
        query = Work(visits * h, score_tiles(t) * h, 5 * rows + states * h, chunks)
        key = Work(t * h, score_tiles(t) * h, 6 * rows + states * h, chunks)
        return [(f"attention query kernel D {dim}", query), (f"attention key kernel D {dim}", key)]

    return Op(f"stick_attention backward, D {dim}", works, lambda t: 10 * dim * scores(t) * heads(t, dim), published)


def outputs(rows: float, columns: int, depth: float, matrices: int, memory_bytes: float) -> Work:
    """Products with results of `rows` x `columns`, each of `matrices`."""
    tiles = matrices * -(-rows // 128) * -(-columns // 128)
    return Work(tiles, tiles * depth / 64, memory_bytes)


def product(kernel: str, t: int) -> tuple[str, Work]:
    slots, matrix = t * CHOICES, 2 * EXPERTS * DIM * HIDDEN
    rows = slots / EXPERTS  # as many for each expert
    narrow, wide = 2 * slots * DIM, 2 * slots * HIDDEN
    return kernel, {
        "up product": outputs(rows, HIDDEN, DIM, EXPERTS, narrow / CHOICES + matrix + 2 * wide),
        "down product": outputs(rows, DIM, HIDDEN, EXPERTS, wide + matrix + 2 * narrow),
        "hidden gradient": outputs(rows, HIDDEN, DIM, EXPERTS, narrow / CHOICES + matrix + 3 * wide),
        "input gradient": outputs(rows, DIM, HIDDEN, EXPERTS, wide + matrix + 2 * narrow),
        "weight gradient": outputs(DIM, HIDDEN, rows, EXPERTS, narrow + wide + matrix),
    }[kernel]


def products(name: str, kernels: tuple[str, ...], published: str = "") -> Op:
    def useful(t: int) -> float:
        return len(kernels) * 2 * t * CHOICES * DIM * HIDDEN

    return Op(name, lambda t: [product(kernel, t) for kernel in kernels], useful, published)


def decoding(dim: int, published: str) -> Op:
    def size(t: int) -> float:
        return 2 * 2 * CACHES * KV_HEADS * t * dim

    def works(t: int) -> list[tuple[str, Work]]:
        caches = CACHES * KV_HEADS
        return [(f"decoding D {dim}", Work(caches, caches * (t - 64) / 64, size(t)))]

    return Op(f"stick_attention_decode, D {dim}", works, size, published, "GB/s")


def router_forward(t: int) -> list[tuple[str, Work]]:
    """Of blocks of 16 tokens, those of up to 8192; of more tokens they have 32 and read V half as often."""
    tiles = t / 32 * GATE_HIDDEN / 64 * DIM / 64
    return [("router forward", Work(t / 16, tiles, 2 * t * DIM + 4 * t * (GATE_HIDDEN + EXPERTS)))]


def router_weight_gradient(t: int) -> list[tuple[str, Work]]:
    tiles = GATE_HIDDEN / 64 * DIM / 128
    pieces = min(512 / tiles, t / 256)
    moved = t * 2 * (DIM + GATE_HIDDEN) + 2 * 4 * pieces * GATE_HIDDEN * DIM
    return [("router weight gradient", Work(tiles * pieces, GATE_HIDDEN / 32 * DIM / 64 * t / 64, moved))]


def gate_flops(t: int) -> float:
    return 2 * t * DIM * GATE_HIDDEN


FORWARD = ("up product", "down product")
BACKWARD = ("hidden gradient", "input gradient", "weight gradient", "weight gradient")
OPS = (
    attention_forward(64, "FlashAttention-2 [1]: A100 up to 228, H100 260; FlashAttention-3 [2]: H100 390"),
    attention_forward(
        128,
        "FlashAttention-2 [1]: A100 up to 228, H100 320; FlashAttention-3 [2]: H100 579 at 4k, 616 at 16k; "
        "FlashAttention-4 [3]: B200 1613",
    ),
    attention_forward(1024, "FlashMLA [4]: H800 660 (head dim 576, K and V shared)"),
    attention_backward(64, "FlashAttention-2 [1]: A100 up to 196; FlashAttention-3 [2]: H100 363 to 422"),
    attention_backward(128, "FlashAttention-2 [1]: A100 up to 196, H100 335; FlashAttention-3 [2]: H100 430"),
    attention_backward(1024, ""),
    products("up product, gelu", ("up product",)),
    products("down product, gates", ("down product",)),
    products("hidden gradient", ("hidden gradient",)),
    products("input gradient", ("input gradient",)),
    products("weight gradient", ("weight gradient",)),
    products(
        "products of expert_ffn, forward",
        FORWARD,
        "H100 [5]: SonicMoE 465, DeepGEMM++ 412, ScatterMoE 262, MegaBlocks 213",
    ),
    products(
        "products of expert_ffn, backward",
        BACKWARD,
        "H100 [5]: SonicMoE 465, DeepGEMM++ 341, ScatterMoE 279, MegaBlocks 290",
    ),
    decoding(64, ""),
    decoding(128, "FlashMLA [4]: H800 3000 GB/s"),
    Op("route_topk_mlp forward", router_forward, gate_flops),
    Op("route_topk_mlp backward, weight gradient", router_weight_gradient, gate_flops),
)
