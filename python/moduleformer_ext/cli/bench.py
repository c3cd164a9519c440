"""`moduleformer-ext bench`: the benchmarks of the checkout, which a wheel holds as moduleformer_ext.benchmarks."""

import importlib
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from pydantic import Field

import moduleformer_ext
from moduleformer_ext.cli.source import AsJson, Switch
from moduleformer_ext.display import table
from moduleformer_ext.records import Record, Text


@Parameter(name="*")
class Options(Record):
    """What is measured, and for how long."""

    device: Literal["cpu", "cuda"] = "cpu"
    """whose kernels are measured"""
    select: Text | None = None
    """only cells with these words in their names, as pytest's -k: 'bf16 and T512'"""
    quick: Switch = False
    """tiny shapes: does everything run?"""
    budget: Annotated[float | None, Field(ge=0)] = None
    """seconds after which no cell begins"""
    output: Path | None = None
    """folder for all figures, tables and pictures (default: none are kept)"""
    as_json: AsJson = False


def run(
    *names: Annotated[str, Parameter(help="ops to measure, also layer and model (default: all ops)")],
    options: Options = Options(),
) -> int:
    """Measure the ops against PyTorch and the peers that are installed, each checked to compute the same."""
    suite = _suite()
    folder = Path(suite.__file__).parent
    paths = sorted(folder.rglob("bench_*.py"), key=lambda path: (path.parent == folder, path.name))
    known = {path.stem.removeprefix("bench_"): path for path in paths}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"NAMES must be among {', '.join(known)}, got {', '.join(unknown)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no GPU")
    files = [known[name] for name in names] or [path for path in known.values() if path.parent != folder]
    words = [f"--device={options.device}", *["--quick"] * options.quick, *map(str, files)]
    words += [f"--budget={math.inf if options.budget is None else options.budget}"]
    words += [] if options.select is None else ["-k", options.select]
    with _results(options.output) as results:
        broken = suite.measure([*words, f"--out={results}"], log=sys.stderr)
        measured = _part(suite, "report").Run.load(results)
    if not (measured.cells or measured.failures or broken):
        raise ValueError("nothing was measured: --select leaves no cell, or the --budget is spent before the first")
    if options.as_json:
        print(json.dumps([_as_record(cell) for cell in measured.cells], indent=2))
    for title, cells in measured.sections.items() if not options.as_json else ():
        print(f"\n{title}\n{_as_table(cells)}")
    if options.output is not None and not options.as_json:
        print(f"\nwrote {options.output / 'table.md'}")
    for cell, why in (measured.failures | broken).items():
        print(f"failed: {cell}: {why}", file=sys.stderr)
    return 1 if broken else 0


def _suite() -> Any:
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(name.replace("_", "-") for name in missing)
        raise ImportError(f"bench needs {names}; install with: pip install 'moduleformer_ext[bench]'")
    if importlib.util.find_spec("moduleformer_ext.benchmarks") is not None:
        return importlib.import_module("moduleformer_ext.benchmarks.__main__")
    sys.path.insert(0, str(Path(moduleformer_ext.__file__).parents[2]))  # of the checkout
    return importlib.import_module("benchmarks.__main__")


def _part(suite: Any, name: str) -> Any:
    return importlib.import_module(f"{suite.__package__}.{name}")


@contextmanager
def _results(output: Path | None) -> Iterator[Path]:
    if output is not None:
        if output.exists() and not output.is_dir():
            raise NotADirectoryError(f"--output must be a folder, got the file {output}")
        yield output
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _as_table(cells: list[Any]) -> str:
    rows = [
        (
            cell.info["case"],
            cell.threads,
            f"{cell.median('ours') * 1e3:.3g}",
            cell.best_peer,
            _ratio(cell.ratio(cell.best_peer) if cell.best_peer else None),
            _ratio(cell.over_limit),
        )
        for cell in cells
    ]
    return table(["case", "threads", "ours, ms", "best peer", "its time / ours", "ours / limit"], rows)


def _ratio(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}x"


def _as_record(cell: Any) -> dict[str, Any]:
    return {
        "section": cell.info["section"],
        "case": cell.info["case"],
        "threads": cell.info["threads"],
        "seconds": {name: cell.median(name) for name in cell.rows},
        "comparable": [name for name, row in cell.rows.items() if row["extra_info"]["comparable"]],
        "limit_seconds": cell.info["limit"],
    }
