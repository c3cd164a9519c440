"""`moduleformer-ext finetune`."""

import argparse
import time
from pathlib import Path

from moduleformer_ext.cli.source import HELP, load_source, locate
from moduleformer_ext.cli.train import add_config_flags, finish, read_given
from moduleformer_ext.train import RunDirectory, TrainConfig, is_run
from moduleformer_ext.train.finetune import finetuned_config

_INHERITED = ("text", "held_out", "segment_length", "history_length")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: those of `train`, and the model to start from."""
    parser.epilog = (
        "Options of the model's run that say which text it read and how are kept unless given anew. "
        "Continue an interrupted fine-tuning with: moduleformer-ext train --resume RUN."
    )
    parser.add_argument("base", type=Path, metavar="model", help=HELP)
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", dest="root", help="folder of the new run")
    parser.add_argument("--config", type=Path, metavar="FILE", help="options as .json or .toml")
    parser.add_argument(
        "--concentrate",
        type=float,
        metavar="W",
        help="concentrate the load on few experts, with this weight, so that the others can be pruned",
    )
    add_config_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Start a run from a trained model."""
    started = time.monotonic()
    given = read_given(options)
    if options.concentrate is not None:
        if "aux_loss_weight" in given:
            raise ValueError("--concentrate: is the weight of the routing loss; leave --aux-loss-weight out")
        given["aux_loss_weight"] = options.concentrate
        given["model"] = {**given.get("model", {}), "aux_loss_type": "concentration"}
    if is_run(options.base):
        stored = RunDirectory.open(options.base).config.to_dict()
        given = {**{name: stored[name] for name in _INHERITED}, **given}
    config = TrainConfig.from_dict(given)
    model, _ = load_source(options.base)
    finetuned_config(model.config, config)  # complains before anything is written
    return finish(RunDirectory.create(options.root, config, (model, locate(options.base)[1])), started)
