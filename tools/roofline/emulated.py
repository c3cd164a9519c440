"""What SASS does not tell, counted on the emulated device:

    tools/emulated.sh PYTHON --run tools/roofline/emulated.py FILE

Shared-memory wavefronts with their conflicts, bytes from global memory, blocks, shared memory, and which kernel serves
a call at all. Each call runs at two sizes, from which follow what a tile of the main loop costs and what each unit of
work (a query row, an output tile, a split) costs besides, in its beginning and end; both as PTX has them.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Amounts = tuple[float, float]
TILE = 64  # a tile of attention is 64 x 64 scores, of a product 128 x 128 x 64, of decoding 64 keys
OUTPUT = 128


@dataclass(frozen=True)
class Call:
    """`run(size)` launches a kernel whose name begins with `kernel`; `amounts(size)`: its units of work, and tiles."""

    kernel: str
    sizes: tuple[int, int]
    run: Callable[[int], object]
    amounts: Callable[[int], Amounts]


def solve(amounts: Sequence[Amounts], values: Sequence[float]) -> Amounts:
    """x and y of x * units + y * tiles = value, for two sizes."""
    (a, b), (c, d) = amounts
    first, second = values
    determinant = a * d - b * c
    return (first * d - b * second) / determinant, (a * second - first * c) / determinant


def figures(launch: Mapping[str, Any]) -> dict[str, float]:
    """What is added up of a launch."""
    return {
        "issued": launch["warp_instructions"],
        "special": launch["issued"]["sfu"],
        "shuffles": launch["issued"]["shuffle"],
        "flops": launch["mma_flops"],
        "wavefronts": launch["shared_wavefronts"] + launch["bulk_bytes"] / 128,  # bytes of a wavefront
        "loaded_bytes": 32 * launch["global_load_sectors"],
        "cp_async_bytes": launch["cp_async_bytes"],
        "global_bytes": 32 * (launch["global_load_sectors"] + launch["global_store_sectors"]) + launch["bulk_bytes"],
    }


def costs(call: Call, launches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one launch per size."""
    (name,) = {launch["kernel"] for launch in launches}
    found = [figures(launch) for launch in launches]
    amounts = [call.amounts(size) for size in call.sizes]
    solved = {key: solve(amounts, [f[key] for f in found]) for key in found[0]}
    return {
        "kernel": name,
        "threads": launches[0]["block"][0],
        "shared_bytes": launches[0]["dynamic_smem"] + launches[0]["static_smem"],
        "blocks_per_unit": math.prod(launches[1]["grid"]) / amounts[1][0],
        "unit": {key: value[0] for key, value in solved.items()},
        "tile": {key: value[1] for key, value in solved.items()},
    }


def attention(dim: int, backward: bool) -> Callable[[int], object]:
    """One head; head dims above 256 with K = V, as models have them."""
    import torch

    from moduleformer_ext import ops

    def run(t: int) -> object:
        q, k, v = (torch.randn(1, t, 1, dim).bfloat16().requires_grad_(backward) for _ in range(3))
        o = ops.stick_attention(q, k, k if dim > 256 else v, stick_epsilon=0.0)
        return o.backward(torch.randn_like(o)) if backward else o

    return run


def product(slots: int, inputs: int, outputs: int, backward: bool = False, **options: Any) -> object:
    """Of one expert."""
    import torch

    from moduleformer_ext import ops

    layout = ops.expert_layout(torch.zeros(slots, 1, dtype=torch.long), 1)
    x = torch.randn(slots, inputs).bfloat16().requires_grad_(backward)
    weight = torch.randn(1, inputs, outputs).bfloat16().requires_grad_(backward)
    y = ops.grouped_gemm(x, weight, layout, **options)
    return y.backward(torch.randn_like(y)) if backward else y


def gates(slots: int) -> dict[str, Any]:
    import torch

    return {"out_order": "token", "gates": torch.rand(slots, 1)}


