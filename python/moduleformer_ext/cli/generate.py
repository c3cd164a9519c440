"""`moduleformer-ext generate`."""

import sys
from itertools import chain, islice
from typing import Annotated

import torch
from cyclopts import Parameter
from pydantic import Field
from tokenizers.decoders import DecodeStream

from moduleformer_ext.cli.source import Model, load_source
from moduleformer_ext.data import encode_texts, end_of_text_id
from moduleformer_ext.records import Count, Natural, NonNegative, Record, Seed, Text


@Parameter(name="*")
class Options(Record):
    """How to continue the prompt."""

    prompt: Text | None = None
    """text to continue (default: standard input; empty: start a document)"""
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


def run(source: Model, /, *, options: Options = Options()) -> int:
    """Stream the continuation of a prompt to standard output."""
    prompt = _standard_input() if options.prompt is None else options.prompt
    model, tokenizer = load_source(source)
    end = end_of_text_id(tokenizer)
    ids = [end, *encode_texts(tokenizer, [prompt])[0]]
    stream = DecodeStream(skip_special_tokens=True)
    tokens = model.generate_stream(
        torch.tensor([ids]),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        eos_token_id=end,
    )
    first = list(islice(tokens, 1))  # what can go wrong does before anything is written
    sys.stdout.write(prompt)
    for token in chain(first, tokens):
        # None until the bytes so far make whole characters.
        sys.stdout.write(stream.step(tokenizer, int(token)) or "")
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input must be UTF-8 text: {error}") from error
