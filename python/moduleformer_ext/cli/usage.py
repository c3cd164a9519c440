"""`moduleformer-ext usage`."""

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from moduleformer_ext.cli.measure import Measuring
from moduleformer_ext.cli.source import AsJson, Model, check_new
from moduleformer_ext.display import table
from moduleformer_ext.files import new_directory, read_json, to_json, write_file, writing
from moduleformer_ext.surgery import KINDS, ExpertUsage, divergences, plot_expert_usage, usage_table

COUNTS_FILE = "usage.json"


def run(
    source: Model,
    output: Annotated[Path, Parameter(help=f"folder to create, for {COUNTS_FILE}, usage.csv and usage.png")],
    /,
    *,
    options: Measuring = Measuring(),
    as_json: AsJson = False,
) -> int:
    """Count the experts' slots by domain; write counts, frequencies, divergences and heat maps."""
    check_new(output, source)
    model, tokenizer = options.load(source)
    usage = {domain: score.usage for domain, score in options.measure(source, model, tokenizer).items()}
    divergence = divergences(usage)
    record = {"domains": {domain: counted.to_dict() for domain, counted in usage.items()}, "divergence": divergence}
    output.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(output) as scratch:
        write_file(scratch / COUNTS_FILE, to_json(record))
        write_file(scratch / "usage.csv", usage_table(usage, model.config))
        with writing(output / "usage.png"):
            plot_expert_usage(scratch / "usage.png", usage)
    if as_json:
        print(json.dumps(record, indent=2))
        return 0
    rows = [
        (kind, first, second, f"{sum(layers) / len(layers):.3f}")
        for kind in KINDS
        for first, others in divergence[kind].items()
        for second, layers in others.items()
    ]
    if rows:
        print(table(["experts", "domain", "from domain", "KL, nats, mean over layers"], rows))
    print(f"wrote {output}")
    return 0


def read_counts(path: Path) -> dict[str, ExpertUsage]:
    """The counts by domain that `usage` wrote into a folder."""
    file = path / COUNTS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"usage: '{file}' does not exist; `moduleformer-ext usage` writes it")
    try:
        domains = read_json(file, dict[str, Any])["domains"]
        return {domain: ExpertUsage.from_dict(counts) for domain, counts in domains.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"usage: '{file}' is not what `moduleformer-ext usage` writes: {error!r}") from error
