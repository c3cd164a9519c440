"""The model over the kernels against the model over their plain-PyTorch twins, eager, compiled and under autocast."""

from __future__ import annotations

import pytest
import torch
from small_models import IDENTITY_KV, random_model

from moduleformer_ext import ops, reference
from moduleformer_ext.models import MoLMForCausalLM

IDS = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))


def step(model: MoLMForCausalLM) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(IDS, labels=IDS)
    assert output.loss is not None
    output.loss.backward()
    return output.uncast_logits.detach(), output.loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def use_twins(patch: pytest.MonkeyPatch) -> None:
    for name in reference.__all__:
        patch.setattr(ops, name, getattr(reference, name))


@pytest.mark.parametrize("gate_type", ["mlp", "linear", "gmm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernels_equal_twins(gate_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(dtype, gate_type=gate_type, aux_loss_type="switch")
    fast = step(model)
    with monkeypatch.context() as patch:
        use_twins(patch)
        slow = step(model)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(fast[:2], slow[:2], atol=tolerance, rtol=tolerance)
    for name, grad in fast[2].items():
        torch.testing.assert_close(grad, slow[2][name], atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("changes", [{}, IDENTITY_KV], ids=["linear", "identity"])
@pytest.mark.parametrize("cached", [False, True])
def test_under_bfloat16_autocast(changes: dict[str, int], cached: bool) -> None:
    model = random_model(torch.float32, **changes)
    exact = model(IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        if cached:
            with torch.no_grad():
                past = model(IDS[:, :6], use_cache=True).past_key_values
                logits = model(IDS[:, 6:], past_key_values=past).logits
                exact = exact[:, 6:]
        else:
            output = model(IDS, labels=IDS)
            logits = output.logits
            assert output.loss is not None and output.loss.dtype == torch.float32
            output.loss.backward()
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    # an expert may change its place where two logits are close, so this is a check on the whole only
    assert (logits - exact).norm() < 0.1 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"gate_type": "gmm", **IDENTITY_KV}], ids=["mlp", "gmm-identity"])
def test_compiles_whole(changes: dict[str, int]) -> None:
    model = random_model(torch.float32, **changes)
    eager = step(model)
    model.forward = torch.compile(model.forward, fullgraph=True)  # type: ignore[method-assign]
    compiled = step(model)
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
