"""`moduleformer-ext plot`."""

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import AfterValidator, Field

from moduleformer_ext.cli.source import AsJson, check_picture
from moduleformer_ext.display import table
from moduleformer_ext.files import writing
from moduleformer_ext.records import Record, Text
from moduleformer_ext.train import RunDirectory
from moduleformer_ext.train.loss_plot import Curve, plot_curves
from moduleformer_ext.train.session import MODEL_NAME


@Parameter(name="*")
class Options(Record):
    """What to draw, and how."""

    output: Annotated[Path, AfterValidator(check_picture)] = Path("loss.png")
    """picture to write, a .png in a folder that exists"""
    metric: Text = "loss"
    """figure of metrics.jsonl, such as loss, grad_norm or tokens_per_second"""
    x: Literal["steps", "tokens"] = "steps"
    """what it is drawn over"""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """weight of what was in the exponential mean; 0: as logged"""
    as_json: AsJson = False


def run(*runs: Annotated[Path, Parameter(help="run directories")], options: Options = Options()) -> int:
    """Draw a figure that runs logged, and what they scored on held-out text, into one picture."""
    if not runs:
        raise ValueError("RUNS must be given one run or more")
    curves: dict[str, Curve] = {}
    for path in runs:
        try:
            curves[str(path)] = Curve.of(RunDirectory.open(path).metrics.read(), options.metric, MODEL_NAME)
        except ValueError as error:
            raise ValueError(f"run: '{path}': {error}") from error
    with writing(options.output):
        plot_curves(options.output, curves, metric=options.metric, x=options.x, smoothing=options.smoothing)
    if options.as_json:
        print(json.dumps({name: vars(curve) for name, curve in curves.items()}, indent=2))
        return 0
    rows = []
    for name, curve in curves.items():
        scored = f"{[*curve.held_out.values()][-1]:.4f}" if curve.held_out else None
        rows.append(
            (
                name,
                curve.steps[-1],
                curve.tokens[-1],
                f"{curve.smoothed(options.smoothing)[-1]:.4f}",
                scored,
            )
        )
    print(table(["run", "steps", "tokens", options.metric, "held-out bits/byte"], rows))
    print(f"wrote {options.output}")
    return 0
