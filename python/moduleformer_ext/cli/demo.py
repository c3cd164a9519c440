"""`moduleformer-ext demo`: the whole way from text to a trained model and a picture of its experts."""

import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import Field

from moduleformer_ext.cli.train import check_surroundings, start
from moduleformer_ext.distributed import Processes, started_by_torchrun
from moduleformer_ext.records import Record, Text
from moduleformer_ext.train import RunDirectory, Size, TrainConfig, is_run

_MODEL = {"n_layer": 3, "n_mlp_experts": 16}
"""Few layers of many experts, 9 M parameters: in a few minutes more tokens teach more than more layers would."""

SIZES = (
    Size("9 M parameter", {"model": _MODEL}, 420),
    Size(
        "1.3 M parameter",
        {
            "model": {
                "n_layer": 2,
                "n_mlp_experts": 8,
                "n_embd": 128,
                "att_hidden": 128,
                "ffd_hidden": 128,
                "gating_size": 32,
            },
            "segment_length": 128,
            "history_length": 128,
            "learning_rate": 8e-3,
        },
        2300,
    ),
)
"""Largest first. The small one ended at 1.99 bits per byte with 2000 steps and at 1.92 with 2400; bigrams need 1.96.
Its step takes a tenth of the large one's time. Between them nothing was quicker: tokens count more than parameters.
"""


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
    config = SIZES[0].applied(TrainConfig(minutes=options.minutes, device=options.device, dtype=options.dtype))
    check_surroundings(config)
    if started_by_torchrun():
        raise ValueError("demo: must be started without torchrun, which launches train")

    def create(_: Processes) -> RunDirectory:
        earlier = is_run(options.run)
        directory = RunDirectory.replace(options.run, config)
        if earlier:
            print(f"replaced the earlier run in {options.run}")
        return directory

    return start(config, started, create, SIZES)
