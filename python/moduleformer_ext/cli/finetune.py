"""`moduleformer-ext finetune`."""

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moduleformer_ext.cli.source import Model, load_source, locate, run_of
from moduleformer_ext.cli.train import HELP_GROUPS, NEW_RUN, ConfigFile, Flags, check_surroundings, start
from moduleformer_ext.distributed import Processes
from moduleformer_ext.records import NonNegative
from moduleformer_ext.train import RunDirectory, TrainConfig, check_outside
from moduleformer_ext.train.finetune import finetuned_config
from moduleformer_ext.train.session import check_model

_KEPT = "what the model's own run read is kept unless given"
_INHERITED = ("text", "text_field", "held_out", "segment_length", "history_length")
_FIXED = ("preset", "vocab_size", "tokenizer")


class Options(Flags):
    """Those of `train`, and one of its own."""

    concentrate: Annotated[NonNegative | None, Parameter(group=HELP_GROUPS["Objective"])] = None
    """concentrate the load on few experts, with this weight, so that the others can be pruned"""


def run(
    base: Model,
    /,
    *,
    run: Annotated[Path, Parameter(name=NEW_RUN, help=f"folder of the new run; {_KEPT}")],
    config: ConfigFile = None,
    options: Options = Options(),
) -> int:
    """Start a run from a trained model."""
    started = time.monotonic()
    check_outside(run, base)
    given = options.given(config)
    if fixed := [name for name in _FIXED if name in given]:
        raise ValueError(f"--{fixed[0].replace('_', '-')}: must be left out, the model has its own")
    if (weight := given.pop("concentrate", None)) is not None:
        if "aux_loss_weight" in given:
            raise ValueError("--concentrate: is the weight of the routing loss; leave --aux-loss-weight out")
        given["aux_loss_weight"] = weight
        given["model"] = {**given.get("model", {}), "aux_loss_type": "concentration"}
    if (earlier := run_of(base)) is not None:
        stored = earlier.config.to_dict()
        given = {**{name: stored[name] for name in _INHERITED}, **given}
    settings = TrainConfig.from_dict(given)
    check_surroundings(settings)

    def create(processes: Processes) -> RunDirectory:
        model, _ = load_source(base)
        check_model(finetuned_config(model.config, settings), settings, processes)
        return RunDirectory.create(run, settings, (model, locate(base)[1]))

    return start(settings, started, create)
