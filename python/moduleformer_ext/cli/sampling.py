"""How `generate` and `chat` draw tokens, and the text of what is drawn as it comes."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Annotated

import torch
from cyclopts import Parameter
from pydantic import Field
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from moduleformer_ext.cli.source import Running
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.records import Count, Natural, NonNegative, Seed


@Parameter(name="*")
class Sampling(Running):
    """How to go on."""

    max_new_tokens: Natural = 200
    """stop after so many"""
    temperature: NonNegative = 0.8
    """0: always the likeliest"""
    top_k: Count | None = None
    """sample from the k likeliest tokens"""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """sample from the likeliest tokens of this total probability"""
    seed: Seed | None = None
    """makes sampling repeatable"""

    def stream(self, model: MoLMForCausalLM, ids: Sequence[int], end: int, seed: int | None = None) -> Iterator[int]:
        """The tokens after `ids`, up to and without `end`. What can go wrong does before the first is asked for."""
        tokens = model.generate_stream(
            torch.tensor([ids], device=next(model.parameters()).device),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed if seed is None else seed,
            eos_token_id=end,
        )
        first = list(islice(tokens, 1))
        return (token for token in map(int, chain(first, tokens)) if token != end)


class Text:
    """Tokens become text as soon as the bytes so far make whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """What the token adds."""
        return self._stream.step(self._tokenizer, token) or ""
