"""`moduleformer-ext generate`."""

import json
import sys

from moduleformer_ext.cli import sampling
from moduleformer_ext.cli.source import AsJson, Model, load_source
from moduleformer_ext.data import encode_texts, end_of_text_id
from moduleformer_ext.records import Text


class Options(sampling.Sampling):
    """What to continue, and how."""

    prompt: Text | None = None
    """text to continue (default: standard input; empty: start a document)"""
    as_json: AsJson = False


def run(source: Model, /, *, options: Options = Options()) -> int:
    """Stream the continuation of a prompt to standard output."""
    prompt = _standard_input() if options.prompt is None else options.prompt
    model, tokenizer = load_source(source, options.device, options.dtype)
    end = end_of_text_id(tokenizer)
    tokens = options.stream(model, [end, *encode_texts(tokenizer, [prompt])[0]], end)
    text = sampling.Text(tokenizer)
    if options.as_json:
        ids = list(tokens)
        print(json.dumps({"prompt": prompt, "text": "".join(map(text.add, ids)), "token_ids": ids}, indent=2))
        return 0
    sys.stdout.write(prompt)
    for token in tokens:
        sys.stdout.write(text.add(token))
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _standard_input() -> str:
    if sys.stdin.isatty():
        print("type the prompt; Ctrl-D ends it", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input must be UTF-8 text: {error}") from error
