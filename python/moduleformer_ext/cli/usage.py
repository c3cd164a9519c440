"""`moduleformer-ext usage`."""

import argparse
import json
from pathlib import Path

from moduleformer_ext.cli.measure import add_measuring_arguments, measure
from moduleformer_ext.cli.source import HELP, check_new, load_source
from moduleformer_ext.files import new_directory
from moduleformer_ext.surgery import KINDS, ExpertUsage, divergences, plot_expert_usage, usage_table

COUNTS_FILE = "usage.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", type=Path, help=HELP)
    parser.add_argument("output", type=Path, help=f"folder to create, for {COUNTS_FILE}, usage.csv and usage.png")
    add_measuring_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Count the experts' slots by domain; write counts, frequencies, divergences and heat maps."""
    check_new("usage", options.output)
    model, tokenizer = load_source(options.model)
    usage = {domain: score.usage for domain, score in measure(options, model, tokenizer).items()}
    divergence = divergences(usage)
    record = {"domains": {domain: counted.to_dict() for domain, counted in usage.items()}, "divergence": divergence}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(options.output) as scratch:
        (scratch / COUNTS_FILE).write_text(json.dumps(record, indent=2) + "\n")
        (scratch / "usage.csv").write_text(usage_table(usage, model.config))
        plot_expert_usage(scratch / "usage.png", usage)
    for kind in KINDS:
        for first, others in divergence[kind].items():
            for second, layers in others.items():
                mean = sum(layers) / len(layers)
                print(f"{kind:<9}  KL({first} || {second}), mean over layers: {mean:.3f} nats")
    print(f"wrote {options.output}")
    return 0


def read_counts(path: Path) -> dict[str, ExpertUsage]:
    """The counts by domain that `usage` wrote into a folder."""
    file = path / COUNTS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"usage: '{file}' does not exist; `moduleformer-ext usage` writes it")
    try:
        domains = json.loads(file.read_text())["domains"]
        return {domain: ExpertUsage.from_dict(counts) for domain, counts in domains.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"usage: '{file}' is not what `moduleformer-ext usage` writes: {error!r}") from error
