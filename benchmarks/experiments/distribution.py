"""Experiment 3: how far apart domains' experts are (the paper's Figure 2), with either balancing loss.

python -m benchmarks.experiments.distribution
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np

from moduleformer_ext.surgery import KINDS, ExpertUsage, plot_expert_usage
from moduleformer_ext.surgery.usage import layer_divergences

from .cells import Result
from .language_modelling import TITLES
from .report import markdown_table, verdict, write_report
from .setting import Setting, make_parser, make_setting, mean_and_spread
from .training import score

NAMES = ("molm-mi", "molm-switch", "molm-none")


def main(arguments: Sequence[str] | None = None) -> None:
    """Count the experts' use by the models of experiment 1 (training what is missing), write the report."""
    options = make_parser("distribution", "Expert distribution by domain.").parse_args(arguments)
    setting = make_setting("distribution", options, needs_new_text=True)
    usage = {name: [_counted(setting, name, seed) for seed in setting.seeds] for name in NAMES}
    report(setting, usage)


def _counted(setting: Setting, name: str, seed: int) -> dict[str, ExpertUsage]:
    """By domain: those of the training, and those the model has never seen."""
    seen: Result = setting.first_training(name, seed)["usage"]

    def count() -> Result:
        assert setting.new is not None
        scores = score(setting.cells.model(name, seed), setting.new.held_out, setting.size.length)
        return {domain: found.usage.to_dict() for domain, found in scores.items()}

    unseen = setting.cells.measured(f"distribution-{name}", seed, count)
    return {domain: ExpertUsage.from_dict(counts) for domain, counts in {**seen, **unseen}.items()}


def mean_divergence(usage: dict[str, ExpertUsage], domains: Sequence[str], kind: str) -> float:
    """KL in nats, over all layers and ordered pairs of domains."""
    return float(np.mean([layer_divergences(usage[a], usage[b], kind).mean() for a, b in permutations(domains, 2)]))


def report(setting: Setting, usage: dict[str, list[dict[str, ExpertUsage]]]) -> None:
    """Table, pictures, verdict."""
    assert setting.new is not None
    old, everything = setting.old.domains, [*setting.old.domains, *setting.new.domains]
    pairs = {f"between {' and '.join(old)}": old, "between all domains": everything}
    measured = {
        name: {
            (label, kind): [mean_divergence(seed, domains, kind) for seed in found]
            for label, domains in pairs.items()
            for kind in KINDS
        }
        for name, found in usage.items()
    }
    columns = [(label, kind) for label in pairs for kind in KINDS]
    rows = [[TITLES[name], *(mean_and_spread(measured[name][column]) for column in columns)] for name in NAMES]
    head = ["model", *(f"{label}, {kind} experts" for label, kind in columns)]
    key = (next(iter(pairs)), "ffn")
    mi, switch = (np.array(measured[name][key]) for name in ("molm-mi", "molm-switch"))
    about = (
        "KL divergence between the expert frequencies of held-out domains, in nats, over all layers and ordered "
        f"pairs; mean of {len(setting.seeds)} seeds ± half their range. {', '.join(setting.new.domains)}: text that "
        "no model has been trained on."
    )
    shown = verdict(
        "With the mutual-information loss domains use more different experts than with the switch loss.",
        bool(mi.min() > switch.max()),
        f"{mi.mean():.3f} against {switch.mean():.3f} nats between {' and '.join(old)} (feed-forward experts).",
    )
    pictures = []
    for name in NAMES[:2]:
        plot_expert_usage(setting.results / f"{name}.png", usage[name][0])
        pictures.append(f"{TITLES[name]}, seed {setting.seeds[0]}:\n\n![Expert usage]({name}.png)")
    write_report(
        setting.results,
        "Expert distribution",
        [about, markdown_table(head, rows), shown, *pictures],
        {
            "size": vars(setting.size),
            "seeds": setting.seeds,
            "divergence": {
                name: {" ".join(column): values for column, values in found.items()} for name, found in measured.items()
            },
        },
    )


if __name__ == "__main__":
    main()
