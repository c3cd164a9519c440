"""Frozen experts cost no weight gradients: the kernels are not asked for them, and take the time of what is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.nn import MixtureOfFFN
from moduleformer_ext.surgery import insert_experts, set_trainable

NUM_NEW = 2


class BackwardKernels(TorchDispatchMode):
    """Records, of every backward kernel that runs, the weight gradients it was asked for and the sizes of all that it
    returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, list[bool]]] = []
        self.returned: list[list[int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "moduleformer_ext" and "_backward" in func.__name__:
            self.returned.append([0 if tensor is None else tensor.numel() for tensor in results])
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.name in ("needs_weight", "needs_up", "needs_down"):
                    self.asked.append((argument.name, list(value)))
                elif argument.name == "wanted":  # of x, the hidden weight and bias, the segments of the rows
                    self.asked.append(("rows", list(value[3:])))
        return results


def _record(model: MoLMForCausalLM, tokens: torch.Tensor) -> BackwardKernels:
    loss = model(tokens, labels=tokens).loss
    with BackwardKernels() as kernels:
        loss.backward()
    return kernels


@pytest.mark.parametrize("gate_type", ["mlp", "linear", "gmm"])
def test_kernels_are_asked_for_the_new_segment_alone(make_model, tokens, gate_type):
    model = insert_experts(make_model(torch.float32, gate_type=gate_type), attention=NUM_NEW, ffn=NUM_NEW)
    kernels = _record(model, tokens)
    per_layer = {"needs_weight": 2, "needs_up": 1, "needs_down": 1, "rows": 2}
    names = sorted(name for name, _ in kernels.asked)
    assert names == sorted(name for name, number in per_layer.items() for _ in range(2 * number))
    assert all(wanted == [True] for _, wanted in kernels.asked)

    before = sum(map(sum, kernels.returned))
    set_trainable(model, "new", embedding=True)  # so that gradients of activations are wanted as before
    kernels = _record(model, tokens)
    assert sorted(name for name, _ in kernels.asked) == names
    assert all(wanted == [False, True] for _, wanted in kernels.asked)
    frozen = [parameter for name, parameter in model.named_parameters() if _is_frozen(name)]
    assert before - sum(map(sum, kernels.returned)) == sum(parameter.numel() for parameter in frozen)


def _is_frozen(name: str) -> bool:
    """Of what the kernels of experts and routers read: old experts and their rows, and the gates' hidden layers."""
    return name.endswith("_old") or (".w_gate." in name and not name.endswith("_new"))


def test_the_work_is_skipped():
    """One layer of experts, one thread: without 15 of 16 experts' weight gradients the backward pass takes much less
    than with them. Processor time, the best of interleaved repeats.
    """
    torch.manual_seed(0)
    config = MoLMConfig.preset("molm-nano", n_embd=256, ffd_hidden=256, n_layer=1, n_mlp_experts=15)
    x = torch.randn(1024, 256, requires_grad=True)
    extended = insert_experts(MoLMForCausalLM(config), ffn=1)

    def layer(part: str) -> MixtureOfFFN:
        model = insert_experts(MoLMForCausalLM(config), ffn=1)
        model.load_state_dict(extended.state_dict())
        set_trainable(model, part)
        return model.transformer.h[0].mlpf

    whole, new = layer("all"), layer("new")
    best = {"all": float("inf"), "new": float("inf")}
    for _ in range(7):
        for part, module in (("all", whole), ("new", new)):
            y = module(x)[0]
            best[part] = min(best[part], _processor_seconds(lambda y=y: y.backward(torch.ones_like(y))))
    assert best["new"] < 0.75 * best["all"], best


def _processor_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
