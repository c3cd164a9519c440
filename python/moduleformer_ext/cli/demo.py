"""`moduleformer-ext demo`: the whole way from text to a trained model and a picture of its experts."""

import argparse
import shutil
import time
from pathlib import Path

from moduleformer_ext.cli.train import finish
from moduleformer_ext.train import RunDirectory, TrainConfig, is_run

_MODEL = {"n_layer": 3, "n_mlp_experts": 16}
"""Few layers of many experts, 9 M parameters: in a few minutes more tokens teach more than more layers would."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--run",
        type=Path,
        default=Path("runs/demo"),
        metavar="RUN",
        help="folder of the run; an earlier run in it is replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes", type=float, default=4.8, help="wall-clock budget of everything (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Train the demonstration model."""
    started = time.monotonic()
    if is_run(options.run):
        print(f"replacing the earlier run in {options.run}")
        shutil.rmtree(options.run)
    return finish(RunDirectory.create(options.run, TrainConfig(minutes=options.minutes, model=_MODEL)), started)
