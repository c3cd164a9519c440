"""`moduleformer-ext eval`."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from moduleformer_ext.cli.measure import Measuring
from moduleformer_ext.cli.source import AsJson, Model, load_source
from moduleformer_ext.data import ALL
from moduleformer_ext.files import writing
from moduleformer_ext.surgery import plot_expert_usage
from moduleformer_ext.train import Score, overall_bits_per_byte


def _picture(path: Path) -> Path:
    if path.suffix != ".png" or not path.parent.is_dir():
        raise ValueError(f"must be a .png file in a folder that exists, got {path}")
    return path


class Options(Measuring):
    """What `eval` does beside measuring."""

    as_json: AsJson = False
    expert_usage: Annotated[Path | None, AfterValidator(lambda path: path and _picture(path))] = None
    """draw the experts' use by domain, as .png"""


def run(source: Model, /, *, options: Options = Options()) -> int:
    """Measure a model on held-out or given text."""
    model, tokenizer = load_source(source)
    scores = options.measure(source, model, tokenizer)
    if options.expert_usage:
        with writing(options.expert_usage):
            plot_expert_usage(options.expert_usage, {domain: score.usage for domain, score in scores.items()})
    print(_as_json(scores) if options.as_json else _as_table(scores))
    return 0


def _as_json(scores: dict[str, Score]) -> str:
    rows = {
        domain: {
            "bits_per_byte": score.bits_per_byte,
            "perplexity": score.perplexity,
            "num_tokens": score.num_tokens,
            "num_bytes": score.num_bytes,
        }
        for domain, score in scores.items()
    }
    return json.dumps({"bits_per_byte": overall_bits_per_byte(scores), "domains": rows}, indent=2)


def _as_table(scores: dict[str, Score]) -> str:
    width = max(len(domain) for domain in (*scores, ALL))
    lines = [f"{'':<{width}}  bits/byte  perplexity     tokens      bytes"]
    lines += [
        f"{domain:<{width}}  {score.bits_per_byte:9.4f}  {score.perplexity:10.3f}  "
        f"{score.num_tokens:9d}  {score.num_bytes:9d}"
        for domain, score in scores.items()
    ]
    lines.append(f"{ALL:<{width}}  {overall_bits_per_byte(scores):9.4f}")
    return "\n".join(lines)
