"""`moduleformer-ext demo`: the whole way from text to a trained model and a picture of its experts."""

import shutil
import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import Field

from moduleformer_ext.cli.train import check_surroundings, start
from moduleformer_ext.records import Record, Text
from moduleformer_ext.train import RunDirectory, TrainConfig, is_run

_MODEL = {"n_layer": 3, "n_mlp_experts": 16}
"""Few layers of many experts, 9 M parameters: in a few minutes more tokens teach more than more layers would."""


@Parameter(name="*")
class Options(Record):
    """Where, and how long."""

    run: Path = Path("runs/demo")
    """folder of the run; an earlier run in it is replaced"""
    minutes: Annotated[float, Field(gt=0, le=10**6)] = 4.8
    """wall-clock budget of everything"""
    device: Text = "cpu"
    """torch device"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """fp32, bf16 (autocast), or auto: whichever is measured faster here"""


def run(*, options: Options = Options()) -> int:
    """Train the demonstration model."""
    started = time.monotonic()
    config = TrainConfig(minutes=options.minutes, device=options.device, dtype=options.dtype, model=_MODEL)
    check_surroundings(config)

    def create() -> RunDirectory:
        if is_run(options.run):
            with RunDirectory(options.run, config).lock():
                print(f"replacing the earlier run in {options.run}")
                shutil.rmtree(options.run)
        return RunDirectory.create(options.run, config)

    return start(config, started, create)
