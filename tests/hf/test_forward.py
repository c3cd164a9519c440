"""Calls and their results, against our own model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from hf_models import make_pair, tokens
from transformers.utils import logging

from moduleformer_ext import hf
from moduleformer_ext.hf.modeling import CACHE, logger
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM


def test_everything_a_call_returns(pair: tuple[Any, Any]) -> None:
    native, model = pair
    x = tokens(2, 9)
    ours = native(x, labels=x, use_cache=True, output_hidden_states=True, output_routes=True)
    theirs = model(x, labels=x, use_cache=True, output_hidden_states=True, output_router_logits=True)
    assert torch.equal(theirs.logits, ours.uncast_logits) and torch.equal(theirs.aux_loss, ours.aux_loss)
    torch.testing.assert_close(theirs.loss, ours.loss)
    assert len(theirs.hidden_states) == len(ours.hidden_states)
    assert all(map(torch.equal, theirs.hidden_states, ours.hidden_states))
    expected = [route.logits for routes in ours.routes for route in routes]
    assert len(theirs.router_logits) == len(expected) and all(map(torch.equal, theirs.router_logits, expected))
    for layer, (keys, values) in zip(theirs[CACHE].layers, ours.past_key_values, strict=True):
        assert torch.equal(layer.keys.transpose(1, 2).flatten(2), keys)
        assert torch.equal(layer.values.transpose(1, 2).flatten(2), values)


def test_what_is_not_asked_for_is_not_made(pair: tuple[Any, Any]) -> None:
    _, model = pair
    output = model(tokens(1, 5), use_cache=False)
    assert set(output.keys()) == {"logits"}
    assert set(model(tokens(1, 5)).keys()) == {"logits", CACHE}
    assert set(model.transformer(tokens(1, 5), use_cache=False).keys()) == {"last_hidden_state"}
    assert model.transformer(tokens(1, 5), output_router_logits=True).aux_loss is not None
    as_tuple = model(tokens(1, 5), use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits)
    model.config.return_dict = False
    assert torch.equal(model(tokens(1, 5), use_cache=False)[0], output.logits)


def test_logits_to_keep(pair: tuple[Any, Any]) -> None:
    native, model = pair
    x = tokens(2, 9)
    logits = native(x).uncast_logits
    torch.testing.assert_close(model(x, logits_to_keep=1).logits, logits[:, -1:])
    torch.testing.assert_close(model(x, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])


def test_embedded_tokens(pair: tuple[Any, Any]) -> None:
    _, model = pair
    x = tokens(2, 9)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(x)).logits, model(x).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_positions_are_ignored_and_that_is_said_once(pair: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    _, model = pair
    logging.warning_once.cache_clear()
    handlers, logger.handlers = logger.handlers, []
    said: list[str] = []
    level = logging.get_verbosity()
    logging.set_verbosity_warning()
    original = logger.warning
    logger.warning = lambda message, *_: said.append(message)
    try:
        x = tokens(1, 5)
        for positions in (None, torch.arange(5)[None], torch.arange(5, 10)[None]):
            assert torch.equal(model(x, position_ids=positions).logits, model(x).logits)
        model.generate(x, max_new_tokens=2)
    finally:
        logger.warning, logger.handlers = original, handlers
        logging.set_verbosity(level)
    assert said == ["MoLM has no positions: position_ids are ignored."]


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding(pair: tuple[Any, Any], side: str) -> None:
    native, model = pair
    x = tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    padded = {"left": slice(0, 3), "right": slice(6, 9), "middle": slice(3, 6)}[side]
    mask[1, padded] = 0
    output = model(x, attention_mask=mask)
    assert torch.equal(output.logits, native(x, attention_mask=mask).uncast_logits)
    kept = mask[1].bool()
    torch.testing.assert_close(output.logits[1, kept], model(x[1:, kept]).logits[0])


def test_masks_that_cannot_be_used(pair: tuple[Any, Any]) -> None:
    _, model = pair
    x = tokens(2, 9)
    with pytest.raises(
        ValueError, match=r"attention_mask must be \[batch, past \+ new tokens\], got shape \[2, 1, 9, 9\]"
    ):
        model(x, attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 9\] .*, got \[2, 8\]"):
        model(x, attention_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(x, output_attentions=True)
    with pytest.raises(ValueError, match=r"sdpa|scaled_dot_product_attention"):
        hf.ModuleFormerForCausalLM._from_config(model.config, attn_implementation="sdpa")


class TestLoss:
    def test_labels_and_gradients(self, pair: tuple[Any, Any]) -> None:
        native, model = pair
        x, labels = tokens(2, 9), tokens(2, 9, seed=2)
        labels[0, :4] = -100
        native(x, labels=labels).loss.backward()
        model(x, labels=labels).loss.backward()
        for name, parameter in native.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=name)

    def test_the_routing_loss_counts(self) -> None:
        native, model = make_pair(aux_loss_weight=0.5)
        x = tokens(2, 9)
        plain = F.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        output = model(x, labels=x)
        torch.testing.assert_close(output.loss, plain + 0.5 * output.aux_loss)
        torch.testing.assert_close(output.loss, native(x, labels=x).loss)
        model.config.router_aux_loss_coef = 0.0
        torch.testing.assert_close(model(x, labels=x).loss, plain)

    def test_parts_of_a_batch_add_up(self) -> None:
        """Cross-entropies to that of the whole, routing losses weighted by their tokens."""
        _, model = make_pair(aux_loss_weight=0.5)
        x, labels = tokens(3, 9), tokens(3, 9, seed=2)
        labels[1, 3:] = -100
        n = (labels[:, 1:] != -100).sum()
        parts = [model(x[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=n) for i in range(3)]
        whole = F.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        share = (labels[:, 1:] != -100).sum(1) / n
        aux = sum(s * part.aux_loss for s, part in zip(share, parts, strict=True))
        torch.testing.assert_close(sum(part.loss for part in parts), whole + 0.5 * aux)
        alone = model(x, labels=labels, num_items_in_batch=n)
        torch.testing.assert_close(alone.loss, model(x, labels=labels).loss)

    def test_without_logits(self) -> None:
        """Asked for, or by the configuration in training mode; otherwise logits are returned as everywhere."""
        _, model = make_pair(aux_loss_weight=0.5)
        x, labels = tokens(3, 9), tokens(3, 9, seed=2)
        labels[1, 3:] = -100
        shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
        for options in ({}, {"num_items_in_batch": 40}, {"shift_labels": shifted}, {"ignore_index": 3}):
            options = {"labels": labels.where(labels != -100, 3) if "ignore_index" in options else labels} | options
            whole, without = model(x, **options), model(x, **options, skip_logits=True)
            assert whole.logits is not None and without.logits is None
            torch.testing.assert_close(without.loss, whole.loss)
        model.config.skip_logits = True
        assert model.eval()(x, labels=labels).logits is not None
        model.train()
        assert model(x).logits is not None
        assert model(x, labels=labels).logits is None and model(x, labels=labels, skip_logits=False).logits is not None
        assert "skip_logits" not in model.generation_config.to_diff_dict()

    def test_a_loss_of_ones_own_is_called(self) -> None:
        _, model = make_pair(aux_loss_weight=0.0)
        x = tokens(2, 5)
        model.loss_function = lambda logits, labels, vocab_size, **options: logits.sum() * 0 + 7
        output = model(x, labels=x, skip_logits=True)
        assert output.logits is None and output.loss.item() == 7

    def test_of_a_classifier(self) -> None:
        config = hf.ModuleFormerConfig.of(MoLMConfig.preset("molm-nano"), num_labels=3, pad_token_id=0)
        model = hf.ModuleFormerForSequenceClassification(config)
        x = torch.randint(1, 1024, (2, 7))
        output = model(x, labels=torch.tensor([0, 2]))
        torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.tensor([0, 2])))
        output.loss.backward()
        assert model.transformer.h[0].mlpf.experts.weight.grad is not None


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")  # the name that all versions have
class TestCheckpointing:
    def test_gradients_are_the_same(self, pair: tuple[Any, Any]) -> None:
        native, model = pair
        x = tokens(2, 9)
        native(x, labels=x).loss.backward()
        model.train().gradient_checkpointing_enable()
        calls: list[int] = []
        model.transformer.h[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
        output = model(x, labels=x)
        assert output.get(CACHE) is None
        output.loss.backward()
        assert len(calls) == 2  # forward, and again in backward
        for name, parameter in native.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=name)
        model.gradient_checkpointing_disable()
        model(x, labels=x).loss.backward()
        assert len(calls) == 3

    def test_what_cannot_be_recomputed_is_refused(self, pair: tuple[Any, Any]) -> None:
        from transformers import DynamicCache

        _, model = pair
        with pytest.raises(ValueError, match="use_reentrant must be False"):
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model.train().gradient_checkpointing_enable()
        with pytest.raises(
            TypeError, match="with gradient checkpointing the cache must be None or a ModuleFormerCache"
        ):
            model(tokens(1, 5), past_key_values=DynamicCache())


def test_dropout_and_sampled_experts_are_those_of_the_configuration() -> None:
    native, model = make_pair(moe_pdrop=0.5, resid_pdrop=0.2, embd_pdrop=0.1, sample_topk=1)
    config = model.config.molm.replace(sample_topk=1)
    native = MoLMForCausalLM.from_state(config, native.state_dict())
    model = hf.from_native(native)
    x = tokens(2, 9)
    torch.manual_seed(3)
    expected = native.train()(x).uncast_logits
    torch.manual_seed(3)
    assert torch.equal(model.train()(x).logits, expected)
    assert not torch.allclose(model(x).logits, expected)
