"""`moduleformer-ext prune`."""

import json
from functools import reduce
from operator import add
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from moduleformer_ext.cli.measure import Measuring
from moduleformer_ext.cli.source import AsJson, Model, Output, Switch, check_new, locate, new_model_directory
from moduleformer_ext.cli.usage import read_counts
from moduleformer_ext.display import table
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.records import Fraction, Text
from moduleformer_ext.surgery import (
    ExpertUsage,
    PruningPlan,
    count_parameters,
    plan_by_size,
    plan_by_threshold,
    prune,
)


class Options(Measuring):
    """How much goes, and by which counts."""

    threshold: Fraction | None = None
    """prune experts whose frequency is below this"""
    remaining: Fraction | None = None
    """prune the least frequent ones until this fraction of the parameters is left"""
    normalise: Literal["max", "sum"] = "max"
    """an expert's frequency is relative to the layer's busiest one, or to all"""
    keep_normaliser: Switch = False
    """keep the pruned experts' router rows in the softmax"""
    usage: Path | None = None
    """folder of counts that `usage` wrote, instead of text"""
    domain: tuple[Text, ...] = ()
    """count these domains only (default: all); what stays is their part of the model, as a model of its own"""
    dry_run: Switch = False
    """only print what would go"""
    as_json: AsJson = False


def run(source: Model, output: Output, /, *, options: Options = Options()) -> int:
    """Write a smaller model with the experts that the text uses."""
    if (options.threshold is None) == (options.remaining is None):
        raise ValueError("exactly one of --threshold and --remaining must be given")
    if options.usage and options.text:
        raise ValueError("--usage: gives the counts already; leave --text out")
    if not options.dry_run:
        check_new(output, source)
    model, tokenizer = options.load(source)
    model.config.require_whole_experts("prune")  # before the text is read
    usage = _usage(options, source, model, tokenizer)
    make = plan_by_size if options.threshold is None else plan_by_threshold
    amount = options.remaining if options.threshold is None else options.threshold
    assert amount is not None
    plan = make(model.config, usage, amount, normalise=options.normalise, keep_normaliser=options.keep_normaliser)
    print(_as_json(plan) if options.as_json else _as_table(plan))
    if not options.dry_run:
        with new_model_directory(output, locate(source)[1]) as scratch:
            prune(model, plan).save_pretrained(scratch)
        if not options.as_json:
            print(f"wrote {output}")
    return 0


def _as_table(plan: PruningPlan) -> str:
    rows = []
    for site, places in plan.kept.items():
        identities = site.identities(plan.config)
        gone = ", ".join(str(identities[place]) for place in plan.dropped(site))
        rows.append((str(site), len(places), len(identities), gone or "none"))
    before, after = count_parameters(plan.config), count_parameters(plan.pruned_config)
    shown = table(["experts", "kept", "of", "pruned"], rows)
    return f"{shown}\nparameters {before} -> {after} ({100 * after / before:.1f} %)"


def _as_json(plan: PruningPlan) -> str:
    experts = [
        {
            "layer": site.layer,
            "kind": site.kind,
            "kept": [site.identities(plan.config)[place] for place in places],
            "pruned": [site.identities(plan.config)[place] for place in plan.dropped(site)],
        }
        for site, places in plan.kept.items()
    ]
    sizes = {"before": count_parameters(plan.config), "after": count_parameters(plan.pruned_config)}
    return json.dumps({"parameters": sizes, "experts": experts}, indent=2)


def _usage(options: Options, source: Path, model: MoLMForCausalLM, tokenizer: Tokenizer) -> ExpertUsage:
    if options.usage:
        by_domain = read_counts(options.usage)
    else:
        by_domain = {domain: score.usage for domain, score in options.measure(source, model, tokenizer).items()}
    domains = options.domain or list(by_domain)
    if unknown := [domain for domain in domains if domain not in by_domain]:
        raise ValueError(f"--domain must be among {', '.join(by_domain)}, got {', '.join(unknown)}")
    return reduce(add, (by_domain[domain] for domain in domains))
