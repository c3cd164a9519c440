"""`moduleformer-ext generate`."""

import argparse
import sys
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream

from moduleformer_ext.cli.source import HELP, load_source
from moduleformer_ext.data import end_of_text_id


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", type=Path, help=HELP)
    parser.add_argument("--prompt", help="text to continue (default: standard input; empty: start a document)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=None, help="sample from the k likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, default=None, help="sample from the likeliest tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=None, help="makes sampling repeatable")


def run(options: argparse.Namespace) -> int:
    """Stream the continuation of a prompt to standard output."""
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    model, tokenizer = load_source(options.model)
    end = end_of_text_id(tokenizer)
    ids = [end, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    stream = DecodeStream(skip_special_tokens=True)
    sys.stdout.write(prompt)
    for token in model.generate_stream(
        torch.tensor([ids]),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        eos_token_id=end,
    ):
        # None until the bytes so far make whole characters.
        sys.stdout.write(stream.step(tokenizer, int(token)) or "")
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
