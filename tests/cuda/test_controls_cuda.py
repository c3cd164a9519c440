"""Negative controls: with any one of a kernel's barriers, fences and waits left out, the emulated device says so, or
the result is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from devices import EMULATED, HOPPER
from routed import grouped_values, layout_of
from router_cases import Router
from stick_walks import first_tiles, rows_of_logits

from moduleformer_ext import ops, reference
from moduleformer_ext.ops import grouped_gemm, stick_attention

if EMULATED:
    import cudasim

pytestmark = [
    pytest.mark.skipif(not EMULATED, reason="needs the emulated device"),
    pytest.mark.usefixtures("one_multiprocessor"),
]
SEEDS = (0, 1, 2)


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((ours - expected).norm() <= 0.02 * expected.norm())  # false of NaN


class Routed:
    """On one multiprocessor, so that its block has several tiles, with more slices of depth than stages, and with
    tiles of one and of two blocks of 64 rows for either of two warpgroups that multiply in turn."""

    def __init__(self, gradient: bool) -> None:
        torch.manual_seed(17)
        self.gradient, self.cases = gradient, []
        shapes = [((400, 20, 70), 136), ((400,), 256)] if gradient else [((70, 20, 66), 448), ((20, 70), 448)]
        for rows, features in shapes:
            layout = layout_of([[expert] for expert, count in enumerate(rows) for _ in range(count)], len(rows))
            x, weight, _ = grouped_values(layout, "token", features, 136, torch.bfloat16)
            self.cases.append((x, weight, layout, self.result(reference.grouped_gemm, x, weight, layout)))

    def result(self, op, x, weight, layout) -> torch.Tensor:
        weight = weight.detach().requires_grad_(self.gradient)
        out = op(x, weight, layout)
        return torch.autograd.grad(out.float().square().sum(), weight)[0] if self.gradient else out

    def __call__(self) -> bool:
        return all(close(self.result(grouped_gemm, *case), expected) for *case, expected in self.cases)


class Sticks:
    """Three warpgroups, more tiles than stages: all walk to the end, any ends before others, or sees no key."""

    BLOCKS = 4  # each with an order of warps of its own

    def __init__(self) -> None:
        self.cases = []
        walks = [(0.0, (-6, -7, -6))]
        walks += [(2**-24, logits) for logits in ((-3, -9, -9), (-9, -3, -9), (-9, -9, -3), (-2.5, 8, 8))]
        for epsilon, logits in walks:
            q, k, v = rows_of_logits(logits, 700, 64, torch.bfloat16)
            self.add((q, k, v), True, epsilon, first_tiles(q, k, epsilon))
        q, k, v = rows_of_logits((-6, -7, -6), 3, 64, torch.bfloat16)
        grouped = q.view(1, 3, 64, 64)  # the 64 heads of the first query are a warpgroup's rows
        self.add((grouped, k, v), False, 0.0, torch.zeros(1, 3, 64, dtype=torch.int32))

    def add(self, operands, attend_current: bool, epsilon: float, first: torch.Tensor) -> None:
        exact = [x.float() for x in operands]
        o, remainder = reference.stick_attention(*exact, attend_current=attend_current, return_remainder=True)
        blocks = [x.expand(self.BLOCKS, *x.shape[1:]) for x in operands]
        self.cases.append(((*blocks, None, attend_current, None, None, None, epsilon, False), o, remainder, first))

    def __call__(self) -> bool:
        for arguments, o, remainder, first in self.cases:
            ours = torch.ops.moduleformer_ext.stick_attention_forward(*arguments)
            for block in range(self.BLOCKS):
                sticks = torch.allclose(ours[1][block], remainder[0], rtol=0, atol=1e-4)
                if not (sticks and close(ours[0][block], o[0]) and torch.equal(ours[3][block], first[0])):
                    return False
        return True


class WideSticks(Sticks):
    """A cluster of two blocks per tile of rows, K = V: more tiles than stages, walks that end, rows that see no key."""

    BLOCKS = 2

    def __init__(self) -> None:
        self.cases = []
        for epsilon, mean, keys in ((0.0, -6, 260), (2**-24, -3, 260), (2**-24, 8, 400)):
            q, k, _ = rows_of_logits((mean,), keys, 1024, torch.bfloat16)
            self.add((q, k, k), True, epsilon, first_tiles(q, k, epsilon) * 4)  # in backward's tiles of 16 keys
        q, k, _ = rows_of_logits((-6,), 1, 1024, torch.bfloat16)
        self.add((q.view(1, 1, 64, 1024), k, k), False, 0.0, torch.zeros(1, 1, 64, dtype=torch.int32))

    def add(self, operands, *rest) -> None:
        super().add(operands, *rest)
        (q, k, _, *options), *expected = self.cases[-1]
        k = k.contiguous()
        self.cases[-1] = ((q, k, k, *options), *expected)


class Gates:
    """More slices of tokens than stages, in two pieces."""

    def __init__(self) -> None:
        self.router = Router.random("linear", 600, 40, dim=136, dtype=torch.bfloat16)
        route = self.router.require_grad()(reference, 2)
        self.cotangent = torch.randn(route.logits.shape)
        self.expected = self.gradients(self.router.double(), reference)

    def gradients(self, router: Router, module) -> list[torch.Tensor]:
        logits = router(module, 2).logits
        return torch.autograd.grad(logits, router.leaves(), self.cotangent.to(logits))

    def __call__(self) -> bool:
        gradients = zip(self.gradients(self.router, ops), self.expected, strict=True)
        return all(close(ours.double(), exact) for ours, exact in gradients)


class StickGradients(Sticks):
    """The same walks, backward, and more tiles of queries than stages; what comes of forward is computed once."""

    BLOCKS = 2

    def __init__(self) -> None:
        super().__init__()
        means = (-6, 8, *[-6] * 6)  # the second's rows have none of the oldest keys
        operands = rows_of_logits(means, 576, 64, torch.bfloat16)
        self.add(operands, True, 2**-24, first_tiles(*operands[:2], 2**-24))

    def add(self, operands, attend_current: bool, epsilon: float, first: torch.Tensor) -> None:
        options = {"attend_current": attend_current, "return_remainder": True}
        exact = [x.float().requires_grad_() for x in operands]
        o, remainder = reference.stick_attention(*exact, **options)
        grads = torch.randn(o.shape, generator=torch.Generator().manual_seed(3)).bfloat16(), torch.ones_like(remainder)
        expected = torch.autograd.grad([o, remainder], exact, [grads[0].float(), grads[1]])
        leaves = [x.expand(self.BLOCKS, *x.shape[1:]).contiguous().requires_grad_() for x in operands]
        ours = stick_attention(*leaves, stick_epsilon=epsilon, **options)
        blocks = [x.expand(self.BLOCKS, *x.shape[1:]).contiguous() for x in grads]
        self.cases.append((ours, leaves, blocks, expected))

    def __call__(self) -> bool:
        for outputs, leaves, grads, expected in self.cases:
            ours = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
            for grad, exact in zip(ours, expected, strict=True):
                if not all(close(grad[block], exact[0]) for block in range(self.BLOCKS)):
                    return False
        return True


SM_80 = ("bar.sync", "cp.async.commit_group", "cp.async.wait_group")
SM_90A = ("bar.sync", "mbarrier.init", "mbarrier.try_wait", "mbarrier.arrive", "wgmma.commit_group")
SM_90A += ("cp.async.commit_group", "cp.async.wait_group", "fence.proxy.async")
STICK_SM_90A = (*SM_90A, "cp.async.wait_all", "wgmma.wait_group", "wgmma.fence")
ROUTER_WEIGHTS = "_ZN3mfx6router27route_topk_backward_weightsINS_8BFloat16EEEvNS0_8BackwardE"
KERNELS: dict[str, tuple[Callable[[], Callable[[], bool]], tuple[str, ...]]] = {
    "grouped_forward_bf16_64x128_sm80": (lambda: Routed(gradient=False), SM_80),
    "grouped_weight_grad_bf16_128x128_sm80": (lambda: Routed(gradient=True), SM_80),
    "grouped_forward_bf16_128x128_sm90a": (lambda: Routed(gradient=False), SM_90A),
    "grouped_weight_grad_bf16_128x128_sm90a": (lambda: Routed(gradient=True), SM_90A),
    ROUTER_WEIGHTS: (Gates, SM_80),
    "stick_fwd_bf16_d64_sm90a": (Sticks, (*STICK_SM_90A, "bar.red")),
    "stick_fwd_bf16_d1024_sm90a": (WideSticks, (*STICK_SM_90A, "bar.red", "barrier.cluster")),
    "stick_bwd_query_bf16_d64_sm90a": (StickGradients, STICK_SM_90A),
    "stick_bwd_key_bf16_d64_sm90a": (StickGradients, STICK_SM_90A),
}
UNSEEN = {
    # The last of its main loop frees shared memory, which this kernel has no further use for.
    (ROUTER_WEIGHTS, "bar.sync"): [1],
    # Before Q's place takes dQ: the emulated device ends a warpgroup's products for all of its warps at a time.
    ("stick_bwd_query_bf16_d64_sm90a", "bar.sync"): [2],
    # That of take_roles(), after one of the cluster; and before Q's place takes O, as in the dQ kernel.
    ("stick_fwd_bf16_d1024_sm90a", "bar.sync"): [0, 2],
    # Nothing is under way when all tiles have been loaded: of two stages' ring each is waited for at once.
    ("stick_fwd_bf16_d1024_sm90a", "cp.async.wait_group"): [1],
    # A tile's products lie between the first and what the other block sends, the output between that and the last.
    ("stick_fwd_bf16_d1024_sm90a", "barrier.cluster"): [0, 1, 2, 3],
    # Before the exchange boxes take the next tile's weights, and the results: for the same reason.
    ("stick_bwd_key_bf16_d64_sm90a", "bar.sync"): [2, 4],
    # Of dV's and dK's products, whose accumulators were last written by hand before the fence of the scores' products.
    ("stick_bwd_key_bf16_d64_sm90a", "wgmma.fence"): [1],
    # For the tile that a warpgroup skips: the loading one has always asked for its stage by then.
    ("stick_bwd_query_bf16_d64_sm90a", "mbarrier.try_wait"): [7],
}


def survivors(kernel: str, opcode: str, works: Callable[[], bool]) -> tuple[list[int], int]:
    """Indices of the instructions whose absence nothing shows under any seed, and how many were tried; those that no
    warp comes by are not."""
    left, tried = [], 0
    for index in range(cudasim.count_instructions(kernel, opcode)):
        caught = False
        for seed in SEEDS:
            cudasim.set_seed(seed)
            try:
                with cudasim.dropped(kernel, opcode, index) as instruction:
                    caught = not works()
            except RuntimeError:
                caught = True
            if caught or not instruction.reached:
                break
        tried += bool(instruction.reached)
        if instruction.reached and not caught:
            left.append(index)
    return left, tried


@pytest.fixture(params=KERNELS, ids=lambda name: name.removeprefix("_ZN3mfx6router"))
def case(request):
    """A kernel, what runs it, and what is left out; of the architecture that is emulated."""
    kernel = request.param
    if kernel.endswith("_sm90a") and not HOPPER:
        pytest.skip("another kernel serves this architecture")
    works, opcodes = KERNELS[kernel][0](), KERNELS[kernel][1]
    cudasim.reset_stats()
    assert works()
    plain_names = (re.sub("[<(].*", "", launch["kernel"]).split("::")[-1] for launch in cudasim.stats())
    if not any(name in kernel for name in plain_names):
        pytest.skip("another kernel serves this architecture")
    return kernel, works, opcodes


def test_nothing_is_left_out_in_silence(case, capfd):
    kernel, works, opcodes = case
    for opcode in opcodes:
        left, tried = survivors(kernel, opcode, works)
        assert tried, opcode
        assert left == UNSEEN.get((kernel, opcode), []), f"{opcode} number {left} of {kernel} may be left out"
    capfd.readouterr()  # the emulator's reports, which a failure would drown in
    assert works()


def test_products_of_a_warpgroup_are_fenced_and_waited_for(case):
    """The first wait of either main loop leaves the one product under way that there is; fences but the first order
    nothing."""
    kernel, works, _ = case
    if not kernel.endswith("_sm90a"):
        pytest.skip("sm_80 has no such products")
    left, tried = survivors(kernel, "wgmma.wait_group", works)
    assert len(left) <= 2 and len(left) < tried
    left, tried = survivors(kernel, "wgmma.fence", works)
    assert len(left) < tried
