"""The loss without logits: the same as with them, gradients included, and by way of the head where that is more."""

from __future__ import annotations

import pytest
import torch
from small_models import random_model
from torch import Tensor, nn

from moduleformer_ext import ops
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.nn import Linear, head_cross_entropy

IDS = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1)).masked_fill(IDS < 4, -100)
SHIFTED = torch.cat([LABELS[:, 1:], torch.full((2, 1), -100)], 1)


def loss_and_gradients(model: MoLMForCausalLM, **arguments: object) -> list[Tensor]:
    model.zero_grad()
    output = model(IDS, **arguments)
    output.loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [output.loss.detach(), output.cross_entropy.detach(), *grads]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("aux_loss_weight", [0.0, 0.1])
def test_equals_the_loss_of_logits(tied: bool, aux_loss_weight: float) -> None:
    model = random_model(tie_word_embeddings=tied, aux_loss_weight=aux_loss_weight).float()
    expected = loss_and_gradients(model, labels=LABELS)
    for arguments in ({"labels": LABELS}, {"shift_labels": SHIFTED}):
        ours = loss_and_gradients(model, **arguments, skip_logits=True)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss_and_gradients(model, shift_labels=SHIFTED), expected, rtol=1e-5, atol=1e-6)


def test_logits_are_left_out_and_the_rest_is_there() -> None:
    model = random_model()
    output = model(IDS, labels=LABELS, skip_logits=True, use_cache=True, output_routes=True)
    assert output.logits is None and output.uncast_logits is None
    assert output.past_key_values is not None and output.routes is not None
    torch.testing.assert_close(output.last_hidden_state, model(IDS).last_hidden_state)
    without = model(IDS, skip_logits=True)
    assert without.logits is None and without.loss is None and without.cross_entropy is None


def test_autocast() -> None:
    model = random_model().float()
    with torch.autocast("cpu", torch.bfloat16):
        whole, fused = model(IDS, labels=LABELS), model(IDS, labels=LABELS, skip_logits=True)
    assert fused.loss.dtype == torch.float32
    torch.testing.assert_close(fused.loss, whole.loss, rtol=1e-5, atol=1e-6)


def test_compiles_to_one_graph() -> None:
    model = random_model().float()
    compiled = torch.compile(
        lambda ids, labels: model(ids, labels=labels, skip_logits=True).loss, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(IDS, LABELS), model(IDS, labels=LABELS).loss, rtol=1e-5, atol=1e-6)


def test_a_head_that_is_more_than_its_weight_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x, target = Linear(6, 11, bias=False), torch.randn(2, 3, 6), torch.randint(11, (2, 3))
    fused: list[object] = []
    op = ops.linear_cross_entropy
    monkeypatch.setattr(ops, "linear_cross_entropy", lambda *a, **k: fused.append(a) or op(*a, **k))
    plain = nn.functional.cross_entropy(head(x).flatten(0, 1), target.flatten())
    torch.testing.assert_close(head_cross_entropy(head, x, target), plain)
    assert len(fused) == 1
    with_bias = Linear(6, 11)
    plain = nn.functional.cross_entropy(with_bias(x).flatten(0, 1), target.flatten())
    torch.testing.assert_close(head_cross_entropy(with_bias, x, target), plain)
    hook = head.register_forward_hook(lambda module, inputs, out: 2 * out)
    plain = nn.functional.cross_entropy(head(x).flatten(0, 1), target.flatten(), reduction="sum")
    torch.testing.assert_close(head_cross_entropy(head, x, target, reduction="sum"), plain)
    assert len(fused) == 1
    hook.remove()
    head_cross_entropy(head, x, target)
    assert len(fused) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": LABELS, "shift_labels": SHIFTED}, "labels must be None where shift_labels are given, got both"),
        ({"shift_labels": SHIFTED[:, 1:]}, r"shift_labels must have the shape of input_ids \[2, 9\], got \[2, 8\]"),
        (
            {"shift_labels": SHIFTED, "logits_at": SHIFTED},
            "logits_at must be None where shift_labels are given, got both",
        ),
        ({"skip_logits": True, "logits_at": SHIFTED}, "logits_at must be None with skip_logits, got both"),
    ],
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^MoLMForCausalLM: {message}"):
        random_model()(IDS, **arguments)