def ffn_backward(dim: int, hidden: int) -> object:
    import torch

    from moduleformer_ext import ops

    layout = ops.expert_layout(torch.zeros(2 * OUTPUT, 1, dtype=torch.long), 1)
    x = torch.randn(2 * OUTPUT, dim).bfloat16().requires_grad_()
    up, down = torch.randn(1, dim, hidden).bfloat16(), torch.randn(1, hidden, dim).bfloat16()
    y = ops.expert_ffn(x, up, down, layout, torch.rand(2 * OUTPUT, 1))
    return y.backward(torch.randn_like(y))


def decode(dim: int, rows: int) -> Callable[[int], object]:
    """As many caches as a GPU is filled with, so that each has one split beside its newest keys."""
    import torch

    from moduleformer_ext import ops

    def run(keys: int) -> object:
        cache = [torch.randn(256, keys, 1, dim).bfloat16() for _ in range(2)]
        lengths = torch.full((256,), keys, dtype=torch.int32)
        return ops.stick_attention_decode(torch.randn(256, 1, rows, dim).bfloat16(), *cache, lengths, stick_epsilon=0.0)

    return run


def router(tokens: int, dim: int, hidden: int, experts: int, backward: bool) -> object:
    import torch

    from moduleformer_ext import ops

    x, v, b, w = (torch.randn(*s).bfloat16() for s in ((tokens, dim), (hidden, dim), (hidden,), (experts, hidden)))
    leaves = [p.requires_grad_(backward) for p in (x, v, b, w)]
    gates = ops.route_topk_mlp(*leaves, 2).gates
    return gates.sum().backward() if backward else gates


def calls() -> dict[str, Call]:
    """By the name that the model knows them by."""

    def scores(rows: int) -> Amounts:
        return rows, rows * rows / 2 / TILE**2

    def slices(depth: int) -> Amounts:  # of 256 x 256 results
        return 4, 4 * depth / TILE

    found = {}
    for dim in (64, 128, 1024):
        sizes = (128, 256) if dim == 1024 else (256, 512)
        found[f"attention forward D {dim}"] = Call("stick_fwd_", sizes, attention(dim, False), scores)
        for kernel in ("query", "key"):
            name = f"attention {kernel} kernel D {dim}"
            found[name] = Call(f"stick_bwd_{kernel}_", sizes, attention(dim, True), scores)
    n = 2 * OUTPUT
    found["up product"] = Call(
        "grouped_forward", (n, 2 * n), lambda k: product(n, k, n, activation="gelu_tanh"), slices
    )
    found["down product"] = Call("grouped_forward", (n, 2 * n), lambda k: product(n, k, n, **gates(n)), slices)
    found["hidden gradient"] = Call("grouped_hidden_grad", (n, 2 * n), lambda k: ffn_backward(k, n), slices)
    found["input gradient"] = Call("grouped_input_grad", (n, 2 * n), lambda k: product(n, n, k, True), slices)
    found["weight gradient"] = Call("grouped_weight_grad", (n, 2 * n), lambda k: product(k, n, n, True), slices)
    for dim in (64, 128):
        found[f"decoding D {dim}"] = Call(
            "stick_decode", (128, 256), decode(dim, 2), lambda k: (256, 256 * (k - 64) / TILE)
        )
    found["router forward"] = Call(
        "route_topk_forward",
        (256, 512),
        lambda d: router(64, d, 256, 32, False),
        lambda d: (4, 2 * 256 / TILE * d / TILE),
    )
    found["router weight gradient"] = Call(
        "route_topk_backward_weights",
        (128, 256),
        lambda t: router(t, 512, 256, 32, True),
        lambda t: (16, 64 * t / TILE),
    )
    return found


def main(path: str) -> None:
    import torch

    import cudasim

    cudasim.use_torch_allocator()
    torch.manual_seed(0)
    result = {}
    for name, call in calls().items():
        launches = []
        for size in call.sizes:
            cudasim.reset_stats()
            call.run(size)
            # The last one: decoding walks the newest keys first, in a launch of its own.
            launches.append([s for s in cudasim.stats() if re.search(rf"\b{call.kernel}", s["kernel"])][-1])
        result[name] = costs(call, launches)
        print(name, result[name]["kernel"], flush=True)
    Path(path).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
