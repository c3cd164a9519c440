"""`moduleformer-ext eval`."""

import json
import math
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from moduleformer_ext.cli.measure import Measuring
from moduleformer_ext.cli.source import AsJson, Model, check_picture
from moduleformer_ext.data import ALL
from moduleformer_ext.display import table
from moduleformer_ext.files import writing
from moduleformer_ext.surgery import plot_expert_usage
from moduleformer_ext.train import Score, overall_bits_per_byte


class Options(Measuring):
    """What `eval` does beside measuring."""

    as_json: AsJson = False
    expert_usage: Annotated[Path | None, AfterValidator(lambda path: path and check_picture(path))] = None
    """draw the experts' use by domain, as .png"""


def run(source: Model, /, *, options: Options = Options()) -> int:
    """Measure a model on held-out or given text."""
    model, tokenizer = options.load(source)
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
            "perplexity": score.perplexity if math.isfinite(score.perplexity) else None,
            "num_tokens": score.num_tokens,
            "num_bytes": score.num_bytes,
        }
        for domain, score in scores.items()
    }
    return json.dumps({"bits_per_byte": overall_bits_per_byte(scores), "domains": rows}, indent=2)


def _as_table(scores: dict[str, Score]) -> str:
    rows: list[tuple[str, str, str | None, int, int]] = [
        (domain, f"{score.bits_per_byte:.4f}", f"{score.perplexity:.3f}", score.num_tokens, score.num_bytes)
        for domain, score in scores.items()
    ]
    tokens, size = (sum(getattr(score, name) for score in scores.values()) for name in ("num_tokens", "num_bytes"))
    rows.append((ALL, f"{overall_bits_per_byte(scores):.4f}", None, tokens, size))
    return table(["domain", "bits/byte", "perplexity", "tokens", "bytes"], rows)
