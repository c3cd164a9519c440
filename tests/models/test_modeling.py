"""Behaviour of the model: history, caches, padding, checkpointing, routes, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_model
from torch import Tensor

from moduleformer_ext.models import KVCache, MoLMConfig, MoLMForCausalLM
from moduleformer_ext.models.blocks import _AUX_LOSSES, routing_loss
from moduleformer_ext.models.config import AUX_LOSS_TYPES


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("grad", [True, False])
def test_history_equals_one_long_pass(any_model: MoLMForCausalLM, grad: bool) -> None:
    ids = tokens(2, 9)
    with torch.set_grad_enabled(grad):
        whole = any_model(ids).uncast_logits
        past, parts = None, []
        for start, end in ((0, 4), (4, 5), (5, 9)):
            output = any_model(ids[:, start:end], past_key_values=past, use_cache=True)
            past = output.past_key_values
            parts.append(output.uncast_logits)
    close(torch.cat(parts, 1), whole)


def test_past_is_used_even_when_no_cache_is_returned(any_model: MoLMForCausalLM) -> None:
    ids = tokens(1, 6)
    past = any_model(ids[:, :3], use_cache=True).past_key_values
    output = any_model(ids[:, 3:], past_key_values=past)
    assert output.past_key_values is None
    close(output.uncast_logits, any_model(ids).uncast_logits[:, 3:])


def test_history_stops_gradients(any_model: MoLMForCausalLM) -> None:
    past = any_model(torch.zeros(1, 4, dtype=torch.long), use_cache=True).past_key_values
    assert not any(tensor.requires_grad for pair in past for tensor in pair)
    any_model(torch.ones(1, 4, dtype=torch.long), past_key_values=past).uncast_logits.sum().backward()
    grad = any_model.transformer.wte.weight.grad
    assert grad is not None and (grad[0] == 0).all() and (grad[1] != 0).any()


def test_training_history_is_cut_and_evaluation_cache_is_not(any_model: MoLMForCausalLM) -> None:
    limit = any_model.config.history_length
    ids = tokens(1, limit + 3)
    full = any_model(ids, use_cache=True).past_key_values
    assert full.length == limit + 3
    any_model.train()
    cut = any_model(ids, use_cache=True).past_key_values
    assert cut.length == limit
    for (keys, _), (kept, _) in zip(full, cut, strict=True):
        assert torch.equal(kept, keys[:, 3:])


def test_two_continuations_of_one_past_do_not_meet(any_model: MoLMForCausalLM) -> None:
    prompt = tokens(1, 4)
    with torch.no_grad():
        past = any_model(prompt, past_key_values=KVCache.empty(2, capacity=16), use_cache=True).past_key_values
        branches = [tokens(1, 3, seed) for seed in (1, 2)]
        caches = [past, past]
        for t in range(3):
            for i, branch in enumerate(branches):
                output = any_model(branch[:, t : t + 1], past_key_values=caches[i], use_cache=True)
                caches[i] = output.past_key_values
                whole = any_model(torch.cat([prompt, branch[:, : t + 1]], 1)).uncast_logits[:, -1:]
                close(output.uncast_logits, whole)
    assert past.length == 4


def test_decoding_writes_into_the_allocated_storage(any_model: MoLMForCausalLM) -> None:
    with torch.no_grad():
        cache = any_model(tokens(2, 4), past_key_values=KVCache.empty(2, 8), use_cache=True).past_key_values
        where = [layer.keys.data_ptr() for layer in cache.layers]
        for step in range(4):
            cache = any_model(tokens(2, 1, step), past_key_values=cache, use_cache=True).past_key_values
        assert [layer.keys.data_ptr() for layer in cache.layers] == where
        cache = any_model(tokens(2, 1), past_key_values=cache, use_cache=True).past_key_values
        assert cache.length == 9 and cache.layers[0].keys.data_ptr() != where[0]


def test_identity_keys_are_stored_once() -> None:
    model = random_model(n_head=1, att_hidden=16)
    cache = model(tokens(1, 4), use_cache=True).past_key_values
    assert all(layer.values is None for layer in cache.layers)
    keys, values = cache[0]
    assert keys is values and keys.shape == (1, 4, 16)


def test_cache_as_pairs_and_as_state(any_model: MoLMForCausalLM) -> None:
    ids = tokens(2, 6)
    cache = any_model(ids[:, :4], use_cache=True).past_key_values
    whole = any_model(ids).uncast_logits[:, 4:]
    pairs = tuple((k.clone(), v.clone()) for k, v in cache)
    for past in (pairs, KVCache.from_state_dict(cache.state_dict())):
        close(any_model(ids[:, 4:], past_key_values=past).uncast_logits, whole)
    rows = torch.tensor([1, 1, 0])
    close(any_model(ids[rows, 4:], past_key_values=cache.select(rows)).uncast_logits, whole[rows])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(any_model: MoLMForCausalLM, side: str) -> None:
    ids, pad = tokens(1, 5), torch.full((1, 3), 7)
    mask, real = torch.ones(1, 8, dtype=torch.bool), slice(3, 8) if side == "left" else slice(0, 5)
    mask[:, slice(0, 3) if side == "left" else slice(5, 8)] = False
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    close(any_model(padded, attention_mask=mask).uncast_logits[:, real], any_model(ids).uncast_logits)


def test_padding_counts_in_the_routing_loss(any_model: MoLMForCausalLM) -> None:
    ids, mask = tokens(1, 5), torch.tensor([[0, 0, 1, 1, 1]])
    routes = any_model(ids, attention_mask=mask, output_routes=True).routes
    assert all(route.counts.sum() == 5 * route.gates.shape[1] for block in routes for route in block)


def test_activation_checkpointing_changes_nothing(any_model: MoLMForCausalLM) -> None:
    ids = tokens(2, 6)
    past = any_model(tokens(2, 3, 1), use_cache=True).past_key_values
    grads = []
    for enabled in (False, True):
        any_model.zero_grad()
        any_model.set_activation_checkpointing(enabled)
        output = any_model(ids, labels=ids, past_key_values=past, use_cache=True)
        output.loss.backward()
        grads.append([parameter.grad.clone() for parameter in any_model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_activation_checkpointing_repeats_sampled_experts() -> None:
    model = random_model(sample_topk=1, moe_pdrop=0.5).train()
    ids, grads = tokens(2, 6), []
    for enabled in (False, True):
        model.zero_grad()
        model.set_activation_checkpointing(enabled)
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        grads.append(model.transformer.h[0].mlpf.experts.weight.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("kind", AUX_LOSS_TYPES)
def test_loss_is_cross_entropy_plus_weighted_sum_over_layers(kind: str) -> None:
    ids = tokens(2, 6)
    base = random_model()
    model = MoLMForCausalLM(base.config.replace(aux_loss_type=kind, aux_loss_weight=0.5)).double()
    model.load_state_dict(base.state_dict())
    output = model(ids, labels=ids)
    entropy = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(output.loss, entropy.double() + 0.5 * output.aux_loss)
    assert (output.aux_loss == 0) == (kind == "none")


def test_every_kind_of_routing_loss_has_a_name_that_a_configuration_may_use() -> None:
    assert set(_AUX_LOSSES) == set(AUX_LOSS_TYPES)
    with pytest.raises(KeyError, match="mutual"):
        routing_loss("mutual", [])


def test_per_layer_expert_counts() -> None:
    config = MoLMConfig.preset("molm-nano", n_att_experts=[2, 4], n_mlp_experts=[8, 3])
    model = MoLMForCausalLM(config)
    routes = model(tokens(1, 4), output_routes=True).routes
    assert [(len(r.attention.counts), len(r.ffn.counts)) for r in routes] == [(2, 8), (4, 3)]


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = MoLMForCausalLM(MoLMConfig.preset("molm-nano", gate_type="gmm", n_head=2))
    block = model.transformer.h[0]
    for weight in (model.lm_head.weight, model.transformer.wte.weight, block.attn.k_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (block.attn.k_proj.bias == 0).all() and (block.mlpf.gate.temperature == 0).all()
    assert block.mlpf.gate.expert_centroids.std().item() == pytest.approx(1, rel=0.2)
    for experts in (block.mlpf.experts, block.attn.q_proj.output_experts):
        assert experts.weight.abs().max().item() == pytest.approx(1 / experts.weight.shape[1], rel=1e-2)
        assert experts.weight.mean().abs() < 1e-3


def test_reset_after_meta_initialisation() -> None:
    with torch.device("meta"):
        model = MoLMForCausalLM(MoLMConfig.preset("molm-nano", gate_type="gmm", mlp_normaliser_rows=2))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model(tokens(1, 3)).logits.isfinite().all()


def test_tied_embeddings_are_one_parameter() -> None:
    model = MoLMForCausalLM(MoLMConfig.preset("molm-nano", tie_word_embeddings=True))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_bfloat16_model_runs_and_keeps_the_loss_in_float32() -> None:
    model = random_model(torch.bfloat16)
    output = model(tokens(2, 5), labels=tokens(2, 5))
    assert output.uncast_logits.dtype == torch.bfloat16
    assert {output.logits.dtype, output.loss.dtype, output.aux_loss.dtype} == {torch.float32}
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_misfits_are_named(model: MoLMForCausalLM) -> None:
    past = model(tokens(2, 3), use_cache=True).past_key_values
    for kwargs, words in (
        ({"input_ids": tokens(1, 3)[0]}, r"input_ids must be \[batch, tokens\], got shape \[3\]"),
        ({"input_ids": tokens(2, 3), "attention_mask": torch.ones(2, 3), "past_key_values": past}, r"\[2, 6\]"),
        ({"input_ids": tokens(1, 3), "past_key_values": past}, "batch size of input_ids"),
        ({"input_ids": tokens(2, 3), "past_key_values": [past[0]]}, "2 layers, got 1"),
        ({"input_ids": tokens(2, 3), "labels": tokens(2, 4)}, "labels must have the shape"),
    ):
        with pytest.raises(ValueError, match=words):
            model(**kwargs)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_split_and_any_mask_equal_one_pass(data: st.DataObject) -> None:
    changes = data.draw(st.sampled_from([{}, {"n_head": 1, "att_hidden": 16}, {"gate_type": "gmm", "k_mlp": 5}]))
    model = random_model(**changes)
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * sum(lengths), max_size=2 * sum(lengths))))
    mask = mask.view(2, -1)
    ids = tokens(2, sum(lengths))
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).uncast_logits
        past, start = None, 0
        for length in lengths:
            end = start + length
            output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=past, use_cache=True)
            close(output.uncast_logits, whole[:, start:end])
            past, start = output.past_key_values, end


def test_no_tokens(any_model: MoLMForCausalLM) -> None:
    output = any_model(tokens(2, 0), use_cache=True)
    assert output.logits.shape == (2, 0, 31) and output.past_key_values.length == 0
