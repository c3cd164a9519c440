"""The generation API of transformers against our own decoding, and batches against single sequences."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from hf_models import make_pair, tokens
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, LogitsProcessor

from moduleformer_ext import hf
from moduleformer_ext.hf.modeling import CACHE
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.models.generation import sample

NEW = 12


def generate(model: Any, x: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    options.setdefault("attention_mask", torch.ones_like(x))
    return model.generate(x, **options)


class TestAgainstOurs:
    def test_greedy(self, pair: tuple[Any, Any]) -> None:
        native, model = pair
        x = tokens(3, 7)
        expected = native.generate(x, NEW)
        assert torch.equal(generate(model, x), expected)
        assert torch.equal(generate(model, x, use_cache=False), expected)
        assert torch.equal(generate(model, x, cache_implementation="static"), expected)
        assert torch.equal(generate(model, x, cache_implementation="dynamic"), expected)
        assert torch.equal(generate(model, x, prefill_chunk_size=3), expected)
        embedded = model.generate(inputs_embeds=model.get_input_embeddings()(x), max_new_tokens=NEW, do_sample=False)
        assert torch.equal(embedded, expected[:, 7:])

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_a_step_is_one_op_for_all_blocks(self, pair: tuple[Any, Any], stacks: list[int], cache: str) -> None:
        model, x = pair[1], tokens(2, 7)
        options = {"cache_implementation": "static"} if cache == "static" else {}
        together = generate(model, x, **options)
        assert stacks == [len(model.transformer.h)] * (NEW - 1)
        hooks = [block.register_forward_hook(lambda *_: None) for block in model.transformer.h]
        try:
            assert torch.equal(generate(model, x, **options), together)
        finally:
            for hook in hooks:
                hook.remove()
        assert len(stacks) == NEW - 1

    def test_scores(self, pair: tuple[Any, Any]) -> None:
        native, model = pair
        x = tokens(2, 7)
        result = generate(model, x, return_dict_in_generate=True, output_logits=True, output_hidden_states=True)
        expected = native(result.sequences).uncast_logits[:, 6:-1]
        torch.testing.assert_close(torch.stack(result.logits, 1), expected)
        assert len(result.hidden_states) == NEW and len(result.hidden_states[0]) == 3
        assert result[CACHE].get_seq_length() == 7 + NEW - 1

    def test_sampling_draws_from_the_same_distribution(self, pair: tuple[Any, Any]) -> None:
        native, model = pair
        x = tokens(1, 7)
        torch.manual_seed(0)
        many = generate(model, x, max_new_tokens=1, do_sample=True, num_return_sequences=4000, top_k=8, temperature=0.7)
        drawn = many[:, -1].bincount(minlength=31) / 4000
        generator = torch.Generator().manual_seed(1)
        logits = native(x).logits[:, -1].expand(4000, -1)
        ours = sample(logits, temperature=0.7, top_k=8, generator=generator).bincount(minlength=31) / 4000
        assert (drawn > 0).sum() <= 8 and (drawn - ours).abs().max() < 0.04

    def test_several_ends(self, pair: tuple[Any, Any]) -> None:
        native, model = pair
        x = tokens(3, 7)
        ends = native.generate(x, NEW)[0, [9, 12]].tolist()
        expected = native.generate(x, NEW, eos_token_id=ends, pad_token_id=0)
        assert torch.equal(generate(model, x, eos_token_id=ends), expected)
        assert (expected[0, 10:] == 0).all()


def log_likelihood(native: MoLMForCausalLM, sequence: Tensor, start: int) -> float:
    logits = native(sequence[None]).logits[0, start - 1 : -1].log_softmax(-1)
    return logits.gather(1, sequence[start:, None]).sum().item()


class TestBeams:
    def test_a_full_beam_finds_the_best_sequence(self, pair: tuple[Any, Any]) -> None:
        """With as many beams as words, two tokens are searched exhaustively."""
        native, model = pair
        x = tokens(1, 5)
        found = generate(model, x, num_beams=31, max_new_tokens=2, length_penalty=0.0, num_return_sequences=3)
        every = torch.cartesian_prod(torch.arange(31), torch.arange(31))
        scores = torch.tensor([log_likelihood(native, torch.cat([x[0], two]), 5) for two in every])
        best = every[scores.argsort(descending=True)[:3]]
        assert torch.equal(found[:, 5:], best)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_a_batch_is_its_sequences(self, pair: tuple[Any, Any], cache: str) -> None:
        _, model = pair
        x = tokens(2, 5)
        options = {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True, "cache_implementation": cache}
        together = generate(model, x, **options)
        apart = torch.cat([generate(model, x[i : i + 1], **options) for i in range(2)])
        assert torch.equal(together, apart)
        assert torch.equal(
            together, generate(model, x, **(options | {"cache_implementation": None, "use_cache": False}))
        )


class TestPadding:
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
    def test_in_front_and_in_the_middle(self, pair: tuple[Any, Any], options: dict[str, Any]) -> None:
        _, model = pair
        prompts = [tokens(9, seed=5), tokens(6, seed=6), tokens(4, seed=7)]
        x = torch.full((3, 9), 30)
        mask = torch.zeros(3, 9, dtype=torch.long)
        places = [range(9), range(3, 9), [0, 1, 6, 8]]  # none, in front, in the middle
        for row, (prompt, where) in enumerate(zip(prompts, places, strict=True)):
            x[row, list(where)], mask[row, list(where)] = prompt, 1
        together = generate(model, x, attention_mask=mask, **options)
        for row, prompt in enumerate(prompts):
            alone = generate(model, prompt[None], **options)
            assert torch.equal(together[row, 9:], alone[0, len(prompt) :]), row


class TestSteering:
    def test_processors_criteria_and_streamers(self, pair: tuple[Any, Any]) -> None:
        native, model = pair
        x = tokens(1, 7)
        expected = native.generate(x, NEW)

        class Never(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                scores = scores.clone()
                scores[:, expected[0, 7]] = -torch.inf
                return scores

        without = generate(model, x, logits_processor=LogitsProcessorList([Never()]))
        assert expected[0, 7] not in without[0, 7:]
        second = native(x).logits[0, -1].topk(2).indices[1]
        assert without[0, 7] == second
        stopped = generate(model, x, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(10)]))
        assert torch.equal(stopped, expected[:, :10])

        class Words(BaseStreamer):
            def __init__(self) -> None:
                self.seen: list[int] = []
                self.ended = False

            def put(self, value: Tensor) -> None:
                self.seen += value.flatten().tolist()

            def end(self) -> None:
                self.ended = True

        streamer = Words()
        generate(model, x, streamer=streamer)
        assert streamer.seen == expected[0].tolist() and streamer.ended

    def test_assisted(self, pair: tuple[Any, Any]) -> None:
        native, model = pair
        _, assistant = make_pair(n_layer=1)
        x = tokens(1, 7)
        expected = native.generate(x, 40)
        assert torch.equal(generate(model, x, max_new_tokens=40, assistant_model=assistant), expected)
        assert torch.equal(generate(model, x, max_new_tokens=40, prompt_lookup_num_tokens=3), expected)
        calls: list[int] = []
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        assistant = hf.from_native(native)  # guesses right each time
        assert torch.equal(generate(model, x, max_new_tokens=40, assistant_model=assistant), expected)
        assert len(calls) <= 20  # two tokens a pass at least
        assert torch.equal(generate(model, x, max_new_tokens=40, assistant_early_exit=1), expected)

    def test_a_conversation_goes_on_with_its_cache(self, pair: tuple[Any, Any]) -> None:
        native, model = pair
        x = tokens(1, 7)
        for cache in (hf.ModuleFormerCache(2), DynamicCache(), hf.ModuleFormerStaticCache(2, 60)):
            first = generate(model, x, **{CACHE: cache}, return_dict_in_generate=True)
            assert cache.get_seq_length() == 7 + NEW - 1
            more = torch.cat([first.sequences, tokens(1, 5, seed=9)], 1)
            assert torch.equal(generate(model, more, **{CACHE: first[CACHE]}), native.generate(more, NEW))

    def test_generation_configuration_of_the_directory(self, pair: tuple[Any, Any], tmp_path: Any) -> None:
        _, model = pair
        model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=[1, 2], pad_token_id=0)
        model.save_pretrained(tmp_path)
        again = hf.ModuleFormerForCausalLM.from_pretrained(tmp_path)
        assert again.generation_config.eos_token_id == [1, 2]
        assert again.generate(tokens(1, 4)).shape[1] <= 7


class TestRefused:
    @pytest.mark.parametrize("kind", ["quantized", "offloaded", "offloaded_static"])
    def test_kinds_of_caches(self, pair: tuple[Any, Any], kind: str) -> None:
        _, model = pair
        with pytest.raises(
            ValueError, match=f"cache_implementation must be 'dynamic' or 'static' for a MoLM, got '{kind}'"
        ):
            generate(model, tokens(1, 4), cache_implementation=kind)

    def test_continuous_batching(self, pair: tuple[Any, Any]) -> None:
        _, model = pair
        with pytest.raises(NotImplementedError, match="continuous batching is not supported; use generate"):
            model.generate_batch([[1, 2, 3]], generation_config=GenerationConfig(max_new_tokens=2, eos_token_id=0))

    def test_caches_of_others(self, pair: tuple[Any, Any]) -> None:
        _, model = pair
        static = StaticCache(config=model.config, max_cache_len=20)
        for cache in (static, DynamicCache(offloading=True) if torch.cuda.is_available() else static):
            with pytest.raises(TypeError, match=r"must be a ModuleFormerCache, .* got (Static|Dynamic)Cache"):
                model(tokens(1, 4), past_key_values=cache)
        with pytest.raises(ValueError, match="the cache must have 2 layers, got 3"):
            model(tokens(1, 4), past_key_values=hf.ModuleFormerCache(3))
        cache = hf.ModuleFormerCache(2)
        with pytest.raises(ValueError, match="only one of past_key_values and cache"):
            model(tokens(1, 4), past_key_values=cache, cache=cache)

    def test_more_than_a_static_cache_holds(self, pair: tuple[Any, Any]) -> None:
        _, model = pair
        cache = hf.ModuleFormerStaticCache(2, 5)
        with torch.no_grad():
            model(tokens(1, 4), cache=cache)
            with pytest.raises(ValueError, match="must leave room for 2 tokens in k_cache's 5, got 4"):
                model(tokens(1, 2), cache=cache)


def test_generation_from_several_threads(pair: tuple[Any, Any]) -> None:
    native, model = pair
    prompts = [tokens(1, 5, seed=seed) for seed in range(4)]
    results: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i, x=x: results.__setitem__(i, generate(model, x)))
        for i, x in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(prompts):
        assert torch.equal(results[i], native.generate(x, NEW))
